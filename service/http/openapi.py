"""What /docs and /openapi.json say beside FastAPI's own: parameters, bodies, examples, errors and security schemes."""

import inspect
import itertools
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

CLASSIFY_BODY = {
    "required": True,
    "description": "The bytes of one image (any Content-Type), or multipart/form-data with one or many files.",
    "content": {
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}},
            }
        },
    },
}

CLASSIFICATION_EXAMPLE = {
    "model": "cifar100-csra-r2",
    "version": 4,
    "requested": "cifar100",
    "results": [{"predictions": [{"index": 42, "label": "leopard", "probability": 0.9123}]}],
    "choice": {
        "family": "cifar100",
        "reason": "deadline",
        "predicted_ms": 12.5,
        "skipped": [{"model": "cifar100-lsra-r4", "predicted_ms": 48.1}],
    },
    "timings_ms": {"read": 0.2, "decode": 1.9, "queue": 4.0, "inference": 2.1, "total": 8.6},
    "request_id": _REQUEST_ID,
}

MODELS_EXAMPLE = {
    "models": [
        {
            "name": "cifar100-csra-r2",
            "version": 4,
            "state": "ready",
            "default": False,
            "family": "cifar100",
            "architecture": "vit-xs",
            "variant": "csra-r2",
            "kv_tokens": 16,
            "tokens": 64,
            "params": 693924,
            "macs": 42100000,
            "precision": "fp32",
            "img_size": 32,
            "num_classes": 100,
            "accuracy": {"dataset": "cifar100", "split": "test", "n": 10000, "top1": 0.537, "top5": 0.8241},
        },
        {"name": "broken", "version": 1, "state": "unavailable", "reason": "model.onnx: missing"},
    ],
    "families": {"cifar100": ["cifar100-lsra-r4", "cifar100-csra-r2"]},
}

MODEL_EXAMPLE = {
    "name": "cifar100-csra-r2",
    "versions": [4],
    "version": 4,
    "manifest": {
        "name": "cifar100-csra-r2",
        "attention": {"variant": "csra-r2", "kv_tokens": 16},
        "...": "the rest of manifest.json",
    },
    "batch_ms": {"1": 1.2, "2": 2.1, "4": 4.2},
    "waiting": 0,
    "labels": ["apple", "aquarium_fish", "..."],
}


def query_parameters(query: type[BaseModel], *, headers: dict[str, str]) -> list[dict[str, Any]]:
    """The fields of a pydantic model as query parameters, and headers by name and description."""
    fields = query.model_json_schema()["properties"]
    described = [("query", name, schema.pop("description", ""), schema) for name, schema in fields.items()]
    described += [("header", name, text, {"type": "string"}) for name, text in headers.items()]
    return [
        {"name": name, "in": place, "required": False, "description": text, "schema": schema}
        for place, name, text, schema in described
    ]


def responses(*errors: type[RequestError], example: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """The errors that a route may answer with, by status and each with an example, and the `example` of its 200."""
    described: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {"example": example}}}}
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
