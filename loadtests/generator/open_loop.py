"""An open loop for rates that Locust cannot send from one core: Poisson arrivals, each at a tenth of its CPU time.

    python -m loadtests.generator.open_loop --host http://127.0.0.1:8000 --data photos --rates 400:10,4000:10

One thread, one selector, no task or greenlet for a request. A sample means the same as with Locust (locustfile.py):
latency counts from the moment at which the request was due, and an arrival is not sent while `--in-flight` requests are
in flight. A request takes the kept connection that was used last, or opens one if there is none; with
`--new-connections`, it always opens one.
"""

import argparse
import csv
import gc
import itertools
import resource
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

import httptools

from loadtests.generator.load_result import ANSWER_SECONDS, IN_FLIGHT, PROTOCOLS
from loadtests.generator.payload_cache import load
from loadtests.generator.payloads import read_payloads
from loadtests.generator.rates import Part, parse_rates, poisson_arrivals
from loadtests.generator.readers import PayloadError
from loadtests.generator.request_encoder import target
from loadtests.generator.samples import UNSENT, Sample

KEEP_SECONDS = 3.0
"""An idle connection is reused within this time, which is less than servers keep one."""
_READ_BYTES = 64 * 1024
_SWEEP_SECONDS = 1.0


def arrivals(parts: Sequence[Part], *, seed: str) -> Iterator[float]:
    """Seconds after the start at which requests are due; the rate of a part is its `first`."""
    begin = 0.0
    for number, part in enumerate(parts):
        for due in poisson_arrivals(part.first, seed=f"{seed}/{number}"):
            if due >= part.seconds:
                break
            yield begin + due
        begin += part.seconds


class Connection:
    """One connection, and the request on it; the parser calls its `on_` methods."""

    __slots__ = (
        "behind",
        "body",
        "due",
        "image",
        "keeps",
        "left",
        "model",
        "parser",
        "socket",
        "status",
        "used_at",
        "whole",
    )

    def __init__(self, opened: socket.socket) -> None:
        self.socket = opened
        self.left = memoryview(b"")
        self.used_at = 0.0

    def begin(self, image: int, due: float, behind: float, request: bytes) -> None:
        """Take a request."""
        self.image, self.due, self.behind = image, due, behind
        self.left = memoryview(request)
        self.parser = httptools.HttpResponseParser(self)
        self.status, self.model, self.body, self.whole, self.keeps = 0, "", b"", False, False

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-stridevit-model":
            self.model = value.decode("latin-1")

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.status = self.parser.get_status_code()
        self.whole, self.keeps = self.status >= 200, self.parser.should_keep_alive()


class OpenLoop:
    """Sends requests when they are due. Times are of `time.perf_counter`."""

    def __init__(
        self,
        address: tuple[str, int],
        requests: Sequence[bytes],
        *,
        in_flight: int,
        keep: bool,
        keep_refusals: bool = False,
    ) -> None:
        """`keep`: reuse connections; `keep_refusals`: also keep the bodies of answers with 429."""
        self._address, self._requests, self._most, self._keep = address, requests, in_flight, keep
        self._family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        self._selector = selectors.DefaultSelector()
        self._flying: set[Connection] = set()
        self._idle: deque[Connection] = deque()
        self._unix_offset = time.time() - time.perf_counter()
        self._stopped = False
        self._keep_refusals = keep_refusals
        self.samples: list[Sample] = []
        self.refusals: list[bytes] = []
        """For each sample, the body of an answer with 429, if it is kept; otherwise empty."""

    def stop(self) -> None:
        """Send no more, and wait no longer."""
        self._stopped = True

    def run(self, dues: Iterator[float]) -> None:
        """Send everything, and wait until all is answered."""
        images = itertools.cycle(range(len(self._requests)))
        begin = sweep_at = time.perf_counter()
        due = next(dues, None)
        while (due is not None or self._flying) and not self._stopped:
            now = time.perf_counter()
            while due is not None and begin + due <= now:
                self._send(next(images), begin + due)
                due = next(dues, None)
                now = time.perf_counter()
            if now >= sweep_at:
                self._sweep(now)
                sweep_at = now + _SWEEP_SECONDS
            wait = sweep_at - now if due is None else max(0.0, min(begin + due, sweep_at) - now)
            for key, events in self._selector.select(wait):
                self._continue(key.data, events)
        for connection in (*self._flying, *self._idle):
            connection.socket.close()
        self._selector.close()

    def _send(self, image: int, due: float) -> None:
        if len(self._flying) >= self._most:
            behind = time.perf_counter() - due
            self._record(image, due, behind, behind, UNSENT, "")
            return
        connection = self._idle.pop() if self._idle else None
        behind = time.perf_counter() - due
        if connection is None:
            opened = socket.socket(self._family, socket.SOCK_STREAM)
            opened.setblocking(False)
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            opened.connect_ex(self._address)
            connection = Connection(opened)
            connection.begin(image, due, behind, self._requests[image])
            self._selector.register(opened, selectors.EVENT_READ | selectors.EVENT_WRITE, connection)
            self._flying.add(connection)
            return
        connection.begin(image, due, behind, self._requests[image])
        self._flying.add(connection)
        self._write(connection)
        if connection.left:
            self._selector.modify(connection.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, connection)

    def _continue(self, connection: Connection, events: int) -> None:
        if events & selectors.EVENT_WRITE and connection.left:
            self._write(connection)
            if connection in self._flying and not connection.left:
                self._selector.modify(connection.socket, selectors.EVENT_READ, connection)
        if events & selectors.EVENT_READ and connection.socket.fileno() >= 0:
            self._read(connection)

    def _write(self, connection: Connection) -> None:
        try:
            connection.left = connection.left[connection.socket.send(connection.left) :]
        except BlockingIOError:
            return
        except OSError:
            # The server may have answered before it closed the connection: that answer is still read.
            connection.left = memoryview(b"")

    def _read(self, connection: Connection) -> None:
        try:
            data = connection.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if connection not in self._flying:
            self._idle.remove(connection)
            self._close(connection)
            return
        try:
            connection.parser.feed_data(data)
        except httptools.HttpParserError:
            data = b""
        if connection.whole or not data:
            self._answered(connection)

    def _answered(self, connection: Connection) -> None:
        now = time.perf_counter()
        self._flying.remove(connection)
        due, status = connection.due, connection.status if connection.whole else 0
        times = now - due, connection.behind
        self._record(connection.image, due, *times, status, connection.model, bytes(connection.body))
        if self._keep and connection.whole and connection.keeps and not connection.left:
            connection.used_at = now
            self._idle.append(connection)
        else:
            self._close(connection)

    def _close(self, connection: Connection) -> None:
        self._selector.unregister(connection.socket)
        connection.socket.close()

    def _sweep(self, now: float) -> None:
        """Close connections that were idle for too long, and give up requests unanswered for too long."""
        while self._idle and now - self._idle[0].used_at > KEEP_SECONDS:
            self._close(self._idle.popleft())
        for connection in [one for one in self._flying if now - one.due > ANSWER_SECONDS]:
            connection.whole = False
            self._answered(connection)

    def _record(
        self, image: int, due: float, latency: float, behind: float, status: int, model: str, body: bytes = b""
    ) -> None:
        times = round(due + self._unix_offset, 6), round(latency * 1000, 3), status, round(behind * 1000, 3)
        self.samples.append(Sample(*times, model, image, None))
        self.refusals.append(body if self._keep_refusals and status == 429 else b"")


def main() -> None:
    """Send, then write the samples; after SIGTERM or Ctrl-C, those until then."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", required=True, help="URL of the server")
    parser.add_argument("--model", default="", help="name of a model or a family [the server's default]")
    parser.add_argument("--data", type=Path, help="folder of images, of class folders, or of parquet files")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="v1", help="v1: image files; v2: binary tensors [v1]")
    parser.add_argument("--rates", required=True, help="RATE:SECONDS,...")
    parser.add_argument("--in-flight", type=int, default=IN_FLIGHT, help="most requests in flight [%(default)s]")
    parser.add_argument("--new-connections", action="store_true", help="open a connection for every request")
    parser.add_argument("--deadline-ms", type=float, default=0.0, help="deadline of every request [the server's]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the arrivals [0]")
    parser.add_argument("--samples", type=Path, required=True, help="CSV file for every raw sample")
    asked = parser.parse_args()
    try:
        parts = parse_rates(asked.rates)
        if any(part.first != part.last for part in parts):
            raise ValueError("a ramp is no step: give RATE:SECONDS, separated by commas")
        payloads = (load(asked.data) if asked.data else []) or read_payloads(asked.data)
        where = target(
            payloads,
            protocol=asked.protocol,
            model=asked.model,
            host=asked.host,
            deadline_ms=asked.deadline_ms or None,
            reuse_connections=not asked.new_connections,
        )
    except (ValueError, PayloadError) as error:
        parser.error(str(error))
    url = urlsplit(asked.host)
    address = (url.hostname or "127.0.0.1", url.port or 80)
    requests = [encoded(where.path, url.netloc, request.headers, request.body) for request in where.requests]
    loop = OpenLoop(address, requests, in_flight=asked.in_flight, keep=not asked.new_connections)

    def stop(_number: int, _frame: FrameType | None) -> None:
        loop.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard) if hard != resource.RLIM_INFINITY else (soft, hard))
    # What is prepared stays: garbage collection need not scan it in the middle of the load.
    gc.freeze()
    loop.run(arrivals(parts, seed=str(asked.seed)))
    with asked.samples.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(Sample._fields)
        rows.writerows(sorted(loop.samples))


def encoded(path: str, host: str, headers: dict[str, str], body: bytes) -> bytes:
    """A request as bytes."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


if __name__ == "__main__":
    main()
