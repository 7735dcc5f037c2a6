"""Images under Locust: an open loop of Poisson arrivals, or a closed loop of users that wait for their answers.

    locust -f loadtests/generator/locustfile.py --host http://127.0.0.1:8000 --model cifar100-mha --data photos
    locust -f loadtests/generator/locustfile.py --rates '50:30,50>500:60,1000:5' ...

Open loop (the default): every user is a Poisson source of `--rate-per-user` images a second, so the number of users,
in Locust's web page or by `--users`, *is* the rate; the sources add up to a Poisson process, however many there are and
on however many workers. Every arrival has its own greenlet and waits for no earlier answer. Its latency counts from the
moment at which it was due, so neither a slow server nor a slow generator can hide in it. While `--in-flight` requests
are in flight in a process, an arrival is not sent and fails as `Unsent`. Closed loop (`--loop closed`): each user sends
its next image when its last is answered.

`--rates` changes the number of users over time (rates.py). `--seconds` ends the test when every arrival of that time is
sent; Locust's own `--run-time` also counts the time in which images are read and users started. `--samples FILE` keeps
every raw sample (samples.py); a worker adds its number to the name.

From several machines: `--master --expect-workers N` with all options on one, `--worker --master-host M` once per core
on the others, which need the same code, and the same images at the same path. Use `--autostart --autoquit 10` in place
of `--headless`, so that the master, which merges the workers' histograms, waits for the last (docs/loadtests.md).
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call"
from locust import FastHttpUser, LoadTestShape, events, task  # first: it patches the standard library for gevent  # isort: skip

import csv
import itertools
import logging
import math
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, TextIO

import gevent
from gevent.pool import Group
from geventhttpclient.client import HTTPClientPool
from locust.argument_parser import LocustArgumentParser
from locust.contrib.fasthttp import FAILURE_EXCEPTIONS
from locust.env import Environment
from locust.exception import StopTest, StopUser
from locust.rpc.protocol import Message
from locust.runners import LocalRunner, MasterRunner, WorkerRunner

from loadtests.generator.histogram import Latencies
from loadtests.generator.load_result import ANSWER_SECONDS, IN_FLIGHT, PROTOCOLS
from loadtests.generator.payload_cache import load
from loadtests.generator.payloads import read_payloads
from loadtests.generator.rates import Part, parse_rates, poisson_arrivals, rate_at
from loadtests.generator.readers import PayloadError
from loadtests.generator.request_encoder import target
from loadtests.generator.samples import UNSENT, Sample

log = logging.getLogger(__name__)


class Unsent(Exception):
    """An arrival was not sent because too many requests were in flight."""


class Run:
    """What all users of this process share in one test."""

    def __init__(self, options: Namespace, *, host: str, worker: int | None) -> None:
        """Read the images and prepare the requests. Raises PayloadError."""
        data = Path(options.data) if options.data else None
        payloads = (load(data) if data else []) or read_payloads(data)
        self.target = target(
            payloads,
            protocol=options.protocol,
            model=options.model,
            host=host,
            deadline_ms=options.deadline_ms or None,
            reuse_connections=not options.new_connections,
        )
        # A copy: the web page changes the options while requests are still in flight.
        self.options, self.open_loop = Namespace(**vars(options)), options.loop == "open"
        self.seed = f"{options.seed}/{worker or 0}"
        # Workers begin at different images, so that they do not all send the same one at once.
        begin = (worker or 0) * len(payloads) // 7
        self.images = itertools.islice(itertools.cycle(range(len(payloads))), begin, None)
        self.users = itertools.count()
        self.finished_users = 0
        self.requests = Group()
        self.unix_offset = time.time() - time.perf_counter()
        """Unix time minus that of the clock that is never adjusted."""
        self._samples: TextIO | None = None
        if options.samples:
            path = Path(options.samples)
            if worker is not None:
                path = path.with_name(f"{path.stem}-{worker}{path.suffix}")
            self._samples = path.open("w", newline="", encoding="utf-8")
            csv.writer(self._samples).writerow(Sample._fields)

    def record(self, sample: Sample) -> None:
        """Keep the outcome of one request."""
        _state.latencies.add(sample.latency_ms, ok=sample.status == 200)
        if self._samples and not self._samples.closed:
            csv.writer(self._samples).writerow(sample)

    def end(self) -> None:
        """Wait for the requests in flight."""
        self.requests.join(timeout=ANSWER_SECONDS)
        if self._samples:
            self._samples.close()


UNABLE = "stridevit-unable"
"""The message of a worker that cannot send, with the reason."""


class _State:
    """The process's state between Locust's events."""

    run: Run | None = None
    latencies = Latencies()
    """Latencies of this process's requests; on a master, of all workers."""
    failed = False
    paths: dict[str, str]
    """The command line's paths of images and samples: whoever can open the web page must not be able to name a file."""


_state = _State()


class Classify(FastHttpUser):
    """A source of images (open loop), or a client that waits for each answer (closed loop)."""

    abstract = False

    def on_start(self) -> None:
        """Begin this user's own stream of arrivals."""
        if _state.run is None:
            raise StopUser
        self._run = _state.run
        self._started = time.perf_counter()
        self._ends = self._started + (self._run.options.seconds or math.inf)
        self._arrivals = poisson_arrivals(
            self._run.options.rate_per_user, seed=f"{self._run.seed}/{next(self._run.users)}"
        )
        self._due = self._started
        if self._run.open_loop:
            self._due += next(self._arrivals)
            self.wait()

    def wait_time(self) -> float:
        """Seconds until the next arrival is due or the test ends; zero if it is late, or the loop is closed."""
        return max(0.0, min(self._due, self._ends) - time.perf_counter()) if self._run.open_loop else 0.0

    @task
    def classify(self) -> None:
        """Send one image."""
        run = self._run
        if run.open_loop:
            if self._due >= self._ends:
                self._finish()
            due, self._due = self._due, self._started + next(self._arrivals)
            if len(run.requests) < run.options.in_flight:
                run.requests.spawn(self._send, next(run.images), due)
            else:
                self._skip(next(run.images), due)
        else:
            self._send(next(run.images), time.perf_counter())
            if time.perf_counter() >= self._ends:
                self._finish()

    def _finish(self) -> None:
        """End this user; with the last one, the test."""
        self._run.finished_users += 1
        runner = self.environment.runner
        if isinstance(runner, LocalRunner) and self._run.finished_users >= runner.target_user_count:
            # In a greenlet of its own, because the runner waits for its users.
            gevent.spawn(runner.quit)
        raise StopUser

    def _send(self, image: int, due: float) -> None:
        target, due_s = self._run.target, round(due + self._run.unix_offset, 6)
        request, behind_ms = target.requests[image], _ms_since(due)
        with self.client.post(
            target.path,
            data=request.body,  # type: ignore[arg-type]  # takes bytes too
            headers=request.headers,
            name=target.path,
            catch_response=True,
        ) as response:
            latency_ms = _ms_since(due)
            response.request_meta.update(response_time=latency_ms, start_time=due_s)
            try:
                content, status = response.content, response.status_code or 0
            except FAILURE_EXCEPTIONS:  # the connection broke in the middle of the answer
                content, status = None, 0
            headers = response.headers
        model = str((headers.get("x-stridevit-model") if headers else None) or "")
        correct = target.correct(request, content) if status == 200 and content is not None else None
        self._run.record(Sample(due_s, latency_ms, status, behind_ms, model, image, correct))

    def _skip(self, image: int, due: float) -> None:
        behind_ms = _ms_since(due)
        self.environment.events.request.fire(
            request_type="POST",
            name=self._run.target.path,
            response_time=None,
            response_length=0,
            exception=Unsent(f"{self._run.options.in_flight} were in flight"),
            context={},
        )
        self._run.record(Sample(round(due + self._run.unix_offset, 6), behind_ms, UNSENT, behind_ms, "", image, None))


def _ms_since(moment: float) -> float:
    return round((time.perf_counter() - moment) * 1000, 3)


class Rates(LoadTestShape):
    """The number of users that gives the current rate."""

    abstract = True
    """Used with `--rates`, not merely because it is in this file."""

    def __init__(self, parts: tuple[Part, ...], environment: Environment) -> None:
        super().__init__()
        self._parts, self._environment, self.runner = parts, environment, environment.runner

    def tick(self) -> tuple[int, float] | None:
        """Number of users, and how many may start or stop in a second."""
        options, rate = self._environment.parsed_options, rate_at(self._parts, self.get_run_time())
        if rate is None or options is None:
            return None
        users = round(rate / options.rate_per_user)
        return users, max(1, users, self.get_current_user_count())


@events.init_command_line_parser.add_listener
def _arguments(parser: LocustArgumentParser, **_: Any) -> None:
    def add(name: str, help: str, **options: Any) -> None:  # noqa: A002 (argparse's name)
        variable = f"STRIDEVIT_LOAD_{name.upper().replace('-', '_')}"
        parser.add_argument(f"--{name}", env_var=variable, help=help, **options)

    add("model", "name of a model or a family", default="")
    command_line_only = {"default": "", "include_in_web_ui": False}
    add("data", "folder of images, of class folders, or of parquet files [generated JPEGs]", **command_line_only)
    loops = {"choices": ("open", "closed"), "default": "open"}
    add(
        "loop", "open: Poisson arrivals, the number of users is the rate; closed: users wait for their answers", **loops
    )
    add("protocol", "v1: image files; v2: binary tensors", choices=PROTOCOLS, default="v1")
    add("rates", "rate of the open loop over time: RATE:SECONDS or FROM>TO:SECONDS,...", **command_line_only)
    add("rate-per-user", "images a second of each user of the open loop", type=float, default=1.0)
    add("in-flight", "maximum of requests in flight in each process of the open loop", type=int, default=IN_FLIGHT)
    add("new-connections", "open a connection for every request", action="store_true", default=False)
    add("deadline-ms", "deadline of every request, 0 for the server's default", type=float, default=0.0)
    add("seed", "seed of the arrivals", type=int, default=0)
    add("seconds", "arrivals of this time are sent, then the test ends; 0 for no end", type=float, default=0.0)
    add("samples", "CSV file for every raw sample", **command_line_only)


@events.init.add_listener
def _init(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    if isinstance(environment.runner, MasterRunner):
        environment.runner.register_message(UNABLE, _end_without, concurrent=True)
    _state.paths = {name: getattr(options, name, "") for name in ("data", "samples")}
    if options and options.rates and not isinstance(environment.runner, WorkerRunner):
        try:
            environment.shape_class = Rates(parse_rates(options.rates), environment)
        except ValueError as error:
            raise SystemExit(f"--rates: {error}") from None
    if environment.web_ui and environment.web_ui.app:

        @environment.web_ui.app.get("/percentiles")
        def percentiles() -> dict[str, Any]:
            return _state.latencies.as_dict()


def _end_without(environment: Environment, msg: Message, **_: Any) -> None:
    """End the test if a worker cannot send: the others alone do not send at the requested rate."""
    log.error("worker %s: %s", msg.node_id, msg.data["reason"])
    _state.failed = True
    runner, options = environment.runner, environment.parsed_options
    if runner is None or options is None:
        return
    if not (options.headless or options.autostart):
        runner.stop()
        return
    runner.quit()
    if environment.web_ui:
        environment.web_ui.stop()


@events.test_start.add_listener
def _begin(environment: Environment, **_: Any) -> None:
    runner, options = environment.runner, environment.parsed_options
    _state.run, _state.latencies = None, Latencies()
    if options is None:
        return
    if not isinstance(runner, WorkerRunner):
        # The web form may set any option. Workers get theirs from the master.
        vars(options).update(_state.paths)
    if isinstance(runner, MasterRunner):
        return
    try:
        worker = runner.worker_index if isinstance(runner, WorkerRunner) else None
        run = _state.run = Run(options, host=environment.host or "", worker=worker)
    except PayloadError as error:
        _state.failed = True
        if not isinstance(runner, WorkerRunner):
            raise StopTest(str(error)) from None
        # StopTest would also end the greenlet that listens to the master.
        runner.send_message(UNABLE, {"reason": str(error)})
        return
    if environment.shape_class:
        # Reading the images must not take time from the first part.
        environment.shape_class.reset_time()
    Classify.client_pool = HTTPClientPool(
        concurrency=run.options.in_flight if run.open_loop else 10_000,
        connection_timeout=ANSWER_SECONDS,
        network_timeout=ANSWER_SECONDS,
    )


@events.test_stop.add_listener
def _end(**_: Any) -> None:
    if _state.run:
        _state.run.end()


@events.report_to_master.add_listener
def _report(data: dict[str, Any], **_: Any) -> None:
    data["latencies"] = _state.latencies.take()


@events.worker_report.add_listener
def _merge(data: dict[str, Any], **_: Any) -> None:
    _state.latencies.merge(data["latencies"])


@events.quitting.add_listener
def _quit(environment: Environment, **_: Any) -> None:
    if not isinstance(environment.runner, WorkerRunner):
        log.info(_state.latencies.summary())
    # Failed requests are a matter for the report: Locust itself did its work.
    environment.process_exit_code = int(_state.failed)
