"""MLPerf LoadGen drives a service over HTTP: its system under test (SUT) and its sample library (QSL).

A process of its own without Locust: LoadGen calls back from its own threads, which gevent's patches would break.
LoadGen makes the queries, measures the times and gives the verdict; here images are posted and answers handed back, by
one thread per connection. LoadGen has no notion of a failed query: one that fails is reported as completed, or the run
would wait for ever, and counted in `sut.json`.
"""

import json
import os
import signal
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn

import mlperf_loadgen as loadgen
import msgspec
import urllib3

from loadtests.mlperf.plan import Scenario, Task

RULES = "resnet50"
"""The image classification benchmark whose rules LoadGen contains: seeds, percentiles, minimum counts."""

QUICK_QUERIES: dict[Scenario, int] = {"SingleStream": 100, "Offline": 100, "Server": 1024}
"""For the 99th percentile, early stopping needs 459 queries if none is too late, 1,001 if three are."""
_ANSWER_SECONDS = 60.0
_MAX_FAILURES = 50
_MAX_FAILING_SECONDS = 5.0
_OFFLINE_SPARE = 1.4
"""The Offline query is this much larger than the warm-up's rate demands, because that rate may be too low."""
_SINGLE_STREAM_SPARE = 0.5
"""Fraction of the warm-up's latency: LoadGen then prepares twice the queries that it needs."""
_FOREIGN = ("locust", "gevent", "geventhttpclient")


class RequestFailed(Exception):
    """A request was not answered with 200; the message is the server's."""


class Sut:
    """The service as LoadGen sees it: one thread for each kept-alive connection, and all take from one queue."""

    def __init__(self, url: str, images: Sequence[bytes], *, connections: int, logs_classes: bool = False) -> None:
        self._url, self._images, self._connections, self._logs_classes = url, images, connections, logs_classes
        self._pool = urllib3.PoolManager(maxsize=connections, timeout=_ANSWER_SECONDS, retries=False)
        self._jobs: SimpleQueue[tuple[int, int]] = SimpleQueue()
        self._lock = threading.Lock()
        self._failed_in_a_row, self._answered_at = 0, 0.0
        self.answered = 0
        self.failures: Counter[str] = Counter()
        """Number of failures by the message of the server or the connection."""
        for _ in range(connections):
            threading.Thread(target=self._work, daemon=True).start()

    def post(self, image: bytes) -> bytes:
        """The body of the service's answer. Raises RequestFailed."""
        try:
            response = self._pool.urlopen("POST", self._url, body=image)
        except urllib3.exceptions.HTTPError as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error
        if response.status != 200:
            raise RequestFailed(f"{response.status}: {_message(response.data)}")
        return response.data

    def warm_up(self, seconds: float) -> float:
        """Keep all connections busy; returns images/s in the second half, or over the whole time if that has none."""
        begin = time.perf_counter()
        self.post(self._images[0])
        middle = time.perf_counter() + seconds / 2
        end = middle + seconds / 2

        def work(position: int) -> tuple[int, int]:
            answered = late = 0
            while time.perf_counter() < end:
                self.post(self._images[position % len(self._images)])
                answered += 1
                late += middle <= time.perf_counter() < end
                position += self._connections
            return answered, late

        with ThreadPoolExecutor(self._connections) as threads:
            answered, late = map(sum, zip(*threads.map(work, range(self._connections)), strict=True))
        self._answered_at = time.monotonic()
        return late / (seconds / 2) if late else (1 + answered) / (time.perf_counter() - begin)

    def issue(self, samples: Sequence[Any]) -> None:
        """Take LoadGen's queries."""
        for sample in samples:
            self._jobs.put((sample.id, sample.index))

    def _work(self) -> None:
        while True:
            query, index = self._jobs.get()
            answer, failure = array("i"), None
            try:
                body = self.post(self._images[index])
                if self._logs_classes:
                    answer.append(_class_index(body))
            except RequestFailed as error:
                failure = str(error)
            self._count(failure)
            address, count = answer.buffer_info()
            loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(query, address, count * answer.itemsize)])

    def _count(self, failure: str | None) -> None:
        with self._lock:
            now = time.monotonic()
            if failure is None:
                self.answered += 1
                self._failed_in_a_row, self._answered_at = 0, now
                return
            self.failures[failure] += 1
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= _MAX_FAILURES and now - self._answered_at > _MAX_FAILING_SECONDS:
                # LoadGen offers no way to stop it.
                _exit(f"{self._failed_in_a_row} requests failed in a row, the last one with: {failure}")


def settings_for(task: Task, *, rate: float, images: int) -> tuple[Any, dict[str, float]]:
    """LoadGen's settings, and the minimums that MLPerf's rules for image classification demand."""
    plan, settings = task.plan, loadgen.TestSettings()
    if settings.FromConfig("", RULES, task.scenario, 0):
        raise SystemExit(f"this LoadGen ({version('mlcommons-loadgen')}) contains no rules for {RULES}")
    rules = {
        "min_duration_s": settings.min_duration_ms / 1000,
        "min_query_count": settings.min_query_count,
        "performance_sample_count": settings.performance_sample_count_override,
    }
    if task.scenario == "Server":
        rules["target_latency_ms"] = settings.server_target_latency_ns / 1e6
    settings.scenario = getattr(loadgen.TestScenario, task.scenario)
    settings.mode = getattr(loadgen.TestMode, plan.mode)
    settings.performance_sample_count_override = images
    if not plan.full:
        settings.min_duration_ms = round(plan.seconds * 1000)
        settings.min_query_count = QUICK_QUERIES[task.scenario]
    if plan.latency_ms is not None:
        settings.server_target_latency_ns = round(plan.latency_ms * 1e6)
    settings.server_target_qps = task.target_qps or plan.load * rate
    settings.offline_expected_qps = _OFFLINE_SPARE * rate
    settings.single_stream_expected_latency_ns = round(_SINGLE_STREAM_SPARE * 1e9 / rate)
    return settings, rules


def drive(task: Task) -> dict[str, Any]:
    """Warm up, let LoadGen run, and return what LoadGen cannot know. Raises RequestFailed if the warm-up fails.

    It includes the `failures` by message, which LoadGen counts as answered; `generator_cores`, CPU time ÷ wall time of
    this process; and the `rules`, MLPerf's minimums.
    """
    images = [file.read_bytes() for file in sorted(task.images.iterdir())]
    sut = Sut(task.url, images, connections=task.connections, logs_classes=task.plan.accuracy)
    rate = sut.warm_up(task.plan.warmup_seconds)
    settings, rules = settings_for(task, rate=rate, images=len(images))
    logs = loadgen.LogSettings()
    logs.log_output.outdir = str(task.out)
    logs.enable_trace = False
    # All images are in memory from the start.
    library = loadgen.ConstructQSL(len(images), len(images), lambda _: None, lambda _: None)
    handle = loadgen.ConstructSUT(sut.issue, lambda: None)
    began, spent = time.perf_counter(), time.process_time()
    # LoadGen would obey an audit.config in the current folder.
    loadgen.StartTestWithLogSettings(handle, library, settings, logs, str(task.out / "no-audit.config"))
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - spent
    loadgen.DestroyQSL(library)
    loadgen.DestroySUT(handle)
    return {
        "loadgen": version("mlcommons-loadgen"),
        "seconds": seconds,
        "answered": sut.answered,
        "failures": sut.failures,
        "connections": task.connections,
        "generator_cores": cpu_seconds / seconds,
        "warmup_rate": rate,
        "images": len(images),
        "rules": rules,
    }


def main() -> None:
    """Drive as the command line says, and write `sut.json` beside LoadGen's logs."""
    if foreign := [name for name in _FOREIGN if name in sys.modules]:
        raise SystemExit(f"{', '.join(foreign)} must not be loaded beside LoadGen")
    # LoadGen occupies the main thread, so that Python's own handler would never run.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    task = msgspec.json.decode(sys.argv[1], type=Task, dec_hook=lambda _, text: Path(text))
    try:
        found = drive(task)
    except RequestFailed as error:
        _exit(str(error))
    (task.out / "sut.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _class_index(body: bytes) -> int:
    try:
        return int(json.loads(body)["results"][0]["predictions"][0]["index"])
    except (ValueError, LookupError, TypeError) as error:
        raise RequestFailed(f"200, but no class: {_message(body)}") from error


def _message(body: bytes) -> str:
    """The part of an error answer that all errors of a kind share, so that they are counted together."""
    try:
        return str(json.loads(body)["detail"])
    except (ValueError, LookupError, TypeError):
        return body[:200].decode("utf-8", "replace")


def _exit(message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    main()
