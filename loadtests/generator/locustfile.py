"""Images under Locust: an open loop of Poisson arrivals, or a closed loop of users that wait for their answers.

    locust -f loadtests/generator/locustfile.py --host http://127.0.0.1:8000 --model cifar100-mha --data photos
    locust -f loadtests/generator/locustfile.py,loadtests/generator/shapes.py --rates '50:30,50>500:60,1000:5' ...

Open loop (the default): every user is a Poisson source of `--rate-per-user` images a second, so the number of users,
in Locust's web page or by `--users`, *is* the rate; sources add up to a Poisson process whatever their number, and over
any number of workers. An arrival has a greenlet of its own and waits for no earlier answer. Its latency counts from the
moment at which it was due, so neither a slow server nor a slow generator can hide in it. Beyond `--in-flight` requests
under way in a process, an arrival is not sent, and fails as `Unsent`. Closed loop (`--loop closed`): each user sends
its next image when its last is answered.

With `--master` and `--worker` each worker keeps a histogram (HDR, three digits), and the master merges them: it prints
the percentiles at the end, and serves them at `/percentiles` beside its web page. Without the page let the master wait
for the last reports, `--autostart --autoquit 10`: with `--headless` it ends before they come. `--samples FILE` keeps
every raw sample (loadtests/generator/samples.py); a worker adds its number to the file's name.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call"
from locust import FastHttpUser, events, task  # first: it patches the standard library for gevent  # isort: skip

import itertools
import logging
import random
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from gevent.pool import Group
from geventhttpclient.client import HTTPClientPool
from locust.argument_parser import LocustArgumentParser
from locust.contrib.fasthttp import FAILURE_EXCEPTIONS
from locust.env import Environment
from locust.exception import StopTest
from locust.runners import MasterRunner, WorkerRunner

from loadtests.generator.histogram import Latencies
from loadtests.generator.load_result import ANSWER_SECONDS, IN_FLIGHT, PROTOCOLS
from loadtests.generator.payload_cache import is_saved, load
from loadtests.generator.payloads import PayloadError, read_payloads
from loadtests.generator.request_encoder import Target, target
from loadtests.generator.samples import UNSENT, Sample, writer

log = logging.getLogger(__name__)


class Unsent(Exception):
    """An arrival for which too many others were under way."""


class Run:
    """What all users of this process share in one test."""

    target: Target
    loop: str
    rate_per_user: float
    in_flight: int
    clock_offset: float
    """Unix time less the clock that nobody sets."""
    seed: str
    numbers: Iterator[int]
    """Of the images that are sent."""
    users: Iterator[int]

    def __init__(self) -> None:
        self.latencies = Latencies()
        """Of this process; on a master, of all workers."""
        self.requests = Group()
        self.failed = False
        self._stream: TextIO | None = None
        self._write: Callable[[Sample], None] | None = None

    def begin(self, asked: Namespace, *, host: str, worker: int | None) -> None:
        """Take in what the command line or the web page asks for. Raises PayloadError."""
        self.__init__()  # type: ignore[misc]  # the web page starts one test after another
        self.loop, self.in_flight, self.rate_per_user = asked.loop, asked.in_flight, asked.rate_per_user
        self.seed = f"{asked.seed}/{worker or 0}"
        data = Path(asked.data) if asked.data else None
        payloads = load(data) if data and is_saved(data) else read_payloads(data)
        self.target = target(
            payloads,
            protocol=asked.protocol,
            model=asked.model,
            host=host,
            deadline_ms=asked.deadline_ms or None,
        )
        # So that workers do not all send the same image at once.
        self.numbers = itertools.count((worker or 0) * len(payloads) // 7)
        self.users = itertools.count()
        self.clock_offset = time.time() - time.perf_counter()
        if asked.samples:
            path = Path(asked.samples)
            if worker is not None:
                path = path.with_name(f"{path.stem}-{worker}{path.suffix}")
            self._stream = path.open("w", newline="", encoding="utf-8")
            self._write = writer(self._stream)

    def record(self, sample: Sample) -> None:
        """Keep what became of a request."""
        self.latencies.add(sample.latency_ms, ok=sample.ok)
        if self._write:
            self._write(sample)

    def end(self) -> None:
        """Wait for what is under way."""
        self.requests.join(timeout=ANSWER_SECONDS)
        self._write = None
        if self._stream:
            self._stream.close()


run = Run()
_paths: dict[str, str] = {}
"""Where images come from and samples go, by the command line: whoever can open the page cannot name a file."""


class Classify(FastHttpUser):
    """A source of images (open loop), or somebody who waits for each answer (closed loop)."""

    abstract = False

    def on_start(self) -> None:
        """Begin a stream of arrivals of its own."""
        self._gaps = random.Random(f"{run.seed}/{next(run.users)}")  # noqa: S311 (arrivals are no secret)
        self._due = time.perf_counter() + self._gap()
        if run.loop == "open":
            self.wait()

    def _gap(self) -> float:
        return self._gaps.expovariate(run.rate_per_user)

    def wait_time(self) -> float:
        """Seconds until the next arrival is due; none if it is late, or the loop is closed."""
        return max(0.0, self._due - time.perf_counter()) if run.loop == "open" else 0.0

    @task
    def classify(self) -> None:
        """One image."""
        number = next(run.numbers) % len(run.target.questions)
        if run.loop == "closed":
            self._ask(number, time.perf_counter())
            return
        due = self._due
        self._due += self._gap()
        if len(run.requests) < run.in_flight:
            run.requests.spawn(self._ask, number, due)
        else:
            self._unsent(number, due)

    def _ask(self, number: int, due: float) -> None:
        question = run.target.questions[number]
        behind = time.perf_counter() - due
        with self.client.post(
            run.target.path,
            data=question.body,  # type: ignore[arg-type]  # takes bytes too
            headers=question.headers,
            name=run.target.path,
            catch_response=True,
        ) as response:
            latency_ms = (time.perf_counter() - due) * 1000
            response.request_meta["response_time"] = latency_ms
            response.request_meta["start_time"] = due + run.clock_offset
            try:
                content, status = response.content, response.status_code or 0
            except FAILURE_EXCEPTIONS:  # the connection broke in the middle of the answer
                content, status = None, 0
            headers = response.headers
        ok = status == 200 and content is not None
        run.record(
            Sample(
                due_s=due + run.clock_offset,
                latency_ms=latency_ms,
                status=status,
                behind_ms=behind * 1000,
                model=str((headers.get("x-stridevit-model") if headers else None) or ""),
                image=number,
                correct=run.target.correct(question, content) if ok else None,
            )
        )

    def _unsent(self, number: int, due: float) -> None:
        behind_ms = (time.perf_counter() - due) * 1000
        self.environment.events.request.fire(
            request_type="POST",
            name=run.target.path,
            response_time=None,
            response_length=0,
            exception=Unsent(f"{run.in_flight} were under way"),
            context={},
            start_time=due + run.clock_offset,
            url=run.target.path,
            response=None,
        )
        run.record(
            Sample(
                due_s=due + run.clock_offset,
                latency_ms=behind_ms,
                status=UNSENT,
                behind_ms=behind_ms,
                model="",
                image=number,
                correct=None,
            )
        )


@events.init_command_line_parser.add_listener
def _arguments(parser: LocustArgumentParser, **_: Any) -> None:
    def add(name: str, help: str, **how: Any) -> None:  # noqa: A002 (argparse's name)
        parser.add_argument(f"--{name}", env_var=f"STRIDEVIT_LOAD_{name.upper().replace('-', '_')}", help=help, **how)

    add("model", "model to ask for, or a family", default="")
    here = {"default": "", "include_in_web_ui": False}
    add("data", "folder of images, of class folders, or of parquet files [generated JPEGs]", **here)
    add(
        "loop",
        "open: Poisson arrivals, users are the rate; closed: users wait",
        choices=("open", "closed"),
        default="open",
    )
    add("protocol", "v1: image files; v2: binary tensors", choices=PROTOCOLS, default="v1")
    add("rate-per-user", "images a second of each user of the open loop", type=float, default=1.0)
    add("in-flight", "requests under way at most, in each process of the open loop", type=int, default=IN_FLIGHT)
    add("deadline-ms", "deadline of every request, 0 for the server's default", type=float, default=0.0)
    add("seed", "of the arrivals", type=int, default=0)
    add("samples", "CSV file for every raw sample", **here)


@events.test_start.add_listener
def _begin(environment: Environment, **_: Any) -> None:
    runner, asked = environment.runner, environment.parsed_options
    if asked is not None and not isinstance(runner, WorkerRunner):
        # A form may hold any option. Workers are told these by their master.
        vars(asked).update(_paths)
    if isinstance(runner, MasterRunner) or asked is None:
        run.latencies = Latencies()
        return
    try:
        worker = runner.worker_index if isinstance(runner, WorkerRunner) else None
        run.begin(asked, host=environment.host or "", worker=worker)
    except PayloadError as error:
        run.failed = True
        raise StopTest(str(error)) from None
    Classify.client_pool = HTTPClientPool(
        concurrency=run.in_flight if run.loop == "open" else 10_000,
        connection_timeout=ANSWER_SECONDS,
        network_timeout=ANSWER_SECONDS,
    )


@events.test_stop.add_listener
def _end(environment: Environment, **_: Any) -> None:
    if not isinstance(environment.runner, MasterRunner):
        run.end()


@events.report_to_master.add_listener
def _report(data: dict[str, Any], **_: Any) -> None:
    data["latencies"] = run.latencies.take()


@events.worker_report.add_listener
def _merge(data: dict[str, Any], **_: Any) -> None:
    run.latencies.merge(data["latencies"])


@events.init.add_listener
def _page(environment: Environment, **_: Any) -> None:
    _paths.update({name: getattr(environment.parsed_options, name, "") for name in ("data", "samples")})
    if environment.web_ui and environment.web_ui.app:

        @environment.web_ui.app.get("/percentiles")
        def percentiles() -> dict[str, Any]:
            return run.latencies.as_dict()


@events.quitting.add_listener
def _finish(environment: Environment, **_: Any) -> None:
    if not isinstance(environment.runner, WorkerRunner):
        for line in run.latencies.lines():
            log.info(line)
    # Failed requests are the report's to tell: Locust itself did its work.
    environment.process_exit_code = int(run.failed)
