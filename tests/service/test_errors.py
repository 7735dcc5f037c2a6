"""Statuses and codes of errors are part of the API: renaming a class must not change them."""

import inspect

import pytest
from fastapi import Request

from service import errors
from service.http.problems import error_response, problem

API = {
    "bad-image": 400,
    "bad-request": 400,
    "body-too-large": 413,
    "body-too-slow": 408,
    "client-disconnected": 408,
    "deadline-exceeded": 504,
    "forbidden": 403,
    "head-too-large": 431,
    "head-too-slow": 408,
    "invalid-parameter": 422,
    "key-limited": 429,
    "model-fault": 500,
    "no-suitable-model": 422,
    "not-ready": 503,
    "overloaded": 429,
    "too-many-connections": 503,
    "too-many-pixels": 422,
    "unauthorized": 401,
    "unknown-model": 404,
    "unsupported-image": 415,
    "url-too-long": 414,
}
KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.RequestError) and kind not in (errors.RequestError, errors.ImageError)
]


def new(kind: type[errors.RequestError]) -> errors.RequestError:
    if issubclass(kind, errors.Overloaded):
        return kind("why", reason="images", retry_after_s=1.5)
    return kind("why")


def test_every_request_error_has_its_own_code_and_the_status_of_the_api() -> None:
    assert {kind.code: kind.status for kind in KINDS} == API
    assert len(KINDS) == len(API)


@pytest.mark.parametrize("kind", KINDS)
def test_a_problem_names_its_error_for_programs_and_for_people(kind: type[errors.RequestError]) -> None:
    body = problem(new(kind))
    assert body["type"] == f"urn:stridevit:{kind.code}"
    assert (body["code"], body["status"], body["detail"]) == (kind.code, kind.status, "why")
    assert body.get("retry_after_ms") == (1500 if issubclass(kind, errors.Overloaded) else None)
    assert str(kind.status) in (errors.__doc__ or "").partition(f" {kind.__name__} ")[2].split("\n")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_v2_answers_with_a_message_only(kind: type[errors.RequestError]) -> None:
    request = Request({"type": "http", "method": "GET", "path": "/v2/models", "headers": [], "query_string": b""})
    answer = error_response(request, new(kind))
    assert (answer.status_code, bytes(answer.body)) == (kind.status, b'{"error":"why"}')
    assert answer.headers.get("retry-after") == ("2" if issubclass(kind, errors.Overloaded) else None)
    assert answer.headers.get("www-authenticate") == ("Bearer" if kind is errors.Unauthorized else None)
