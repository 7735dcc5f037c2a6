"""What a fault is, and what it can do to the service."""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from loadtests.experiment.process import end, start
from loadtests.faults.load import Load
from loadtests.faults.models import Kind
from loadtests.faults.service import Launch, Service

ELSEWHERE = "elsewhere"
"""Folder beside the repository."""


@dataclass(kw_only=True)
class World:
    """A service under a steady load, and what was found out about it."""

    service: Service
    load: Load
    seconds: float
    """Duration of a fault that can last for any time."""
    notes: list[str] = field(default_factory=list)
    """Facts for the report."""
    unmet: list[str] = field(default_factory=list)
    """What should have happened and did not."""

    async def guilty(self, every_s: float) -> None:
        """Send guilty images for as long as the fault lasts, and note the statuses of their answers."""
        sent = []
        ends_at = time.monotonic() + self.seconds
        while time.monotonic() < ends_at:
            sent.append(asyncio.create_task(self.load.send_guilty()))
            await asyncio.sleep(every_s)
        statuses = await asyncio.gather(*sent)
        counts = {status: statuses.count(status) for status in sorted(set(statuses))}
        said = ", ".join(f"{count} × {status or 'no answer'}" for status, count in counts.items())
        self.notes.append(f"guilty images: {said}")
        if bad := counts.keys() & {0, 200}:
            self.unmet.append(f"guilty images got {' and '.join('200' if one else 'no answer' for one in sorted(bad))}")

    async def attack(self, name: str) -> None:
        """Run one of `loadtests.faults.attacks` in a process of its own for as long as the fault lasts."""
        async with self.attacking(name):
            await asyncio.sleep(self.seconds)

    @asynccontextmanager
    async def attacking(self, name: str) -> AsyncIterator[None]:
        """Run it until the block ends; then what it printed becomes notes."""
        command = [sys.executable, "-m", "loadtests.faults.attacks", name, str(self.service.port)]
        with start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                yield
            finally:
                end(process)
                said, errors = await asyncio.to_thread(process.communicate)
                self.notes += said.splitlines()
                if "Traceback" in errors:
                    self.unmet.append(f"the attack {name} failed: {errors.strip().splitlines()[-1]}")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault, and what the service promises under it."""

    name: str
    what: str
    """What is done, in words."""
    act: Callable[[World], Awaitable[None]]
    """Begin the fault, wait, and undo it. May raise `NotRun`."""
    elsewhere: Kind | None = None
    """A model that is published before the load begins, beside the repository: in `act` it would delay the load."""
    model: Kind = "numbered"
    """The model that the load asks for."""
    launch: Launch = field(default_factory=Launch)
    survives: bool = True
    """Whether the process must survive: then nothing may be lost."""
    spares_others: bool = False
    """Whether only guilty images may fail."""
    impossible: str | None = None
    """Why it cannot be done on this machine, if that is known beforehand."""
