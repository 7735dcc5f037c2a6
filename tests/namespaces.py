"""Two machines in one: network namespaces joined by a veth pair, each with an address and no other way out."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.processes import PATIENCE_SECONDS

REQUIRED = os.environ.get("STRIDEVIT_NAMESPACE_TESTS") == "required"
INTERFACE = "eth0"
"""The name of each machine's end of the pair."""
_PREFIX_BITS = 24
_ADDRESSES = ("192.0.2.1", "192.0.2.2")  # RFC 5737: in use nowhere


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A network namespace. It shares everything else with this machine: files, users, process ids."""

    address: str
    holder: int
    """The process that keeps the namespace alive."""

    def command(self, *words: str) -> list[str]:
        """`words`, to be run on this machine."""
        return ["nsenter", f"--net=/proc/{self.holder}/ns/net", "--", *words]

    def run(self, *words: str) -> str:
        """Run a short command to its end: what it prints. Raises CalledProcessError, with its errors as a note."""
        try:
            ended = subprocess.run(
                self.command(*words), check=True, capture_output=True, text=True, timeout=PATIENCE_SECONDS
            )
        except subprocess.CalledProcessError as error:
            error.add_note(error.stderr)
            raise
        return ended.stdout

    def processes(self) -> list[psutil.Process]:
        """All that run here, without the holder."""
        network = _network(self.holder)
        return [one for one in psutil.process_iter() if one.pid != self.holder and _network(one.pid) == network]

    def kill(self) -> None:
        """End all processes at once, as a crash of the machine would."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while running := self.processes():
            for process in running:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            assert time.monotonic() < deadline, f"not ended by SIGKILL: {running}"
            time.sleep(0.05)


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Two machines that reach only each other. They and their processes end with the block, or with this process.

    Skips the test where namespaces are not allowed; fails it there if STRIDEVIT_NAMESPACE_TESTS=required.
    """
    if reason := _missing():
        assert not REQUIRED, reason
        pytest.skip(reason)
    with ExitStack() as stack:
        first, second = (stack.enter_context(_machine(address)) for address in _ADDRESSES)
        pair = ["type", "veth", "peer", "name", INTERFACE, "netns", str(second.holder)]
        subprocess.run(["ip", "link", "add", INTERFACE, "netns", str(first.holder), *pair], check=True)
        for machine in (first, second):
            machine.run("ip", "address", "add", f"{machine.address}/{_PREFIX_BITS}", "dev", INTERFACE)
            machine.run("ip", "link", "set", INTERFACE, "up")
            machine.run("ip", "link", "set", "lo", "up")
        yield first, second


@contextmanager
def _machine(address: str) -> Iterator[Machine]:
    # The kernel removes a namespace with its last process, and the pair with a namespace: nothing to be left behind.
    # `cat` ends with this process even if that is killed, because the pipe does.
    with subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as holder:
        try:
            while _network(holder.pid) in (None, _network(os.getpid())):
                assert holder.poll() is None, "unshare ended"
                time.sleep(0.01)
            machine = Machine(address=address, holder=holder.pid)
            try:
                yield machine
            finally:
                machine.kill()
        finally:
            holder.kill()


def _network(pid: int) -> int | None:
    """The namespace of a process; None if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    return None


def _missing() -> str:
    """Why there can be no namespaces here, or ""."""
    absent = [tool for tool in ("ip", "nsenter", "unshare") if not shutil.which(tool)]
    if absent:
        return f"needs network namespaces: {', '.join(absent)} not found (Debian: iproute2, util-linux)"
    pair: Sequence[str] = ("unshare", "--net", "ip", "link", "add", "one", "type", "veth", "peer", "name", "two")
    tried = subprocess.run(pair, check=False, capture_output=True, text=True)
    if tried.returncode:
        return f"needs network namespaces, which only root may make: {tried.stderr.strip()}"
    return ""
