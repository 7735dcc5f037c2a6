"""MLPerf LoadGen drives a service over HTTP: its system under test (SUT) and its sample library (QSL).

A process of its own, without Locust: LoadGen calls back from its own threads, which gevent's patches would break.
LoadGen makes the queries, takes the times and gives the verdict; here images are posted to `/v1/classify` and answers
handed back, by as many threads as there are connections. LoadGen knows no failed query: one that fails is completed,
or the run would wait for ever, and counted in `sut.json`.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn
from urllib.parse import urlsplit

import mlperf_loadgen as loadgen

RULES = "resnet50"
"""The benchmark of image classification whose rules LoadGen carries: seeds, percentiles, least counts."""

_ANSWER_SECONDS = 60.0
_LOST_AFTER = 50
_LOST_SECONDS = 5.0
_OFFLINE_SPARE = 1.4
"""A query that the warm-up's rate would work on so many times longer than it must: the rate may be too low."""
_SINGLE_STREAM_SPARE = 0.5
"""Of the warm-up's latency: then LoadGen prepares twice the queries that it takes."""
_FOREIGN = ("locust", "gevent", "geventhttpclient")


class Refused(Exception):
    """A request was not answered with 200; the message holds the server's words."""


class Connection:
    """One connection that is kept alive, and opened anew where the server has closed it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._http = kind(parts.netloc, timeout=_ANSWER_SECONDS)

    def ask(self, request: bytes) -> bytes:
        """Send a whole request, head and body, in one piece; the answer's body. Raises Refused."""
        try:
            reused = self._http.sock is not None
            try:
                status, body = self._exchange(request)
            except ConnectionError:
                # The server may close a connection that was idle just as it is used again.
                if not reused:
                    raise
                self._http.close()
                status, body = self._exchange(request)
        except (OSError, HTTPException) as error:
            self._http.close()
            raise Refused(f"{type(error).__name__}: {error}") from error
        if status != 200:
            raise Refused(f"{status}: {_words(body)}")
        return body

    def _exchange(self, request: bytes) -> tuple[int, bytes]:
        if self._http.sock is None:
            self._http.connect()
        self._http.sock.sendall(request)
        response = HTTPResponse(self._http.sock, method="POST")
        try:
            response.begin()
            body = response.read()
        finally:
            response.close()
        if response.will_close:
            self._http.close()
        return response.status, body


class Sut:
    """The service, as LoadGen sees it: each connection has a thread, and all take from one queue."""

    def __init__(self, connections: Sequence[Connection], requests: Sequence[bytes], *, logs_classes: bool) -> None:
        self._requests, self._logs_classes = requests, logs_classes
        self._jobs: SimpleQueue[tuple[int, int]] = SimpleQueue()
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._answered_at = time.monotonic()
        self.answered = 0
        self.failures: Counter[str] = Counter()
        """By what the server, or the connection, said."""
        for connection in connections:
            threading.Thread(target=self._work, args=(connection,), daemon=True).start()

    def issue(self, samples: Sequence[Any]) -> None:
        """LoadGen's queries."""
        for sample in samples:
            self._jobs.put((sample.id, sample.index))

    def _work(self, connection: Connection) -> None:
        while True:
            ident, index = self._jobs.get()
            answer = array("i")
            try:
                body = connection.ask(self._requests[index])
                if self._logs_classes:
                    answer.append(_class_index(body))
            except Refused as error:
                self._failed(str(error))
            else:
                with self._lock:
                    self.answered += 1
                    self._in_a_row, self._answered_at = 0, time.monotonic()
            address, count = answer.buffer_info()
            loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(ident, address, count * answer.itemsize)])

    def _failed(self, words: str) -> None:
        with self._lock:
            self.failures[words] += 1
            self._in_a_row += 1
            lost = self._in_a_row >= _LOST_AFTER and time.monotonic() > self._answered_at + _LOST_SECONDS
        if lost:
            # LoadGen cannot be told to stop.
            _give_up(f"{self._in_a_row} requests failed in a row, the last one with: {words}")


def warm_up(connections: Sequence[Connection], requests: Sequence[bytes], *, seconds: float) -> float:
    """All connections busy for so long; the images a second that they got in the second half. Raises Refused."""
    connections[0].ask(requests[0])
    begin = time.perf_counter()
    ended_at: list[float] = []
    refused: list[Refused] = []

    def work(connection: Connection, position: int) -> None:
        while not refused and time.perf_counter() < begin + seconds:
            try:
                connection.ask(requests[position % len(requests)])
            except Refused as error:
                refused.append(error)
            else:
                ended_at.append(time.perf_counter())
            position += len(connections)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(connections, range(len(connections)))]  # noqa: B905
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if refused:
        raise refused[0]
    measured = sum(begin + seconds / 2 <= moment < begin + seconds for moment in ended_at)
    if not measured:
        raise Refused(f"no image was answered within {seconds / 2:g} s")
    return measured / (seconds / 2)


def settings_of(asked: argparse.Namespace, *, rate: float, images: int) -> tuple[Any, dict[str, float]]:
    """LoadGen's settings, and the least that MLPerf's rules for image classification ask for."""
    settings = loadgen.TestSettings()
    if settings.FromConfig("", RULES, asked.scenario, 0):
        raise SystemExit(f"this LoadGen ({version('mlcommons-loadgen')}) carries no rules for {RULES}")
    rules = {
        "min_duration_s": settings.min_duration_ms / 1000,
        "min_query_count": settings.min_query_count,
        "performance_sample_count": settings.performance_sample_count_override,
    }
    if asked.scenario == "Server":
        rules["target_latency_ms"] = settings.server_target_latency_ns / 1e6
    settings.scenario = getattr(loadgen.TestScenario, asked.scenario)
    settings.mode = getattr(loadgen.TestMode, asked.mode)
    settings.performance_sample_count_override = images
    if asked.min_seconds is not None:
        settings.min_duration_ms = round(asked.min_seconds * 1000)
    if asked.min_queries is not None:
        settings.min_query_count = asked.min_queries
    settings.server_target_qps = asked.target_qps or asked.share * rate
    if asked.latency_ms is not None:
        settings.server_target_latency_ns = round(asked.latency_ms * 1e6)
    settings.offline_expected_qps = _OFFLINE_SPARE * rate
    settings.single_stream_expected_latency_ns = round(_SINGLE_STREAM_SPARE * 1e9 / rate)
    return settings, rules


def drive(asked: argparse.Namespace) -> dict[str, Any]:
    """Warm up, let LoadGen run, and say what it cannot know. Raises Refused if the warm-up fails."""
    requests = _requests(asked.url, asked.path, asked.images)
    connections = [Connection(asked.url) for _ in range(asked.connections)]
    rate = warm_up(connections, requests, seconds=asked.warmup)
    settings, rules = settings_of(asked, rate=rate, images=len(requests))
    logs = loadgen.LogSettings()
    logs.log_output.outdir = str(asked.out)
    logs.enable_trace = False
    sut = Sut(connections, requests, logs_classes=asked.mode == "AccuracyOnly")
    # All images are in memory from the start.
    library = loadgen.ConstructQSL(len(requests), len(requests), lambda _: None, lambda _: None)
    handle = loadgen.ConstructSUT(sut.issue, lambda: None)
    began, spent = time.perf_counter(), time.process_time()
    # LoadGen would take an audit.config of the current folder for an order.
    loadgen.StartTestWithLogSettings(handle, library, settings, logs, str(asked.out / "no-audit.config"))
    seconds, cpu = time.perf_counter() - began, time.process_time() - spent
    loadgen.DestroyQSL(library)
    loadgen.DestroySUT(handle)
    return {
        "loadgen": version("mlcommons-loadgen"),
        "seconds": seconds,
        "answered": sut.answered,
        "failures": dict(sut.failures),
        "connections": asked.connections,
        "generator_cores": cpu / seconds,
        "warmup_rate": rate,
        "images": len(requests),
        "rules": rules,
    }


def main() -> None:
    """Read the command line, drive, and write `sut.json` beside LoadGen's logs."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.mlperf.sut", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("path", help="of the service's route, with the query")
    parser.add_argument("--scenario", choices=("SingleStream", "Server", "Offline"), required=True)
    parser.add_argument("--mode", choices=("PerformanceOnly", "AccuracyOnly"), default="PerformanceOnly")
    parser.add_argument("--images", type=Path, required=True, help="folder of image files")
    parser.add_argument("--out", type=Path, required=True, help="folder for LoadGen's logs; must be there")
    parser.add_argument("--min-seconds", type=float, help="least duration; MLPerf's own if not given")
    parser.add_argument("--min-queries", type=int, help="least queries; MLPerf's own if not given")
    parser.add_argument("--warmup", type=float, default=3.0, help="seconds before LoadGen starts")
    parser.add_argument("--connections", type=int, default=128)
    parser.add_argument("--target-qps", type=float, help="of the Server scenario; else a share of the warm-up's rate")
    parser.add_argument("--share", type=float, default=0.6, help="of the warm-up's rate, for the Server scenario")
    parser.add_argument("--latency-ms", type=float, help="p99 of the Server scenario; MLPerf's own if not given")
    asked = parser.parse_args()
    foreign = [name for name in _FOREIGN if name in sys.modules]
    if foreign:
        raise SystemExit(f"{', '.join(foreign)} must not be loaded beside LoadGen")
    # LoadGen holds the main thread, so that Python's own handler would not be reached.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        found = drive(asked)
    except Refused as error:
        _give_up(str(error))
    (asked.out / "sut.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _requests(url: str, path: str, folder: Path) -> list[bytes]:
    parts = urlsplit(url)
    line = f"POST {parts.path.rstrip('/')}{path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
    images = [file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file() and file.suffix != ".json"]
    return [f"{line}Content-Length: {len(image)}\r\n\r\n".encode("ascii") + image for image in images]


def _class_index(body: bytes) -> int:
    try:
        index = json.loads(body)["results"][0]["predictions"][0]["index"]
    except (ValueError, LookupError, TypeError) as error:
        raise Refused(f"200, but no class: {_words(body)}") from error
    return int(index)


def _words(body: bytes) -> str:
    """What an answer says, without what is different in each: requests that fail alike are counted together."""
    try:
        return str(json.loads(body)["detail"])
    except (ValueError, LookupError, TypeError):
        return body[:200].decode("utf-8", "replace")


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _give_up(words: str) -> NoReturn:
    print(words, file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    main()
