"""What /docs and /openapi.json say beside FastAPI's own: parameters, bodies, examples, errors and security schemes."""

import inspect
import itertools
import json
from pathlib import Path
from typing import Any

from fastapi import Security
from fastapi.security import APIKeyHeader, HTTPBearer
from pydantic import BaseModel

from service.errors import RequestError
from service.http.exchange import DEADLINE_HEADER, PRIORITY_HEADER
from service.http.problems import problem_members

SECURITY = [
    Security(HTTPBearer(scheme_name="bearer", description="An API key, where keys are in use.", auto_error=False)),
    Security(APIKeyHeader(scheme_name="X-API-Key", name="X-API-Key", description="The same key.", auto_error=False)),
]
"""Declares the schemes for /docs; `service.http.auth` checks the keys before any route is found."""

_REQUEST_ID = "c8c774003f9448b49c0964e4feeb8708"

CLASSIFY_HEADERS = {
    DEADLINE_HEADER: "The same as `deadline_ms`; if both are given, the earlier deadline counts.",
    PRIORITY_HEADER: "The same as `priority`.",
    "X-Request-ID": "Returned with the answer and logged: 1 to 128 letters, digits, `_`, `.`, `:` and `-`.",
}


def fixed_part(name: str) -> dict[str, Any]:
    """A part of the documentation that is written out in `openapi_parts.json`."""
    text = Path(__file__).with_name("openapi_parts.json").read_text(encoding="utf-8")
    part: dict[str, Any] = json.loads(text)[name]
    return part


def query_parameters(query: type[BaseModel], *, headers: dict[str, str]) -> list[dict[str, Any]]:
    """The fields of a pydantic model as query parameters, and headers by name and description."""
    fields = query.model_json_schema()["properties"]
    texts = {name: " ".join(schema.pop("description", "").split()) for name, schema in fields.items()}
    described = [("query", name, texts[name], schema) for name, schema in fields.items()]
    described += [("header", name, text, {"type": "string"}) for name, text in headers.items()]
    return [
        {"name": name, "in": place, "required": False, "description": text, "schema": schema}
        for place, name, text, schema in described
    ]


def responses(*errors: type[RequestError], example: str) -> dict[int | str, dict[str, Any]]:
    """The errors that a route may answer with, by status and each with an example.

    `example` is the one of its 200, by name as in `fixed_part`.
    """
    content = {"application/json": {"example": fixed_part(example)}}
    described: dict[int | str, dict[str, Any]] = {200: {"content": content}}
    for status, kinds in itertools.groupby(sorted(errors, key=lambda kind: kind.status), lambda kind: kind.status):
        texts = {kind.code: inspect.getdoc(kind) or "" for kind in kinds}
        described[status] = {
            "description": " ".join(texts.values()),
            "content": {
                "application/problem+json": {
                    "schema": {"$ref": "#/components/schemas/Problem"},
                    "examples": {
                        code: {"value": {**problem_members(status, code, text), "request_id": _REQUEST_ID}}
                        for code, text in texts.items()
                    },
                }
            },
        }
    return described
