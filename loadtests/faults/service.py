"""The service under faults: started as a fault needs it, restarted when it ends, and its ends recorded."""

import asyncio
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from loadtests.experiment.http_get import get
from loadtests.experiment.process import Child, end, start
from loadtests.experiment.server import Server, free_port, wait_until_ready
from service.host import process_tree, process_tree_bytes

MEMORY_BYTES = 12 * 2**30
"""Limit of every service's address space: the memory that a fault makes it take must not take down the machine."""
SMALL_DISK_BYTES = 2**20
PIPE_BYTES = 4096

_POLL_SECONDS = 0.05
_RESTART_SECONDS = 0.2
_READY_SECONDS = 120.0
_END_SECONDS = 60.0

Log = Literal["file", "pipe", "full", "small disk"]
"""Where standard error goes: a file; a pipe that is read until told otherwise; /dev/full; a file on a disk of 1 MiB."""


class NotRun(Exception):
    """A fault cannot be done on this machine; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a service is started."""

    flags: tuple[str, ...] = ()
    log: Log = "file"
    open_files: int | None = None
    variables: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class End:
    """A process that ended."""

    at_s: float
    """Of `time.monotonic`."""
    code: int
    """Negative for a signal."""
    by: str | None
    """The signal that the harness sent, if it did."""


class Service(Server):
    """One address, at which one process after the other serves."""

    def __init__(self, repository: Path, scratch: Path, log: Path, launch: Launch) -> None:
        self.port, self.launch, self.ends = free_port(), launch, list[End]()
        super().__init__(f"http://127.0.0.1:{self.port}", name="the service", log=log)
        self.repository, self.disk = repository, scratch / "disk"
        self._child: Child | None = None
        self._signalled: str | None = None
        self._ended = asyncio.Event()
        self._resources = ExitStack()
        self._read_end: int | None = None
        self._write_end = -1
        self.peak_bytes = 0

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Start it; at the end of the block it is stopped. Raises ServerStartError or NotRun."""
        with self._resources:
            self._write_end = self._open_log()
            try:
                self.start()
                wait_until_ready(self)
                yield
            finally:
                if self._child:
                    end(self._child)

    def start(self) -> None:
        """Start a process, without waiting for it."""
        command = [sys.executable, "-m", "service", "--repository", str(self.repository), "--port", str(self.port)]
        command.append("--log-level=warning")
        limits = [f"ulimit -v {MEMORY_BYTES // 1024}"]
        if self.launch.open_files:
            limits.append(f"ulimit -n {self.launch.open_files}")
        # The shell becomes the service (exec), so the process stays the one that was started.
        shell = ["/bin/sh", "-c", " && ".join([*limits, 'exec "$@"']), "sh"]
        variables = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", **dict(self.launch.variables)}
        self._child = self._process = start(
            [*shell, *command, *self.launch.flags],
            stdout=subprocess.DEVNULL,
            stderr=self._write_end,
            environment=variables,
        )
        self.pid = self._child.pid

    def signal(self, number: int, name: str) -> None:
        """Send a signal that ends the process."""
        self._signalled = name
        if self._child:
            self._child.send_signal(number)

    async def supervise(self) -> None:
        """Restart it whenever it ends, as a supervisor would, until cancelled."""
        while True:
            if self._child and (code := self._child.poll()) is not None:
                self.ends.append(End(at_s=time.monotonic(), code=code, by=self._signalled))
                self._signalled = None
                self._ended.set()
                await asyncio.sleep(_RESTART_SECONDS)
                self.start()
            await asyncio.sleep(_POLL_SECONDS)

    async def watch_memory(self) -> None:
        """Keep `peak_bytes` up to date until cancelled."""
        while True:
            if self.pid is not None:
                self.peak_bytes = max(self.peak_bytes, await asyncio.to_thread(_memory, self.pid))
            await asyncio.sleep(0.3)

    async def ended(self, count: int, *, seconds: float = _END_SECONDS) -> bool:
        """Wait until that many processes have ended; False if they have not within `seconds`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while len(self.ends) < count:
                    self._ended.clear()
                    await self._ended.wait()
        return len(self.ends) >= count

    async def ready(self, *, seconds: float = _READY_SECONDS) -> bool:
        """Wait until /readyz answers with 200; False if it does not within `seconds`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    try:
                        await asyncio.to_thread(get, self.url + "/readyz", timeout=2)
                        return True
                    except OSError:
                        await asyncio.sleep(0.1)
        return False

    def process(self) -> psutil.Process:
        """The present process."""
        return psutil.Process(self.pid)

    def stop_reading(self) -> None:
        """Leave the pipe of the log unread."""
        if self._read_end is not None:
            asyncio.get_running_loop().remove_reader(self._read_end)

    def read(self) -> None:
        """Read the pipe of the log, as at the start of a fault's load."""
        if self._read_end is not None:
            asyncio.get_running_loop().add_reader(self._read_end, self._drain, self._read_end)

    def close_reader(self) -> None:
        """Close the reading end of the pipe: writing gives EPIPE."""
        if self._read_end is not None:
            self.stop_reading()
            os.close(self._read_end)
            self._read_end = None

    def _drain(self, read_end: int) -> None:
        with suppress(BlockingIOError):
            data = os.read(read_end, 1 << 16)
            if self.log and data:
                with self.log.open("ab") as stream:
                    stream.write(data)

    def _open_log(self) -> int:
        """The descriptor that becomes standard error."""
        if self.log is None or self.launch.log == "file":
            return self._keep(os.open(self.log or os.devnull, os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_WRONLY))
        self.log.write_bytes(b"")
        if self.launch.log == "full":
            return self._keep(os.open("/dev/full", os.O_WRONLY))
        if self.launch.log == "pipe":
            self._read_end, write_end = os.pipe()
            os.set_blocking(self._read_end, False)
            # One page, so that an unread pipe is full after a few lines.
            fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            self._resources.callback(self._close_read_end)
            return self._keep(write_end)
        _mount_small_disk(self.disk)
        self._resources.callback(_unmount, self.disk)
        self.log = self.disk / "log"
        return self._keep(os.open(self.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY))

    def _keep(self, descriptor: int) -> int:
        self._resources.callback(os.close, descriptor)
        return descriptor

    def _close_read_end(self) -> None:
        if self._read_end is not None:
            os.close(self._read_end)


def _memory(pid: int) -> int:
    """The larger of the present memory of a process tree, and the largest resident memory of its first process."""
    peak = 0
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        peak = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
    return max(peak, process_tree_bytes(pid) if process_tree(pid) else 0)


def _mount_small_disk(folder: Path) -> None:
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        raise NotRun("only root can mount a small disk (tmpfs)")
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={SMALL_DISK_BYTES}"
    done = subprocess.run(  # noqa: S603 (no untrusted input)
        [mount, "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise NotRun(f"a small disk (tmpfs) cannot be mounted: {done.stderr.strip()}")


def _unmount(folder: Path) -> None:
    unmount = shutil.which("umount") or "umount"
    subprocess.run([unmount, "--lazy", str(folder)], capture_output=True, check=False)  # noqa: S603
