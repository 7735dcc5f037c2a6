"""Two Ray nodes on this machine. Inside the namespaces of `enclosure.run` only, which end what is started here."""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.serve._private.api import serve_start
from ray.serve.schema import ServeDeploySchema

from tests.cluster.ray.enclosure import ROOT, variables

import psutil  # isort: skip (Ray brings it, and puts it on the path)

PORT = 8000
"""Of Ray's HAProxy."""
_GCS = "127.0.0.1:6379"
_PATIENCE_SECONDS = 900
"""How long a step may take: far longer than on an idle machine."""
_STORE_BYTES = "100000000"

_AGENTS = {
    "metrics_agent_port": "--dashboard-agent-grpc-port",
    "dashboard_agent_listen_port": "--dashboard-agent-listen-port",
    "metrics_export_port": "--metrics-export-port",
    "runtime_env_agent_port": "--runtime-env-agent-port",
}
"""Files in which the agents of a node say their ports, and the options that set them."""


@dataclass(frozen=True, slots=True)
class Replica:
    """A replica that takes requests."""

    pid: int
    node: str
    cpu_seconds: float


class Cluster:
    """A head node and a worker node, each with one core for a replica."""

    def __init__(self, folder: Path, *, draining_seconds: float) -> None:
        """`folder` must have a short path: Ray's sockets are in it."""
        self._folder = folder
        self._environment = {
            **os.environ,
            **variables(),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": f"{draining_seconds:g}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": f"{_PATIENCE_SECONDS}",
            "RAY_worker_register_timeout_seconds": f"{_PATIENCE_SECONDS}",
            # Ray kills a front that is not there in time, which is 5 s.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "300",
            "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": "300",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        for name, file in {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "admin.sock", "SERVER_STATE_BASE": "",
                           "SERVER_STATE_FILE": "state", "METRICS_SOCKET_PATH": "metrics.sock"}.items():  # fmt: skip
            self._environment[f"RAY_SERVE_HAPROXY_{name}"] = str(folder / "haproxy" / file)
        self._started = 0
        self._client: Any = None

    def start_head(self) -> None:
        """Start the head, with Ray's HAProxy to be on it."""
        self._start("--head", "--port", _GCS.rpartition(":")[2], "--node-ip-address", "127.0.0.1",
                    "--temp-dir", str(self._folder), "--include-dashboard=false")  # fmt: skip

    def start_worker(self) -> None:
        """Add the worker node."""
        self._start("--address", _GCS)

    def connect(self) -> None:
        """Make this process a client of the cluster."""
        os.environ.update(self._environment)
        ray.init(address=_GCS, log_to_driver=False, logging_level="ERROR")

    def deploy(self, config: Mapping[str, Any]) -> None:
        """Deploy, or deploy again, as `serve deploy` and `serve run` do; returns when Ray says that it runs."""
        # What both put their file to; `serve deploy` goes through the dashboard, which is not run here.
        if self._client is None:
            self._client = wait_for(lambda: _serve(config), "Ray Serve")
        self._client.deploy_apps(ServeDeploySchema.model_validate(dict(config)))

        def running() -> bool:
            (app,) = self._client.get_serve_details()["applications"].values()
            if app["status"] == "DEPLOY_FAILED":
                raise RuntimeError(app["message"])
            return bool(app["status"] == "RUNNING")

        wait_for(running, "running application")

    def replicas(self) -> list[Replica]:
        """The replicas that Ray lets take requests."""
        (app,) = self._client.get_serve_details()["applications"].values()
        listed = [one for deployment in app["deployments"].values() for one in deployment["replicas"]]
        found = []
        for one in (one for one in listed if one["state"] == "RUNNING"):
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(one["pid"])
                # It takes Ray some seconds to notice that a node was killed.
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(Replica(process.pid, one["node_id"], _cpu_seconds(process)))
        return found

    def wait_for_replicas(self, count: int) -> list[Replica]:
        """Wait until there are `count` of them, no more and no fewer. Raises TimeoutError."""
        found: list[Replica] = wait_for(
            lambda: there if len(there := self.replicas()) == count else None, f"{count} replicas"
        )
        return found

    def kill_worker(self) -> int:
        """Kill the worker node at once, with all that it started; the number of its processes."""
        raylets = [one for one in psutil.process_iter(["cmdline"]) if _is_raylet(one.info["cmdline"])]
        youngest = max(raylets, key=lambda one: one.create_time())
        assert len(raylets) == 2, "there is no worker node besides the head"
        youngest.suspend()  # it would start children anew
        doomed = [*youngest.children(recursive=True), youngest]
        for process in doomed:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return len(doomed)

    def _start(self, *arguments: str) -> None:
        """`ray start`. Raises RuntimeError or TimeoutError."""
        self._started += 1
        # Below those that the system gives to outgoing connections, and not among those that Ray gives to its workers.
        ports = {file: 21000 + 10 * self._started + n for n, file in enumerate(_AGENTS)}
        flags = [part for file, port in ports.items() for part in (_AGENTS[file], str(port))]
        node, log = secrets.token_hex(28), self._folder / f"start-{self._started}.log"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, *flags]
        with log.open("w") as out:
            process = subprocess.Popen(
                [*command, "--num-cpus", "1", "--object-store-memory", _STORE_BYTES],
                cwd=ROOT,
                env={**self._environment, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": node},
                stdout=out,
                stderr=subprocess.STDOUT,
            )

        def started() -> bool:
            # The raylet dies if its agents have not written these within 15 s, which they need on a busy machine.
            session = self._folder / "session_latest"
            for file, port in ports.items():
                if session.is_dir() and not (session / f"{file}_{node}").exists():
                    (session / f"{file}_{node}").write_text(str(port))
            return process.poll() is not None

        wait_for(started, "end of `ray start`", every=0.1)
        if process.returncode:
            raise RuntimeError(f"`ray start` ended with {process.returncode}:\n{log.read_text()[-4000:]}")


def wait_for(look: Callable[[], Any], what: str, *, every: float = 1.0) -> Any:
    """What `look` finds, once it is true. Raises TimeoutError."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not (found := look()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {_PATIENCE_SECONDS} s")
        time.sleep(every)
    return found


def _serve(config: Mapping[str, Any]) -> Any:
    """Ray Serve's client; None if it was not ready within Ray's own minute."""
    try:
        return serve_start(http_options=config["http_options"], proxy_location=config["proxy_location"])
    except (ray.exceptions.RayError, TimeoutError):
        return None


def cpu_seconds(*names: str) -> float:
    """CPU time of all processes of these names that run, or of all that run."""
    found = 0.0
    for process in psutil.process_iter(["name"]):
        if not names or process.info["name"] in names:
            with suppress(psutil.NoSuchProcess):
                found += _cpu_seconds(process)
    return found


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _is_raylet(command: Sequence[str] | None) -> bool:
    return command is not None and any(command[:1]) and command[0].endswith("/raylet/raylet")
