"""What a connection takes, what it refuses, and what it bounds."""

import http.client
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.types import Scope

from service.http import security_headers
from service.http.refusal import Refusal
from service.http.server.protocol import MAX_PIPELINED
from tests.processes import PATIENCE_SECONDS, wait_until
from tests.service.http.server.bench import Bench, answers, one_answer, pause, serving

GET = b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
POST = b"POST /a HTTP/1.1\r\nHost: h\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with serving() as running:
        yield running


def said(answer: tuple[int, dict[str, str], bytes]) -> tuple[str, str, int]:
    """What the application was asked."""
    assert answer[0] == 200
    body = json.loads(answer[2])
    return body["method"], body["path"], body["body"]


def test_requests_follow_each_other_on_one_connection(bench: Bench) -> None:
    found = bench.ask(GET, POST + b"Content-Length: 3\r\n\r\nabc", CHUNKED + b"2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n", LAST)
    assert [said(answer) for answer in found] == [
        ("GET", "/a", 0),
        ("POST", "/a", 3),
        ("POST", "/a", 5),
        ("GET", "/last", 0),
    ]
    assert [answer[1]["connection"] for answer in found] == ["keep-alive"] * 3 + ["close"]
    assert found[0][1]["keep-alive"] == "timeout=998"


def test_bytes_may_arrive_one_by_one(bench: Bench) -> None:
    request = CHUNKED + b"2;x=y\r\nab\r\n3\r\ncde\r\n0\r\nTrailer: t\r\n\r\n" + LAST
    found = bench.ask(*(request[at : at + 1] for at in range(len(request))))
    assert [said(answer) for answer in found] == [("POST", "/a", 5), ("GET", "/last", 0)]


def test_a_body_is_taken_as_fast_as_the_application_reads(bench: Bench) -> None:
    body = b"x" * 20_000_000
    found = bench.ask(POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert said(found[0]) == ("POST", "/a", len(body))


def test_trailers_are_not_headers(bench: Bench) -> None:
    bench.ask(CHUNKED + b"0\r\nX-API-Key: k\r\n\r\n", LAST)
    assert [name for name, _ in bench.app.scopes[-2]["headers"]] == [b"host", b"transfer-encoding"]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /%b HTTP/1.1\r\nHost: h\r\n\r\n" % (b"u" * 1100), 414),
        (b"GET /%b HTTP/1.1\r\nHost: h\r\n\r\n" % (b"u" * 500_000), 414),
        (b"GET /a?%b HTTP/1.1\r\nHost: h\r\n\r\n" % (b"u" * 5000), 414),
        (b"GET /a HTTP/1.1\r\nHost: h\r\nX: %b\r\n\r\n" % (b"v" * 4100), 431),
        (b"GET /a HTTP/1.1\r\nHost: h\r\nX: %b\r\n\r\n" % (b"v" * 5_000_000), 431),
        (b"GET /a HTTP/1.1\r\nHost: h\r\n%b\r\n" % (b"X: v\r\n" * 30), 431),
        (b"GET /a HTTP/1.1\r\nHost: h\r\n%b\r\n" % (b"X: v\r\n" * 1_000_000), 431),
        (b"GET /a HTTP/1.1\r\nHost: h\r\n%b: v\r\n\r\n" % (b"n" * 500_000), 431),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_a_long_head_is_refused_however_it_arrives(bench: Bench, head: bytes, status: int, at_once: bool) -> None:
    asked = len(bench.app.scopes)
    with bench.connect() as client:
        if at_once:
            client.sendall(head)
        else:
            client.sendall(head[:100])
            pause()
            client.sendall(head[100:700])
            pause()
            client.sendall(head[700:])
        [(found, headers, body)] = answers(client)
    assert (found, headers["connection"]) == (status, "close")
    assert json.loads(body)["status"] == status
    assert len(bench.app.scopes) == asked


def test_a_head_just_within_the_limits_is_taken(bench: Bench) -> None:
    url, rest = b"/" + b"u" * 1023, b"".join(b"X-%02d: %b\r\n" % (number, b"v" * 70) for number in range(28))
    head = b"GET %b HTTP/1.1\r\nHost: h\r\nConnection: close\r\n%b\r\n" % (url, rest)
    assert bench.ask(head)[0][0] == 200
    assert bench.ask(*(head[at : at + 100] for at in range(0, len(head), 100)))[0][0] == 200


@pytest.mark.parametrize(
    "request_",
    [
        POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
        POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        POST + b"Content-Length: 3, 3\r\n\r\nabc",
        POST + b"Content-Length: -3\r\n\r\nabc",
        POST + b"Content-Length: +3\r\n\r\nabc",
        POST + b"Content-Length: 0x3\r\n\r\nabc",
        POST + b"Content-Length : 3\r\n\r\nabc",
        POST + b"Content-Length: 99999999999999999999999\r\n\r\nabc",
        POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        b"POST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /a HTTP/1.1\nHost: h\n\n",
        b"GET /a HTTP/1.1\r\nHost: h\nX: y\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost: h\rX: y\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost: h\r\n folded\r\n\r\n",
        b"GET /a HTTP/1.1\r\n Host: h\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost: h\0\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost\r\n\r\n",
        b"GET /a HTTP/1.1\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost: h\r\nHost: i\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET /\xc3\xa9 HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET /a HTTP/2.0\r\nHost: h\r\n\r\n",
        b"GET /a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT h:80 HTTP/1.1\r\nHost: h\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(bench: Bench, request_: bytes) -> None:
    asked = len(bench.app.scopes)
    [(status, headers, body)] = bench.ask(request_ + LAST)
    assert (status, headers["connection"], headers["content-type"]) == (400, "close", "application/problem+json")
    assert json.loads(body)["code"] == "bad-request"
    assert len(bench.app.scopes) == asked


@pytest.mark.parametrize(
    "body",
    [
        b"-1\r\n\r\n",
        b"0x3\r\nabc\r\n0\r\n\r\n",
        b"3\nabc\n0\n\n",
        b"2\r\nabc\r\n0\r\n\r\n",
        b"fffffffffffffffff\r\nabc\r\n0\r\n\r\n",
        b"3;a\nb\r\nabc\r\n0\r\n\r\n",
    ],
)
def test_a_damaged_chunked_body_is_refused_and_ends_its_connection(bench: Bench, body: bytes) -> None:
    [(status, headers, _)] = bench.ask(CHUNKED + body + LAST)
    assert (status, headers["connection"]) == (400, "close")


@pytest.mark.parametrize(
    "endless", [b"1;" + b"e" * 1_000_000, b"1\r\nx\r\n0\r\n" + b"T: t\r\n" * 500_000], ids=["extension", "trailers"]
)
def test_what_frames_a_chunked_body_is_bounded(bench: Bench, endless: bytes) -> None:
    [(status, _, body)] = bench.ask(CHUNKED + endless)
    assert status == 400
    assert b"too long" in body


def test_many_small_chunks_are_a_body_like_any_other(bench: Bench) -> None:
    found = bench.ask(CHUNKED + b"1\r\nx\r\n" * 50_000 + b"0\r\n\r\n" + LAST)
    assert said(found[0]) == ("POST", "/a", 50_000)


UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"


@pytest.mark.parametrize(
    ("framing", "body", "length"),
    [
        (b"Content-Length: 5\r\n", b"abcde", 5),
        (b"Transfer-Encoding: chunked\r\n", b"5\r\nabcde\r\n0\r\n\r\n", 5),
        (b"Content-Length: 0\r\n", b"", 0),
        (b"", b"", 0),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_an_upgrade_is_ignored_and_takes_nothing_from_the_body(
    bench: Bench, framing: bytes, body: bytes, length: int, at_once: bool
) -> None:
    head = POST + UPGRADE + framing + b"\r\n"
    found = bench.ask(head + body + LAST) if at_once else bench.ask(head, body, LAST)
    assert [said(answer) for answer in found] == [("POST", "/a", length), ("GET", "/last", 0)]


def test_a_websocket_handshake_is_a_plain_request(bench: Bench) -> None:
    handshake = b"GET /a HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert [said(answer)[1] for answer in bench.ask(handshake, LAST)] == ["/a", "/last"]


def test_curl_with_http2_sends_its_body(bench: Bench, tmp_path: Path) -> None:
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    (tmp_path / "body").write_bytes(b"x" * 300_000)
    command = ["curl", "-sS", "--noproxy", "*", "--http2", "--data-binary", "@body", f"http://127.0.0.1:{bench.port}/a"]
    ended = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=PATIENCE_SECONDS)
    assert json.loads(ended.stdout)["body"] == 300_000


JAVA = """
import java.net.URI;
import java.net.http.*;
public class Ask {
    public static void main(String[] arguments) throws Exception {
        var client = HttpClient.newHttpClient();
        for (int size : new int[] {3, 300_000, 0}) {
            var body = HttpRequest.BodyPublishers.ofByteArray(new byte[size]);
            var request = HttpRequest.newBuilder(URI.create(arguments[0])).POST(body).build();
            System.out.println(client.send(request, HttpResponse.BodyHandlers.ofString()).body());
        }
    }
}
"""


def test_the_default_client_of_java_sends_its_body(bench: Bench, tmp_path: Path) -> None:
    if not shutil.which("java"):
        pytest.skip("needs a JDK (Debian: openjdk-17-jdk-headless)")
    (tmp_path / "Ask.java").write_text(JAVA)
    command = ["java", "Ask.java", f"http://127.0.0.1:{bench.port}/a"]
    ended = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    if "java.compiler" in ended.stderr:
        pytest.skip("needs a JDK: this java cannot compile")
    assert [json.loads(line)["body"] for line in ended.stdout.splitlines()] == [3, 300_000, 0], ended.stderr


def test_pipelined_requests_are_answered_in_order(bench: Bench) -> None:
    paths = [f"/{number}" for number in range(MAX_PIPELINED)]
    found = bench.ask(b"".join(GET.replace(b"/a", path.encode()) for path in paths) + LAST)
    assert [said(answer)[1] for answer in found] == [*paths, "/last"]


def test_too_many_pipelined_requests_are_answered_so_far_and_the_last_answer_says_so(bench: Bench) -> None:
    asked = len(bench.app.scopes)
    found = bench.ask(GET * 5000)
    assert MAX_PIPELINED <= len(found) < 5000
    assert [answer[1]["connection"] for answer in found] == ["keep-alive"] * (len(found) - 1) + ["close"]
    assert len(bench.app.scopes) - asked == len(found)


def test_garbage_behind_a_request_is_refused_after_its_answer(bench: Bench) -> None:
    found = bench.ask(GET + b"\x00\x01garbage")
    assert [answer[0] for answer in found] == [200, 400]


def test_what_follows_connection_close_is_ignored(bench: Bench) -> None:
    assert [said(answer)[1] for answer in bench.ask(LAST + GET)] == ["/last"]


def test_expect_100_continue_asks_for_the_body(bench: Bench) -> None:
    with bench.connect() as client:
        client.sendall(POST + b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"abc" + LAST)
        assert [said(answer)[2] for answer in answers(client)] == [3, 0]


def test_http_1_0_is_not_sent_100_continue(bench: Bench) -> None:
    with bench.connect() as client:
        client.sendall(b"POST /a HTTP/1.0\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        pause()  # the application waits for the body
        client.sendall(b"abc")
        received = b"".join(iter(lambda: client.recv(1000), b""))
    assert received.startswith(b"HTTP/1.1 200 ")


def test_a_body_that_was_never_asked_for_ends_the_connection(bench: Bench) -> None:
    head = b"POST /unread HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"
    [(status, headers, _)] = bench.ask(head)
    assert (status, headers["connection"]) == (200, "close")


def test_http_1_0_ends_with_its_answer_or_stays_if_asked(bench: Bench) -> None:
    [(_, headers, _)] = bench.ask(b"GET /a HTTP/1.0\r\n\r\n")
    assert headers["connection"] == "close"
    found = bench.ask(b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", LAST)
    assert [answer[1]["connection"] for answer in found] == ["keep-alive", "close"]
    # Chunks are unknown to it: the end of the connection is the end of the answer.
    [(_, headers, body)] = bench.ask(b"GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert "transfer-encoding" not in headers
    assert json.loads(body)["path"] == "/stream"


def test_head_and_answers_of_unknown_length(bench: Bench) -> None:
    first, second, _ = bench.ask(
        b"HEAD /a HTTP/1.1\r\nHost: h\r\n\r\n"[:0] + b"GET /stream HTTP/1.1\r\nHost: h\r\n\r\n", GET, LAST
    )
    assert first[1]["transfer-encoding"] == "chunked"
    assert (said(first)[1], said(second)[1]) == ("/stream", "/a")
    client = http.client.HTTPConnection("127.0.0.1", bench.port)
    client.request("HEAD", "/a")
    answer = client.getresponse()
    assert (answer.status, answer.read(), int(answer.headers["content-length"]) > 0) == (200, b"", True)
    client.close()


def test_a_fault_of_the_application_is_a_500_that_ends_the_connection(bench: Bench) -> None:
    [(status, headers, _)] = bench.ask(b"GET /fail HTTP/1.1\r\nHost: h\r\n\r\n")
    assert (status, headers["connection"]) == (500, "close")


@pytest.mark.parametrize(
    ("request_", "status"), [(b"GET /fail HTTP/1.1\r\nHost: h\r\n\r\n", 500), (b"\x00\x01garbage", 400)]
)
def test_answers_of_the_connection_itself_have_the_security_headers(bench: Bench, request_: bytes, status: int) -> None:
    [(found, headers, _)] = bench.ask(request_)
    assert found == status
    expected = {name.decode(): value.decode() for name, value in security_headers.API}
    assert {name: headers.get(name) for name in expected} == expected


def test_an_answer_reaches_a_client_that_is_still_sending(bench: Bench) -> None:
    with bench.connect() as client:
        client.sendall(b"POST /unread HTTP/1.1\r\nHost: h\r\nContent-Length: 40000000\r\n\r\n" + b"x" * 1_000_000)
        # A reset would destroy the answer that waits in the client's socket.
        for _ in range(30):
            client.sendall(b"x" * 1_000_000)
        [(status, headers, _)] = answers(client)
    assert (status, headers["connection"]) == (200, "close")


def test_a_short_body_that_nobody_reads_keeps_the_connection(bench: Bench) -> None:
    unread = b"POST /unread HTTP/1.1\r\nHost: h\r\nContent-Length: 300000\r\n\r\n"
    found = bench.ask(unread + b"x" * 1000, b"x" * 299_000, LAST)
    assert [said(answer)[1] for answer in found] == ["/unread", "/last"]


def test_a_half_closed_request_is_answered(bench: Bench) -> None:
    with bench.connect() as client:
        client.sendall(b"GET /wait HTTP/1.1\r\nHost: h\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        wait_until(lambda: "/wait" in [scope["path"] for scope in bench.app.scopes])
        time.sleep(0.6)  # two sweeps must not take it for closed
        bench.app.released.set()
        found = answers(client)
    bench.app.released.clear()
    assert said(found[-1])[1] == "/wait"
    assert bench.app.disconnected == []


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_client_that_closes_in_the_middle_of_a_streamed_answer_is_noticed_before_more_of_it_is_sent(
    loop: str,
) -> None:
    with serving(loop=loop) as bench:
        with bench.connect() as client:
            client.sendall(b"GET /trickle HTTP/1.1\r\nHost: h\r\n\r\n")
            received = b""
            while not received.endswith(b"first \r\n"):
                received += client.recv(1 << 16)
        wait_until(lambda: bench.app.disconnected == ["/trickle"])
        assert bench.app.scopes[-1]["state"]["client"].left


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_half_closed_client_gets_the_rest_of_a_streamed_answer(loop: str) -> None:
    with serving(loop=loop) as bench, bench.connect() as client:
        client.sendall(b"GET /trickle HTTP/1.1\r\nHost: h\r\n\r\n")
        received = b""
        while not received.endswith(b"first \r\n"):
            received += client.recv(1 << 16)
        client.shutdown(socket.SHUT_WR)
        # What is sent to see whether it listens is the beginning of the next chunk.
        assert client.recv(1) == b"0"
        bench.app.released.set()
        rest = b"".join(iter(lambda: client.recv(1 << 16), b""))
        assert rest == b"4\r\nlast\r\n0\r\n\r\n"


@pytest.mark.parametrize("incomplete", [GET[:20], POST + b"Content-Length: 9\r\n\r\nab"], ids=["head", "body"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_request_before_an_incomplete_one_is_answered_after_the_half_close(loop: str, incomplete: bytes) -> None:
    with serving(loop=loop) as bench, bench.connect() as client:
        client.sendall(b"GET /wait HTTP/1.1\r\nHost: h\r\n\r\n" + incomplete)
        client.shutdown(socket.SHUT_WR)
        wait_until(lambda: bench.app.scopes != [])
        time.sleep(0.6)  # two sweeps must not take it for closed
        bench.app.released.set()
        assert [said(answer)[1] for answer in answers(client)] == ["/wait"]


def test_a_client_that_closed_its_connection_is_noticed(bench: Bench) -> None:
    with bench.connect() as client:
        client.sendall(b"GET /wait HTTP/1.1\r\nHost: h\r\n\r\n")
        wait_until(lambda: "/wait" in [scope["path"] for scope in bench.app.scopes])
    wait_until(lambda: bench.app.disconnected == ["/wait"])
    assert bench.app.scopes[-1]["state"]["client"].left
    bench.app.disconnected.clear()


def test_the_age_of_a_request_counts_from_the_first_byte_of_its_head(bench: Bench) -> None:
    with bench.connect() as client:
        heads = bench.server.connections.heads
        wait_until(lambda: not heads)
        before = time.perf_counter()
        client.sendall(GET[:5])
        wait_until(lambda: len(heads) == 1)
        between = time.perf_counter()
        client.sendall(GET[5:])
        one_answer(client)
        client.sendall(GET[:5])
        wait_until(lambda: len(heads) == 1)
        client.sendall(GET[5:])
        one_answer(client)
    first, second = (scope["state"]["first_byte_at"] for scope in bench.app.scopes[-2:])
    assert before < first < between < second


@pytest.mark.parametrize("body", [b"abc", b""], ids=["with its body", "before its body"])
def test_a_request_that_is_refused_by_its_head_never_reaches_the_application(body: bytes) -> None:
    def refuse(scope: Scope) -> Refusal | None:
        return Refusal(429, b"content-length: 2\r\n", b"no") if scope["path"] == "/refused" else None

    refused = b"POST /refused HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\n"
    with serving(refuse=refuse) as bench:
        with bench.connect() as client:
            for _ in range(2):
                client.sendall(refused + body)
                status, headers, said = one_answer(client)
                assert (status, said, headers["connection"]) == (429, b"no", "keep-alive")
                client.sendall(b"abc"[len(body) :])
            client.sendall(LAST)
            assert [answer[0] for answer in answers(client)] == [200]
        closing = refused.replace(b"Host", b"Connection: close\r\nHost")
        assert [answer[0] for answer in bench.ask(closing + body, b"abc"[len(body) :])] == [429]
        assert [scope["path"] for scope in bench.app.scopes] == ["/last"]
