"""Errors as HTTP answers: problem+json (RFC 9457), but `{"error": "..."}` where clients of other APIs expect that."""

import math
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from service.errors import InvalidParameter, Overloaded, RequestError, Unauthorized
from service.http import hints, security_headers

log = structlog.get_logger()

OF_OTHERS = ("/v2", "/hf/")
"""Paths, by prefix, whose errors are written as the Open Inference Protocol and Hugging Face write theirs."""


class Problem(BaseModel):
    """An error, as RFC 9457 describes it."""

    type: str
    """`urn:stridevit:` and the code."""
    title: str
    status: int
    detail: str
    code: str
    """Machine-readable name of the error, such as `overloaded`."""
    request_id: str | None = None
    retry_after_ms: int | None = None
    """With status 429: after how long a retry should succeed."""


def problem_members(status: int, code: str, detail: str) -> dict[str, Any]:
    """The members of RFC 9457, and the code."""
    title = HTTPStatus(status).phrase
    return {"type": f"urn:stridevit:{code}", "title": title, "status": status, "detail": detail, "code": code}


def problem(error: RequestError) -> dict[str, Any]:
    """An error as the members of a Problem."""
    body = problem_members(error.status, error.code, str(error))
    if isinstance(error, Overloaded):
        body["retry_after_ms"] = max(1, math.ceil(error.retry_after_s * 1000))
    return body


def error_response(request: Request, error: RequestError) -> JSONResponse:
    """The whole answer to a request that failed with `error`."""
    headers: dict[str, str] = {}
    if isinstance(error, Overloaded):
        # The header takes whole seconds only.
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return _response(request, problem(error), headers)


def install(app: FastAPI) -> None:
    """Map every error of the application to an answer."""

    async def on_request_error(request: Request, error: RequestError) -> JSONResponse:
        return error_response(request, error)

    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "-")
        headers, detail = dict(error.headers or {}), error.detail
        if error.status_code == HTTPStatus.NOT_FOUND:
            detail = f"there is nothing at this path; {hints.for_path(request.url.path)}"
        elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED and "Allow" in headers:
            allowed = sorted({*headers["Allow"].split(", "), *(["HEAD"] if "GET" in headers["Allow"] else [])})
            headers["Allow"] = ", ".join(allowed)
            detail = f"{request.method} is not offered here, but {' and '.join(allowed)}"
            if hint := hints.for_path_of_others(request.url.path):
                detail = f"{detail}; {hint}"
        return _response(request, problem_members(error.status_code, code, detail), headers)

    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        detail = "; ".join(f"{'.'.join(str(place) for place in item['loc'])}: {item['msg']}" for item in error.errors())
        return error_response(request, InvalidParameter(detail))

    async def on_bug(request: Request, error: Exception) -> JSONResponse:
        request_id = request.scope["state"]["request_id"]
        log.error("unhandled error", path=request.url.path, request_id=request_id, exc_info=error)
        detail = "a fault of the service: its log has the details under this request's id"
        # This answer is sent from outside the middleware that adds these headers to all others.
        headers = {
            "X-Request-ID": request_id,
            **{name.decode(): value.decode() for name, value in security_headers.API},
        }
        return _response(request, problem_members(500, "internal-server-error", detail), headers)

    # Starlette's type of a handler accepts any exception.
    app.add_exception_handler(RequestError, on_request_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, on_http_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, on_invalid)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, on_bug)


def _response(request: Request, body: dict[str, Any], headers: dict[str, str]) -> JSONResponse:
    if request.url.path.startswith(OF_OTHERS):
        return JSONResponse({"error": body["detail"]}, status_code=body["status"], headers=headers)
    request_id = request.scope.get("state", {}).get("request_id")
    return JSONResponse(
        {**body, "request_id": request_id},
        status_code=body["status"],
        headers=headers,
        media_type="application/problem+json",
    )
