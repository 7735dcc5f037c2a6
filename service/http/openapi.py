"""What /docs and /openapi.json say beyond FastAPI's own: parameters, bodies, examples, errors and security schemes."""

import inspect
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from pydantic import BaseModel

from service.errors import RequestError
from service.http.exchange import DEADLINE_HEADER, PRIORITY_HEADER
from service.http.problems import OF_OTHERS, problem_members

SECURITY = [
    Security(HTTPBearer(scheme_name="bearer", description="An API key, where keys are in use.", auto_error=False)),
    Security(APIKeyHeader(scheme_name="X-API-Key", name="X-API-Key", description="The same key.", auto_error=False)),
]
"""Declares the schemes for /docs; `service.http.auth` checks the keys before any route is found."""

_OIP_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/OipError"}}}
_PROBLEM = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
_REQUEST_ID = "c8c774003f9448b49c0964e4feeb8708"

HEADERS: dict[str, tuple[str, dict[str, Any]]] = {
    DEADLINE_HEADER: (
        "The same as `deadline_ms`; if both are given, the earlier deadline counts.",
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1e9},
    ),
    PRIORITY_HEADER: ("The same as `priority`.", {"type": "string", "enum": ["interactive", "batch"]}),
    "X-Request-ID": (
        "Returned with the answer and logged: 1 to 128 letters, digits, `_`, `.`, `:` and `-`. Another is replaced.",
        {"type": "string", "pattern": "^[A-Za-z0-9_.:-]{1,128}$"},
    ),
}
"""Headers of a request that asks for a classification, with their texts and schemas."""
INFER_HEADERS = {
    **HEADERS,
    "Inference-Header-Content-Length": (
        "Bytes of JSON before binary tensors; 0: the body is nothing but pixels.",
        {"type": "integer", "minimum": 0},
    ),
}


def fixed_part(name: str) -> dict[str, Any]:
    """A part of the documentation that is written out in `openapi_parts.json`."""
    text = Path(__file__).with_name("openapi_parts.json").read_text(encoding="utf-8")
    part: dict[str, Any] = json.loads(text)[name]
    return part


def query_parameters(query: type[BaseModel], *, headers: dict[str, tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The fields of a pydantic model as query parameters, and headers by name, with their texts and schemas."""
    fields = query.model_json_schema()["properties"]
    for schema in fields.values():
        # A query cannot say null: a parameter that is left out is null.
        for kind in schema.pop("anyOf", ()):
            if kind != {"type": "null"}:
                schema.update(kind)
        # Generated clients and /docs would send a default, which might contradict what the body asks for.
        if (default := schema.pop("default", None)) is not None:
            schema["description"] = f"{schema.get('description', '')} Default: {default}."
    texts = {name: " ".join(schema.pop("description", "").split()) for name, schema in fields.items()}
    described = [("query", name, texts[name], schema) for name, schema in fields.items()]
    described += [("header", name, text, schema) for name, (text, schema) in headers.items()]
    return [
        {"name": name, "in": place, "required": False, "description": text, "schema": schema}
        for place, name, text, schema in described
    ]


def described_by(path: str, **more: Any) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads its path itself: the path's parameters, and `more`."""
    known = fixed_part("path_parameters")
    return {**more, "parameters": [*map(known.get, re.findall(r"{(\w+)}", path)), *more.get("parameters", [])]}


def v2_responses(*errors: type[RequestError], success: dict[str, Any] | None = None) -> dict[int | str, dict[str, Any]]:
    """The errors that a route of /v2 or /hf may answer with, by status, and its 200 unless that is a JSON object."""
    described: dict[int | str, dict[str, Any]] = {200: success} if success else {}
    for kind in errors:
        text = inspect.getdoc(kind) or ""
        known = described.setdefault(kind.status, {"description": text, "content": _OIP_ERROR})
        if text not in known["description"]:
            known["description"] += f" {text}"
    return described


def install(app: FastAPI, *, keys_needed: bool, streamed: Sequence[type[BaseModel]] = ()) -> None:
    """Complete what FastAPI generates. Unless `keys_needed`, only loading and unloading need a key.

    `streamed`: the parts of streamed answers, whose schemas FastAPI cannot know.
    """
    generate, completed = app.openapi, None

    def openapi() -> dict[str, Any]:
        nonlocal completed
        schema = generate()
        if schema is not completed:
            _complete(schema, keys_needed=keys_needed, streamed=streamed)
            completed = schema
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(schema: dict[str, Any], *, keys_needed: bool, streamed: Sequence[type[BaseModel]]) -> None:
    """Give every operation an answer for any other error, and remove those that are never sent."""
    schemas = schema["components"]["schemas"]
    for part in streamed:
        described = part.model_json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
        for name, definition in {**described.pop("$defs"), part.__name__: described}.items():
            schemas.setdefault(name, definition)
    schemas.update(fixed_part("schemas"))
    for path, operations in schema["paths"].items():
        error = _OIP_ERROR if path.startswith(OF_OTHERS) else _PROBLEM
        for operation in operations.values():
            answers = operation["responses"]
            if "HTTPValidationError" in json.dumps(answers.get("422", {})):
                del answers["422"]
            if "security" in operation and not (keys_needed or path.startswith("/v2/repository/models/")):
                operation["security"].append({})
            answers["default"] = {"description": "Any other error.", "content": error}
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)


def responses(
    *errors: type[RequestError], example: str = "", success: dict[str, Any] | None = None
) -> dict[int | str, dict[str, Any]]:
    """The errors that a route may answer with, by status and each with an example.

    `example` names the example of its 200, as in `fixed_part`; or `success` describes its whole 200.
    """
    content = {"application/json": {"example": fixed_part(example)}} if example else {}
    described: dict[int | str, dict[str, Any]] = {200: success or {"content": content}}
    for status, kinds in itertools.groupby(sorted(errors, key=lambda kind: kind.status), lambda kind: kind.status):
        texts = {kind.code: inspect.getdoc(kind) or "" for kind in kinds}
        described[status] = {
            "description": " ".join(texts.values()),
            "content": {
                "application/problem+json": {
                    **_PROBLEM["application/problem+json"],
                    "examples": {
                        code: {"value": {**problem_members(status, code, text), "request_id": _REQUEST_ID}}
                        for code, text in texts.items()
                    },
                }
            },
        }
    return described
