"""Errors as HTTP answers: problem+json (RFC 9457) everywhere but under /v2, which wants `{"error": "..."}`."""

import math
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from service import errors

STATUS: dict[type[errors.RequestError], HTTPStatus] = {
    errors.BadRequest: HTTPStatus.BAD_REQUEST,
    errors.BadImage: HTTPStatus.BAD_REQUEST,
    errors.UnsupportedImage: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    errors.TooManyPixels: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.BodyTooSlow: HTTPStatus.REQUEST_TIMEOUT,
    errors.BodyTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.UnknownModel: HTTPStatus.NOT_FOUND,
    errors.NotReady: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.Overloaded: HTTPStatus.TOO_MANY_REQUESTS,
    errors.DeadlineExceeded: HTTPStatus.GATEWAY_TIMEOUT,
    errors.NoSuitableModel: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.InvalidParameter: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.Unauthorized: HTTPStatus.UNAUTHORIZED,
    errors.Forbidden: HTTPStatus.FORBIDDEN,
    # Nobody reads it. 499 is what proxies write into their logs for this, but it is in no registry of statuses.
    errors.ClientDisconnected: HTTPStatus.REQUEST_TIMEOUT,
}

log = structlog.get_logger()


class Problem(BaseModel):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str | None = None
    retry_after_ms: int | None = None
    """Of a 429: when there should be room again, by the cost model."""


def problem(error: errors.RequestError) -> dict[str, Any]:
    """The members of RFC 9457 for an error: type, title, status, detail."""
    status = STATUS[type(error)]
    return {
        "type": f"urn:stridevit:{_slug(type(error).__name__)}",
        "title": status.phrase,
        "status": int(status),
        "detail": str(error),
    }


def answer(request: Request, error: errors.RequestError) -> JSONResponse:
    """The whole answer to a request that failed with `error`."""
    headers: dict[str, str] = {}
    body = problem(error)
    if isinstance(error, errors.Overloaded):
        # The header knows whole seconds only.
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        body["retry_after_ms"] = max(1, math.ceil(error.retry_after_s * 1000))
    if isinstance(error, errors.Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return _answer(request, body, headers)


def install(app: FastAPI) -> None:
    """Map every error of the app to an answer."""

    async def on_request_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, errors.RequestError)  # noqa: S101 (what it is registered for)
        return answer(request, error)

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)  # noqa: S101
        title = HTTPStatus(error.status_code).phrase
        body = {"type": "about:blank", "title": title, "status": error.status_code, "detail": error.detail}
        return _answer(request, body, dict(error.headers or {}))

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)  # noqa: S101
        detail = "; ".join(f"{'.'.join(str(place) for place in item['loc'])}: {item['msg']}" for item in error.errors())
        status = HTTPStatus.UNPROCESSABLE_ENTITY
        body = {
            "type": "urn:stridevit:invalid-parameter",
            "title": status.phrase,
            "status": int(status),
            "detail": detail,
        }
        return _answer(request, body)

    async def on_bug(request: Request, error: Exception) -> JSONResponse:
        request_id = request.scope["state"]["request_id"]
        log.error("unhandled error", path=request.url.path, request_id=request_id, exc_info=error)
        body = {
            "type": "about:blank",
            "title": "Internal Server Error",
            "status": 500,
            "detail": "a fault of the service: its log has the details under this request's id",
        }
        # This answer is sent from outside the middleware that adds the header to all others.
        return _answer(request, body, {"X-Request-ID": request_id})

    app.add_exception_handler(errors.RequestError, on_request_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(Exception, on_bug)


def _answer(request: Request, body: dict[str, Any], headers: dict[str, str] | None = None) -> JSONResponse:
    if request.url.path.startswith("/v2"):
        return JSONResponse({"error": body["detail"]}, status_code=body["status"], headers=headers)
    request_id = request.scope.get("state", {}).get("request_id")
    return JSONResponse(
        {**body, "request_id": request_id},
        status_code=body["status"],
        headers=headers,
        media_type="application/problem+json",
    )


def _slug(name: str) -> str:
    return "".join(f"-{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("-")
