"""Faults of the process and its machine: signals, memory, descriptors, the clock."""

import asyncio
import resource
import signal
from pathlib import Path

from loadtests.faults.fault import Fault, World
from loadtests.faults.service import Launch

STOPPED_SECONDS = 5.0
OPEN_FILES = 128
"""Limit of open files; `attacks.idle` opens more connections than that."""
_SPARE_BYTES = 64 * 2**20
_CLOCK_STEPS = ("+3600", "-7200", "+0")
_FAKETIME = ("/usr/lib/*/faketime/libfaketimeMT.so.1", "/usr/lib*/faketime/libfaketimeMT.so.1")


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
    clock = Path(dict(world.service.launch.variables)["FAKETIME_TIMESTAMP_FILE"])
    for step in _CLOCK_STEPS:
        _set(clock, step)
        await asyncio.sleep(world.seconds / len(_CLOCK_STEPS))


def _set(clock: Path, step: str) -> None:
    clock.write_text(f"{step}\n", encoding="ascii")


def _faketime() -> Path | None:
    root = Path("/")
    return next((path for pattern in _FAKETIME for path in sorted(root.glob(pattern[1:]))), None)


def _clock_launch(clock: Path) -> Launch:
    variables = {
        "LD_PRELOAD": str(_faketime()),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_CACHE_DURATION": "1",
        # An administrator who sets the clock changes the wall clock only.
        "DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    return Launch(variables=tuple(variables.items()))


def process_faults(scratch: Path) -> list[Fault]:
    """All of them; `scratch` is a folder for files that they need."""
    clock = scratch / "clock"
    _set(clock, "+0")
    no_faketime = "libfaketime is not installed (Debian: apt-get install faketime)"
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
            launch=_clock_launch(clock),
            impossible=lambda: None if _faketime() else no_faketime,
        ),
    ]
