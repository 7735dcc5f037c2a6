"""Under pressure: what is refused before a connection is made of it, and that all else takes the ordinary way."""

import socket
from collections.abc import Iterator

import pytest
from starlette.types import Scope

from service.http.refusal import Refusal
from tests.processes import wait_until
from tests.service.http.server.bench import Bench, answers, one_answer, serving

REFUSED = b"POST /refused HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc"
GET = b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"


@pytest.fixture
def judged() -> list[str]:
    """Paths that were judged."""
    return []


@pytest.fixture
def bench(judged: list[str]) -> Iterator[Bench]:
    def refuse(scope: Scope) -> Refusal | None:
        judged.append(scope["path"])
        return Refusal(429, b"content-length: 2\r\n", b"no") if scope["path"] == "/refused" else None

    with serving(refuse=refuse, pressed=lambda: True) as bench:
        yield bench


def sent_before_it_is_accepted(bench: Bench, *requests: bytes, half_close: bool = False) -> list[socket.socket]:
    """Clients that have sent all by the time that their connections are accepted: the event loop stands still."""
    with bench.connect() as blocking:
        blocking.sendall(b"GET /block HTTP/1.1\r\nHost: h\r\n\r\n")
        wait_until(lambda: bench.app.scopes != [])
        clients = [bench.connect() for _ in requests]
        for client, request in zip(clients, requests, strict=True):
            client.sendall(request)
            if half_close:
                client.shutdown(socket.SHUT_WR)
        bench.app.released.set()
        one_answer(blocking)
    return clients


def test_a_whole_request_is_answered_and_its_connection_closed(bench: Bench) -> None:
    clients = sent_before_it_is_accepted(bench, *[REFUSED] * 5)
    for client in clients:
        with client:
            ((status, headers, body),) = answers(client)
        assert (status, headers["connection"], body, "date" in headers) == (429, "close", b"no", True)
    assert [scope["path"] for scope in bench.app.scopes] == ["/block"]
    wait_until(lambda: bench.closed("refused") == 5)
    assert bench.closed("answered") == 0, "nothing was made of them"


def test_all_else_takes_the_ordinary_way_and_is_judged_once(bench: Bench, judged: list[str]) -> None:
    whole, halved, two, garbage, none = sent_before_it_is_accepted(
        bench, LAST, REFUSED[:-1], GET + LAST, b"garbage\r\n\r\n", b""
    )
    with whole, halved, two, garbage, none:
        assert [answer[0] for answer in answers(whole)] == [200]
        status, headers, _ = one_answer(halved)
        assert (status, headers["connection"]) == (429, "keep-alive")
        halved.sendall(b"c" + LAST)
        assert [answer[0] for answer in answers(halved)] == [200]
        assert [answer[0] for answer in answers(two)] == [200, 200]
        assert [answer[0] for answer in answers(garbage)] == [400]
        none.sendall(LAST)
        assert [answer[0] for answer in answers(none)] == [200]
    assert judged.count("/last") == 3, "the pipelined one is left to the application"
    assert judged.count("/a") == 1


def test_a_request_before_the_end_of_all_that_its_client_sends_is_answered(bench: Bench) -> None:
    for client in sent_before_it_is_accepted(bench, GET, REFUSED, half_close=True):
        with client:
            assert [answer[0] for answer in answers(client)] in ([200], [429])


def test_a_large_body_is_read_as_fast_as_the_application_reads(bench: Bench) -> None:
    head = b"POST /a HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 3000000\r\n\r\n"
    (client,) = sent_before_it_is_accepted(bench, head + b"x" * 100_000)
    with client:
        client.sendall(b"x" * 2_900_000)
        ((status, _, body),) = answers(client)
    assert (status, b'"body": 3000000' in body) == (200, True)


def test_clients_that_left_cost_nothing(bench: Bench) -> None:
    for client in sent_before_it_is_accepted(bench, REFUSED, LAST, b""):
        client.close()
    assert bench.ask(LAST)[0][0] == 200
    wait_until(lambda: len(bench.server.connections.open) <= 1)
