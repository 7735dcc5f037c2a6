"""What is sent, and what becomes of rare answers: some without any I/O."""

import errno
from typing import Any

import httpx
import pytest

from stridevit import AsyncClient, Client, DeadlineExceeded, Rejected, Unreachable
from stridevit.calls import Calls
from tests.service.conftest import Clock
from tests.stridevit.stub import CLASSIFICATION, Reply, Stub, problem

URL = "http://127.0.0.1:8000"
DATE = "Sun, 06 Nov 1994 08:49:37 GMT"


def raised(reply: httpx.TransportError) -> Unreachable:
    """What a client raises in place of an answer."""
    steps = Calls(URL, None, 60, 0, Clock()).listing()
    next(steps)
    with pytest.raises(Unreachable) as caught:
        steps.send(reply)
    return caught.value


@pytest.mark.parametrize("address", ["http://127.0.0.1:port", "http://[::1", "http://\x00"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_an_address_that_cannot_be_taken_apart_is_told_how_to_write_it(address: str, kind: Any) -> None:
    with pytest.raises(ValueError, match=r"must look like http://127\.0\.0\.1:8000: Invalid"):
        kind(address)


def test_a_wrong_key_is_told_where_it_comes_from() -> None:
    with pytest.raises(ValueError, match=r"the API key \(STRIDEVIT_API_KEY or api_key\) has characters"):
        Client(api_key="ä")


@pytest.mark.parametrize("deadline_ms", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("call", ["classify", "compare"])
def test_a_deadline_that_is_none_is_refused_before_anything_is_sent(deadline_ms: float, call: str, stub: Stub) -> None:
    with Client(stub.url) as client, pytest.raises(ValueError, match="a deadline of at most 86400 s"):
        getattr(client, call)(b"image", deadline_ms=deadline_ms)
    assert stub.asked == []


def test_a_picture_is_never_sent_as_anything_else(stub: Stub) -> None:
    with Client(stub.url) as client:
        client.classify(b'{"image": "a file that looks like JSON"}')
        client.classify([b"one", b"two"])
        stub.replies = [Reply(body=b'{"event": "end", "request_id": "r"}')]
        client.compare(b"{}")
    kinds = [asked.headers["content-type"].partition(";")[0] for asked in stub.asked]
    assert kinds == ["application/octet-stream", "multipart/form-data", "application/octet-stream"]


def test_an_answer_that_arrives_too_slowly_is_left_at_the_deadline(stub: Stub) -> None:
    clock = Clock()

    def pass_time() -> None:
        clock.now += 10

    stub.replies = [Reply(body=CLASSIFICATION, between=pass_time)]
    with Client(stub.url, clock=clock) as client:
        with pytest.raises(DeadlineExceeded, match="within 400000 ms"):
            client.classify(b"image", deadline_ms=400_000)
        stub.replies = [Reply(body=CLASSIFICATION)]
        assert client.classify(b"image", deadline_ms=400_000).model == "m"  # another connection


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_proxy_before_a_service_that_starts_is_waited_for(status: int, stub: Stub) -> None:
    stub.replies = [Reply(status, b"<html>"), Reply(status, b"<html>"), Reply(body={"status": "ready"})]
    pauses: list[float] = []
    with Client(stub.url, sleep=pauses.append) as client:
        client.wait_ready(400)
    assert (len(stub.asked), len(pauses)) == (3, 2)


def test_what_waiting_cannot_mend_ends_it(stub: Stub) -> None:
    stub.replies = [Reply(404, b"<html>")]
    with Client(stub.url) as client, pytest.raises(Rejected, match="404"):
        client.wait_ready(400)


@pytest.mark.parametrize(
    ("told", "date", "least", "most"),
    [
        ("3", DATE, 3, 3.3),
        ("Sun, 06 Nov 1994 08:49:42 GMT", DATE, 5, 5.5),
        ("Sun, 06 Nov 1994 08:49:30 GMT", DATE, 0.05, 0.055),
        ("soon", DATE, 0.05, 0.1),
        (DATE, "no date", 0.05, 0.1),
        ("Sun, 06 Nov 1994 08:49:42 -0000", DATE, 0.05, 0.1),
    ],
    ids=["seconds", "date", "past", "text", "without the answer's date", "without a zone"],
)
def test_a_pause_is_what_retry_after_says(told: str, date: str, least: float, most: float, stub: Stub) -> None:
    stub.replies = [Reply(503, b"", {"Retry-After": told, "Date": date}), Reply(body=CLASSIFICATION)]
    pauses: list[float] = []
    with Client(stub.url, sleep=pauses.append) as client:
        client.classify(b"image")
    assert len(pauses) == 1
    assert least <= pauses[0] <= most


def test_a_pause_below_zero_is_none(stub: Stub) -> None:
    stub.replies = [problem(429, "overloaded", retry_after_ms=-5), Reply(body=CLASSIFICATION)]
    with Client(stub.url) as client:  # time.sleep itself refuses to sleep less than nothing
        assert client.classify(b"image").model == "m"


def test_a_broken_connection_has_a_reason_and_a_fix() -> None:
    message = str(raised(httpx.ReadError("")))
    assert "broke: ReadError. See in the service's log whether it ended, then call again (unreachable)" in message


def test_too_many_open_files_are_not_a_service_that_is_missing() -> None:
    error = httpx.ConnectError("All connection attempts failed")
    error.__cause__ = OSError("All connection attempts failed")
    error.__cause__.__cause__ = OSError(errno.EMFILE, "Too many open files")
    message = str(raised(error))
    assert "too many files open. Raise its limit with ulimit -n, or make fewer calls at once (--at-once)" in message
    assert "stridevit serve" not in message
