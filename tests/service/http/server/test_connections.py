"""How many connections are open, what each may wait for, and how they end."""

import asyncio
import contextlib
import gc
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from service.http.server import server
from service.http.server.connections import RESERVED_FOR_PROBES, ConnectionLimits, Connections, Wait
from service.metrics import Metrics
from tests.processes import PATIENCE_SECONDS, wait_until
from tests.service.conftest import Clock, until
from tests.service.http.server.bench import LIMITS, Bench, answers, one_answer, serving

GET = b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n"
WAIT = b"GET /wait HTTP/1.1\r\nHost: h\r\n\r\n"
PROBE = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"


class Plain:
    """A connection that notes what is done to it."""

    def __init__(self, connections: Connections, *, unused: bool = True) -> None:
        self.done: list[tuple[str, str]] = []
        self._connections, self._unused = connections, unused
        self.served = connections.add(self)

    def wait(self, wait: Wait) -> "Plain":
        wait[self] = self._connections.clock()
        return self

    def unused(self) -> bool:
        return self._unused

    def expire(self, reason: str) -> None:
        self.done.append(("expire", reason))

    def end(self, reason: str) -> None:
        self.done.append(("end", reason))

    def close(self, reason: str) -> None:
        self.done.append(("close", reason))

    def abort(self, reason: str) -> None:
        self.done.append(("abort", reason))


@pytest.fixture
def clock() -> Clock:
    return Clock()


def made(clock: Clock, **limits: Any) -> Connections:
    return Connections(ConnectionLimits(**{**LIMITS, **limits}), Metrics(), clock=clock)


def test_what_waits_for_too_long_expires_and_nothing_else_does(clock: Clock) -> None:
    connections = made(clock, keep_alive_seconds=10.0, head_timeout_seconds=5.0, write_timeout_seconds=20.0)
    waits = (connections.idle, connections.heads, connections.unread)
    first = [Plain(connections).wait(wait) for wait in waits]
    clock.now += 4
    second = [Plain(connections).wait(wait) for wait in waits]
    clock.now += 1.5
    connections.sweep()
    assert [connection.done for connection in (*first, *second)] == [[], [("expire", "slow-head")], [], [], [], []]
    del connections.heads[first[1]]
    clock.now += 4.6
    connections.sweep()
    assert [connection.done for connection in (first[0], second[0], second[1])] == [
        [("expire", "idle")],
        [],
        [("expire", "slow-head")],
    ]
    clock.now += 10
    connections.sweep()
    assert [connection.done for connection in (first[2], second[2])] == [[("expire", "slow-reader")], []]


def test_without_room_the_connection_that_was_unused_for_longest_makes_place(clock: Clock) -> None:
    connections = made(clock, max_connections=3)
    oldest, busy, younger = Plain(connections), Plain(connections), Plain(connections)
    oldest.wait(connections.idle)
    clock.now += 5
    younger.wait(connections.idle)
    clock.now += 5
    new = Plain(connections)
    assert (oldest.done, busy.done, younger.done, new.served) == ([("close", "evicted")], [], [], True)
    assert connections.open == {busy, younger, new}


def test_a_connection_on_which_a_request_may_be_on_its_way_is_not_closed_for_another(clock: Clock) -> None:
    connections = made(clock, max_connections=2)
    with_a_request = Plain(connections, unused=False).wait(connections.idle)
    clock.now += 5
    just_made = Plain(connections).wait(connections.idle)
    assert not Plain(connections).served
    assert with_a_request.done == just_made.done == []


def test_without_place_for_probes_either_the_oldest_that_has_not_asked_goes(clock: Clock) -> None:
    connections = made(clock, max_connections=1)
    Plain(connections)
    beyond = [Plain(connections).wait(connections.beyond) for _ in range(RESERVED_FOR_PROBES)]
    new = Plain(connections)
    assert beyond[0].done == [("abort", "full")]
    assert all(connection.done == [] for connection in (*beyond[1:], new))


@pytest.fixture
def small() -> Iterator[Bench]:
    with serving(max_connections=4) as running:
        yield running


def closed_by_server(client: socket.socket) -> bool:
    client.settimeout(400)
    return client.recv(1) == b""


def test_idle_connections_make_room_and_busy_ones_do_not(small: Bench) -> None:
    idle = [small.connect() for _ in range(4)]
    for client in idle:
        client.sendall(GET)
        one_answer(client)
    connections = small.server.connections
    wait_until(lambda: len(connections.idle) == 4)
    # Younger ones might have a request on the way.
    connections.clock = lambda: time.monotonic() + 2
    connections.beyond.seconds = 1000.0
    new = [small.connect() for _ in range(4)]
    for client in new:
        client.sendall(WAIT)
    assert all(closed_by_server(client) for client in idle)
    wait_until(lambda: [scope["path"] for scope in small.app.scopes].count("/wait") == 4)
    late = small.connect()
    late.sendall(GET)
    [(status, headers, _)] = answers(late)
    assert (status, headers["connection"]) == (503, "close")
    late.close()
    wait_until(lambda: small.closed("too-many-connections") == 1)
    # Probes are answered while everything is in use, and the answers in work are not lost.
    probe = small.connect()
    probe.sendall(PROBE)
    assert answers(probe)[0][0] == 200
    small.app.released.set()
    assert [one_answer(client)[0] for client in new] == [200] * 4
    assert small.closed("evicted") == 4
    for client in (*idle, *new, probe):
        client.close()


def test_a_client_beyond_the_limit_that_asks_nothing_is_told_so(small: Bench) -> None:
    busy = [small.connect() for _ in range(4)]
    for client in busy:
        client.sendall(WAIT)
    wait_until(lambda: len(small.app.scopes) == 4)
    silent = small.connect()
    assert answers(silent)[0][0] == 503
    for client in (*busy, silent):
        client.close()


def test_a_slow_head_is_answered_408() -> None:
    with serving(head_timeout_seconds=0.1) as bench, bench.connect() as client:
        client.sendall(GET)
        assert one_answer(client)[0] == 200
        client.sendall(GET[:20])
        [(status, headers, _)] = answers(client)
        assert (status, headers["connection"]) == (408, "close")
    assert bench.closed("head-too-slow") == 1


def test_an_idle_connection_ends_after_its_time() -> None:
    with serving() as bench, bench.connect() as client, bench.connect() as silent:
        client.sendall(GET)
        assert one_answer(client)[0] == 200
        bench.server.connections.idle.seconds = 0.1
        assert closed_by_server(client)
        assert closed_by_server(silent)
    wait_until(lambda: bench.closed("idle") == 2)


def test_a_request_that_arrives_while_its_idle_connection_expires_is_answered() -> None:
    """The time of a connection may pass before the event loop sees the request in its socket."""
    with serving(keep_alive_seconds=1000.0) as bench, bench.connect() as client:
        client.sendall(GET)
        assert one_answer(client)[0] == 200
        connections, done = bench.server.connections, threading.Event()

        def arrive_and_expire() -> None:
            client.sendall(GET)
            now = time.monotonic()
            connections.clock = lambda: now + 2000
            connections.sweep()
            connections.clock = time.monotonic
            done.set()

        # In one callback, so that the loop cannot read in between.
        bench.server.listeners[0].loop.call_soon_threadsafe(arrive_and_expire)
        assert done.wait(400)
        assert one_answer(client)[0] == 200


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_connection_that_its_client_resets_as_it_expires_does_not_stop_the_sweep(loop: str) -> None:
    with serving(loop=loop) as bench, bench.connect() as client:
        client.sendall(GET)
        assert one_answer(client)[0] == 200
        connections, swept = bench.server.connections, threading.Event()

        def reset_and_expire() -> None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            now = time.monotonic()
            connections.clock = lambda: now + 2000
            try:
                connections.sweep()
                swept.set()
            finally:
                connections.clock = time.monotonic

        # In one callback, so that the loop cannot see the reset in between.
        bench.server.listeners[0].loop.call_soon_threadsafe(reset_and_expire)
        wait_until(lambda: not connections.open)
        assert swept.is_set()


def test_a_failure_in_one_sweep_is_not_the_end_of_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(keep_alive_seconds=0.1) as bench:
        failed = threading.Event()

        def fail() -> None:
            monkeypatch.undo()
            failed.set()
            raise RuntimeError("a fault in one sweep")

        monkeypatch.setattr(bench.server.connections, "sweep", fail)
        assert failed.wait(PATIENCE_SECONDS)
        with bench.connect() as silent:
            assert closed_by_server(silent)


def test_a_client_that_does_not_read_its_answer_is_closed_and_its_request_ends() -> None:
    with serving(write_timeout_seconds=0.2) as bench, bench.connect() as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: h\r\n\r\n" * 3)
        wait_until(lambda: bench.closed("slow-reader") == 1)
        wait_until(lambda: not bench.server.server_state.tasks)


def test_while_draining_every_answer_is_the_last_of_its_connection() -> None:
    with serving() as bench, bench.connect() as client, bench.connect() as pipelining:
        client.sendall(GET)
        assert one_answer(client)[1]["connection"] == "keep-alive"
        bench.server.connections.draining = True
        client.sendall(GET)
        [(status, headers, _)] = answers(client)
        assert (status, headers["connection"]) == (200, "close")
        pipelining.sendall(GET * 3)
        assert [answer[1]["connection"] for answer in answers(pipelining)] == ["keep-alive", "keep-alive", "close"]


def test_connections_that_wait_to_be_accepted_when_listening_ends_are_answered() -> None:
    """The system resets them when a listening socket is closed: the server has to accept them before."""
    with serving() as bench, bench.connect() as blocking:
        blocking.sendall(b"GET /block HTTP/1.1\r\nHost: h\r\n\r\n")
        wait_until(lambda: bench.app.scopes != [])
        # While the event loop stands still.
        waiting = [bench.connect() for _ in range(40)]
        for client in waiting:
            client.sendall(GET)
        bench.server.should_exit = True
        bench.app.released.set()
        for client in (blocking, *waiting):
            with client:
                assert [answer[0] for answer in answers(client)] == [200]


def test_connections_made_until_listening_ends_are_answered_or_refused() -> None:
    """Clients connect all the time; none that got a connection may be left without an answer."""
    with serving() as bench:
        port, unanswered, answered, refused = bench.port, [0], [0], threading.Event()
        # None of them is quiet for too long because its thread had to wait for a core.
        now = time.monotonic()
        bench.server.connections.clock = lambda: now

        def ask() -> None:
            while not refused.is_set():
                try:
                    client = socket.create_connection(("127.0.0.1", port), timeout=400)
                except ConnectionRefusedError:
                    refused.set()
                    return
                with client:
                    try:
                        client.sendall(GET)
                        assert one_answer(client)[0] == 200
                        answered[0] += 1
                    except OSError:
                        unanswered[0] += 1

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: answered[0] > 50)
        bench.server.should_exit = True
        for thread in threads:
            thread.join(400)
        assert unanswered == [0]


def test_at_the_end_a_connection_is_closed_once_it_was_quiet_for_a_second(clock: Clock) -> None:
    connections = made(clock)
    unused, with_a_request = Plain(connections), Plain(connections, unused=False)
    unused.wait(connections.idle)
    with_a_request.wait(connections.idle)

    async def end() -> None:
        ended = asyncio.create_task(connections.finish(10))
        await asyncio.sleep(0.2)
        assert unused.done == []
        clock.now += 1
        await until(lambda: unused.done != [])
        assert (unused.done[0], with_a_request.done) == (("end", "drained"), [])
        connections.remove(unused, "drained")
        connections.remove(with_a_request, "client")
        assert await ended

    asyncio.run(end())


def test_at_the_end_of_the_time_connections_without_a_request_in_work_are_no_failure() -> None:
    large = b"POST /unread HTTP/1.1\r\nHost: h\r\nContent-Length: 40000000\r\n\r\n"
    with serving(graceful_seconds=0.3) as bench, contextlib.ExitStack() as stack:
        silent, idle, half_sent, lingering = (stack.enter_context(bench.connect()) for _ in range(4))
        idle.sendall(GET)
        one_answer(idle)
        half_sent.sendall(GET[:20])
        lingering.sendall(large)
        one_answer(lingering)
        connections = bench.server.connections
        wait_until(lambda: (len(connections.idle), len(connections.heads), len(connections.lingering)) == (2, 1, 1))
        bench.server.should_exit = True
        assert all(closed_by_server(client) for client in (silent, idle, half_sent, lingering))
        wait_until(lambda: bench.closed("drained") == 4)
    assert bench.left == []


def test_at_the_end_of_the_time_a_connection_with_bytes_to_read_is_not_taken_for_unused(clock: Clock) -> None:
    connections = made(clock)
    with_a_request = Plain(connections, unused=False).wait(connections.idle)
    assert not asyncio.run(connections.finish(0))
    assert with_a_request.done == []


def test_a_thread_that_hangs_does_not_keep_the_process_from_ending() -> None:
    """asyncio waits for the threads of its executor after all else has ended."""
    with serving(close_seconds=0.1) as bench:
        assert bench.ask(b"GET /thread HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")[0][0] == 200
        bench.server.should_exit = True
        wait_until(lambda: bench.left == [server.EXIT_ABORTED])


def test_what_does_not_end_in_time_is_aborted_with_a_status_of_its_own() -> None:
    with serving(graceful_seconds=0.3) as bench, bench.connect() as client:
        client.sendall(WAIT)
        wait_until(lambda: bench.app.scopes != [])
        bench.server.should_exit = True
        assert closed_by_server(client)
        wait_until(lambda: bench.left == [4])


def test_what_was_loaded_before_the_start_is_out_of_the_garbage_collector_s_sight() -> None:
    """It would take a part of a second to look at it, again and again."""
    with serving():
        assert gc.get_freeze_count() > 10_000
    assert gc.get_freeze_count() == 0
