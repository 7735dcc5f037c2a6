"""Faults of the log: a full disk, a full pipe, no reader. Every request is logged meanwhile."""

import asyncio
import os
import resource

from loadtests.faults.fault import Fault, World
from loadtests.faults.plan import ANSWER_SECONDS
from loadtests.faults.service import SMALL_DISK_BYTES, Launch, Log

UNREAD_SECONDS = ANSWER_SECONDS + 5
"""Longer than clients wait, so that a service that hangs meanwhile loses their requests."""


async def _fill_disk(world: World) -> None:
    filler = world.service.disk / "filler"
    with filler.open("wb") as stream:
        try:
            while True:
                os.write(stream.fileno(), bytes(4096))
        except OSError:
            world.notes.append("the disk was full")
    await asyncio.sleep(world.seconds)
    filler.unlink()


async def _limit_file(world: World) -> None:
    process, log = world.service.process(), world.service.log
    before = process.rlimit(resource.RLIMIT_FSIZE)
    process.rlimit(resource.RLIMIT_FSIZE, (log.stat().st_size if log else 0, before[1]))
    await asyncio.sleep(world.seconds)
    process.rlimit(resource.RLIMIT_FSIZE, before)


async def _leave_unread(world: World) -> None:
    world.service.stop_reading()
    await asyncio.sleep(max(world.seconds, UNREAD_SECONDS))
    world.service.read()


async def _close(world: World) -> None:
    world.service.close_reader()
    await asyncio.sleep(world.seconds)


async def _wait(world: World) -> None:
    await asyncio.sleep(world.seconds)


def _logging(log: Log) -> Launch:
    return Launch(flags=("--log-requests=all", "--log-level=info"), log=log)


def _no_small_disk() -> str | None:
    return None if os.geteuid() == 0 else "only root can mount a small disk (tmpfs)"


def log_faults() -> list[Fault]:
    """All of them."""
    return [
        Fault(
            name="log-disk-full",
            what=f"the log's disk, a tmpfs of {SMALL_DISK_BYTES >> 20} MiB, is full",
            act=_fill_disk,
            launch=_logging("small disk"),
            impossible=_no_small_disk(),
        ),
        Fault(
            name="log-file-limit",
            what="the log may not become larger (RLIMIT_FSIZE)",
            act=_limit_file,
            launch=_logging("file"),
        ),
        Fault(
            name="log-full-from-start",
            what="the process is started with standard error on /dev/full",
            act=_wait,
            launch=_logging("full"),
        ),
        Fault(name="log-unread", what="nobody reads the log's pipe", act=_leave_unread, launch=_logging("pipe")),
        Fault(name="stderr-closed", what="the log's pipe is closed by its reader", act=_close, launch=_logging("pipe")),
    ]
