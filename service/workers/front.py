"""The process of the front, and how it learns which workers take traffic."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import httpx
import structlog

from service.errors import StartupError
from service.http.server.listening import last_handshakes
from service.settings import Settings
from service.workers.borrowing import listening_sockets
from service.workers.envoy import WORKERS, Files, configuration, endpoints, threads_for, write_json
from service.workers.inside import client_of

log = structlog.get_logger()

_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 5.0
_QUIET_SECONDS: Final = 1.0
"""After this long without a request, the connections that are left count as unused."""

# PR_SET_PDEATHSIG outlives exec; the check of the parent covers a death before the call.
_GUARD: Final = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class Front:
    """Envoy, in front of the workers."""

    def __init__(
        self, program: Path, settings: Settings, folder: Path, *, workers: int, cores: int, token: str, connections: int
    ) -> None:
        self._program, self._settings = program, settings
        self._files = Files(folder=folder)
        self._threads = threads_for(cores)
        self._version = 0
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._said: list[str] = []
        self._configuration: dict[str, Any] = configuration(
            settings, self._files, workers=workers, token=token, max_connections=connections
        )

    @property
    def pid(self) -> int:
        """The id of its process; 0 before it runs."""
        return self._process.pid if self._process else 0

    def publish(self, sockets: Sequence[Path]) -> None:
        """Send traffic to these workers from now on."""
        self._version += 1
        self._files.endpoints.parent.mkdir(exist_ok=True)
        write_json(self._files.endpoints, endpoints(sockets, version=self._version))

    def check(self) -> None:
        """Raise StartupError unless the program runs and accepts its configuration."""
        self.publish(())
        write_json(self._files.configuration, self._configuration)
        command = (self._program, "--mode", "validate", "--log-level", "error", "--log-format", "%v")
        try:
            done = subprocess.run(  # noqa: S603 (the package's own program)
                [*command, "--config-path", self._files.configuration],
                check=False,
                capture_output=True,
                text=True,
                timeout=_START_SECONDS,
            )
            why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        except (OSError, subprocess.TimeoutExpired) as error:
            raise StartupError(f"the front (Envoy, {self._program}) cannot be run: {error}") from error
        if done.returncode:
            raise StartupError(f"the front (Envoy, {self._program}) does not start: {why}")

    async def start(self) -> None:
        """Listen. Raises StartupError, with what Envoy said."""
        self._files.admin.unlink(missing_ok=True)
        guard = [sys.executable, "-c", _GUARD, str(os.getpid())] if sys.platform == "linux" else []
        self._process = await asyncio.create_subprocess_exec(
            *guard,
            *(str(self._program), "--config-path", str(self._files.configuration), "--disable-hot-restart"),
            *("--concurrency", str(self._threads), "--log-level", "error", "--log-format", "%v"),
            # From the first moment of the end, every answer is the last one of its connection.
            *("--drain-strategy", "immediate", "--drain-time-s", "1"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        self._said = []
        self._reader = asyncio.create_task(self._read(self._process))
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self._process.returncode is not None:
                await self._reader
                why = self._said[-1] if self._said else f"exit status {self._process.returncode}"
                raise StartupError(f"the front (Envoy, {self._program}) did not start: {why}")
            if (await self._admin("GET", "/ready")) == "LIVE":
                return
            await asyncio.sleep(0.05)
        self.kill()
        raise StartupError(f"the front (Envoy, {self._program}) was not ready after {_START_SECONDS:g} s")

    async def ended(self) -> int:
        """Wait for the end of its process; returns the exit status."""
        return await self._process.wait() if self._process else 0

    async def say_goodbye(self) -> None:
        """From now on every answer is the last one of its connection."""
        await self._admin("POST", "/healthcheck/fail")

    async def finish(self, seconds: float) -> bool:
        """Accept no more connections, and wait until all requests are answered; returns whether they were in time."""
        with listening_sockets(self.pid, self._settings.port) as listening:
            await last_handshakes(listening)
            await self._admin("POST", "/drain_listeners")
        deadline, quiet_since = time.monotonic() + seconds, time.monotonic()
        while time.monotonic() < deadline:
            active = await self._active()
            if active is None:
                return False
            if active:
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since >= _QUIET_SECONDS:
                return True
            await asyncio.sleep(0.05)
        return not await self._active()

    async def stop(self) -> None:
        """End the process."""
        if self._process and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_SECONDS)
            except TimeoutError:
                self.kill()
                await self._process.wait()
        if self._reader:
            await self._reader

    def kill(self) -> None:
        """End the process at once."""
        if self._process and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def healthy(self) -> set[Path]:
        """Sockets of the workers that it sends requests to: it checks new ones itself. Empty if it does not answer."""
        found = await self._admin("GET", "/clusters?format=json")
        try:
            clusters = json.loads(found or "{}").get("cluster_statuses", [])
        except json.JSONDecodeError:
            return set()
        return {
            Path(host["address"]["pipe"]["path"])
            for cluster in clusters
            if cluster["name"] == WORKERS
            for host in cluster.get("host_statuses", [])
            if host["health_status"].keys() <= {"eds_health_status"}
        }

    async def counters(self) -> dict[str, int]:
        """Its counters of requests that were sent again; empty if it does not answer."""
        found = await self._admin("GET", "/stats?filter=upstream_rq_retry")
        pairs = (line.rpartition(": ") for line in (found or "").splitlines())
        return {name.rpartition(".")[2]: int(value) for name, _, value in pairs if value.isdecimal()}

    async def _active(self) -> int | None:
        found = await self._admin("GET", "/stats?filter=downstream_rq_active")
        return None if found is None else sum(int(line.rpartition(": ")[2]) for line in found.splitlines() if line)

    async def _admin(self, method: str, path: str) -> str | None:
        try:
            async with client_of(self._files.admin, seconds=5) as client:
                return (await client.request(method, path)).text.strip()
        except (httpx.HTTPError, OSError):
            return None

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Log what it says."""
        assert process.stderr is not None  # noqa: S101 (a pipe, as it was started with one)
        while line := await process.stderr.readline():
            if text := line.decode("utf-8", "replace").strip():
                self._said = [*self._said[-9:], text]
                log.warning(text, logger="envoy")
