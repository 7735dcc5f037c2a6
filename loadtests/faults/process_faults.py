"""Faults of the process and its machine: signals, memory, descriptors, the clock."""

import asyncio
import resource
import shutil
import signal
import struct
import subprocess
from pathlib import Path

from loadtests.faults.fault import Fault, World
from loadtests.faults.service import Launch

STOPPED_SECONDS = 5.0
OPEN_FILES = 128
"""Limit of open files; `attacks.idle` opens more connections than that."""
_SPARE_BYTES = 64 * 2**20
_CLOCK_STEPS = (3600, -3600, 0)
"""Offsets from the true time in seconds."""
_CLOCK_VARIABLE = "FAULTS_CLOCK"
"""Read by clock.c."""


async def _terminate(world: World) -> None:
    world.service.signal(signal.SIGTERM, "SIGTERM")
    if not await world.service.ended(1):
        world.unmet.append("it had not ended 60 s after SIGTERM, and was killed")
        world.service.signal(signal.SIGKILL, "SIGKILL")
        await world.service.ended(1)
    elif world.service.ends[0].code != 0:
        world.unmet.append(f"it ended with {world.service.ends[0].code} after SIGTERM, not with 0")


async def _kill(world: World) -> None:
    world.service.signal(signal.SIGKILL, "SIGKILL")
    await world.service.ended(1)


async def _stop(world: World) -> None:
    process = world.service.process()
    process.suspend()
    await asyncio.sleep(STOPPED_SECONDS)
    process.resume()


async def _limit_memory(world: World) -> None:
    process = world.service.process()
    before = process.rlimit(resource.RLIMIT_AS)
    process.rlimit(resource.RLIMIT_AS, (process.memory_info().vms + _SPARE_BYTES, before[1]))
    try:
        await world.attack("large_images")
    finally:
        if process.is_running():
            process.rlimit(resource.RLIMIT_AS, before)


async def _step_clock(world: World) -> None:
    clock = Path(dict(world.service.launch.variables)[_CLOCK_VARIABLE])
    for step in _CLOCK_STEPS:
        _set_clock(clock, step)
        await asyncio.sleep(world.seconds / len(_CLOCK_STEPS))


def _set_clock(clock: Path, seconds: int) -> None:
    with clock.open("r+b" if clock.exists() else "wb") as stream:
        stream.write(struct.pack("q", seconds))


def _make_clock(scratch: Path) -> tuple[Launch, str | None]:
    """A launch in which the wall clock of the service can be moved; or why it cannot."""
    if not (compiler := shutil.which("cc")):
        return Launch(), "needs a C compiler (cc), to build what moves a process's clock"
    library, clock = scratch / "clock.so", scratch / "clock"
    command = [compiler, "-shared", "-fPIC", "-o", str(library), str(Path(__file__).with_name("clock.c"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (no untrusted input)
    if done.returncode:
        return Launch(), f"what moves a process's clock cannot be built: {done.stderr.strip()}"
    _set_clock(clock, 0)
    return Launch(variables=(("LD_PRELOAD", str(library)), (_CLOCK_VARIABLE, str(clock)))), None


def process_faults(scratch: Path) -> list[Fault]:
    """All of them; `scratch` is a folder for files that they need."""
    clock_launch, no_clock = _make_clock(scratch)
    return [
        Fault(
            name="sigterm",
            what="SIGTERM; a supervisor starts the process again. Connections are refused in between",
            act=_terminate,
            survives=False,
        ),
        Fault(
            name="sigkill",
            what="SIGKILL; a supervisor starts the process again",
            act=_kill,
            survives=False,
        ),
        Fault(name="sigstop", what=f"SIGSTOP, and SIGCONT {STOPPED_SECONDS:g} s later", act=_stop),
        Fault(
            name="memory-limit",
            what=f"address space limited to {_SPARE_BYTES >> 20} MiB more than it has, and PNGs of 25 megapixels",
            act=_limit_memory,
        ),
        Fault(
            name="descriptors",
            what=f"a limit of {OPEN_FILES} open files, and 400 idle connections",
            act=lambda world: world.attack("idle"),
            launch=Launch(open_files=OPEN_FILES),
        ),
        Fault(
            name="clock-step",
            what="the wall clock jumps an hour ahead, two hours back, and home",
            act=_step_clock,
            launch=clock_launch,
            impossible=no_clock,
        ),
    ]
