"""A long run with numbered images: each answer is checked against its request, while models and clients come and go."""

import asyncio
import itertools
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadtests.experiment.model import Arm, Progress
from loadtests.experiment.sending import run_interruptibly
from loadtests.experiment.server import Server
from loadtests.faults.client import Client, Outcome
from loadtests.faults.fault import World
from loadtests.faults.load import Load, Sample
from loadtests.faults.mild import MILD_LAUNCH, mild_faults
from loadtests.faults.models import make_models
from loadtests.faults.plan import ANSWER_SECONDS, DEADLINE_MS
from loadtests.faults.service import Service
from loadtests.soak.soak import SAMPLES, SoakPlan
from loadtests.soak.watch import Watch

MODEL = "numbered"
CONNECTIONS = 16
FAULT_EVERY_SECONDS = 60.0
FAULT_SECONDS = 5.0
SETTLING_SECONDS = 15.0
"""After a fault, before readings count as calm again."""

_STEP_SECONDS = 0.2


class NumberedRun:
    """Serves and measures the one arm of a soak without `--model`."""

    def __init__(self, plan: SoakPlan, scratch: Path) -> None:
        self._plan, self._scratch = plan, scratch

    @contextmanager
    def serve(self, _arm: Arm, log: Path) -> Iterator[Server]:
        """The service, with the models of the faults. Raises ServerError."""
        repository = self._scratch / "models"
        make_models(repository)
        for model in sorted(repository.iterdir()):
            if model.name not in (MODEL, "numbered-other"):
                shutil.rmtree(model)
        flags = (*MILD_LAUNCH.flags, *self._plan.service_arguments)
        service = Service(repository, self._scratch, log, replace(MILD_LAUNCH, flags=flags))
        with service.opened():
            yield service

    def measure(self, _arm: Arm, server: Server, info: dict[str, Any], progress: Progress) -> None:
        """Put readings, counts and notes into `info`, little by little."""
        assert isinstance(server, Service)  # noqa: S101 (from `serve`)
        run_interruptibly(self._run(server, info, progress))

    async def _run(self, service: Service, info: dict[str, Any], progress: Progress) -> None:
        plan, watch, counts = self._plan, Watch(service), Counter[Outcome]()
        watch.read(0)
        info |= {"samples": watch.readings, "counts": {}, "exit_codes": [], "notes": [], "unmet": []}

        def keep(sample: Sample) -> None:
            counts[sample.outcome] += 1
            if sample.outcome is Outcome.ANSWERED:
                watch.answered(sample.latency_ms)

        client = Client("127.0.0.1", service.port, answer_seconds=ANSWER_SECONDS)
        load = Load(client, MODEL, deadline_ms=DEADLINE_MS, keep=keep)
        world = World(service=service, load=load, seconds=FAULT_SECONDS)
        stop, calm = asyncio.Event(), _Calm()
        if plan.rate is not None:
            sending = asyncio.create_task(load.open_loop(plan.rate, stop, seed=str(plan.seed)))
        else:
            left = itertools.count(plan.requests or 0, -1)
            sending = asyncio.create_task(
                load.closed_loop(CONNECTIONS, lambda: stop.is_set() or bool(plan.requests and next(left) <= 0))
            )
        others = [asyncio.create_task(service.supervise())]
        if plan.faults:
            others.append(asyncio.create_task(_faults(world, calm)))
        try:
            await self._read_on(watch, counts, sending, stop, calm, progress)
            await sending
            watch.read(counts.total(), calm=calm.now)
        finally:
            for task in (sending, *others):
                task.cancel()
            failures = await asyncio.gather(sending, *others, return_exceptions=True)
            client.close()
            info["counts"] = {str(outcome): counts[outcome] for outcome in Outcome}
            info["requests"] = counts.total()
            info["exit_codes"] = [end.code for end in service.ends]
            info["notes"], info["unmet"] = _condensed(world.notes), world.unmet
        for failure in failures:
            if isinstance(failure, Exception):
                raise failure

    async def _read_on(
        self,
        watch: Watch,
        counts: Counter[Outcome],
        sending: "asyncio.Task[None]",
        stop: asyncio.Event,
        calm: "_Calm",
        progress: Progress,
    ) -> None:
        """Take readings until the requests are sent, or the time is over."""
        plan = self._plan
        seconds = (plan.minutes or 0) * 60
        began = read_at = time.monotonic()
        read_after = 0
        while not sending.done():
            await asyncio.sleep(_STEP_SECONDS)
            now, sent = time.monotonic(), counts.total()
            by_time = seconds and now - read_at >= seconds / SAMPLES
            by_count = plan.requests and sent - read_after >= plan.requests / SAMPLES
            if by_time or by_count:
                await asyncio.to_thread(watch.read, sent, calm=calm.now)
                read_at, read_after = now, sent
                progress.step("requests" if plan.requests else "seconds", *_done(plan, sent, now - began))
            if seconds and now - began >= seconds:
                stop.set()
                return


class _Calm:
    """Whether no fault is active or has just ended."""

    def __init__(self) -> None:
        self._fault, self._ended_at = False, -SETTLING_SECONDS

    @property
    def now(self) -> bool:
        return not self._fault and time.monotonic() - self._ended_at >= SETTLING_SECONDS

    @contextmanager
    def disturbed(self) -> Iterator[None]:
        self._fault = True
        yield
        self._fault, self._ended_at = False, time.monotonic()


async def _faults(world: World, calm: _Calm) -> None:
    """One mild fault a minute, in turn, until cancelled."""
    for number, fault in enumerate(itertools.cycle(mild_faults()), start=1):
        await asyncio.sleep(FAULT_EVERY_SECONDS - FAULT_SECONDS if number > 1 else FAULT_EVERY_SECONDS / 2)
        with calm.disturbed():
            world.notes.append(fault.name)
            await fault.act(world)


def _condensed(notes: list[str]) -> list[str]:
    """Equal notes only once, with their count."""
    return [f"{count} × {note}" for note, count in Counter(notes).items()]


def _done(plan: SoakPlan, sent: int, seconds: float) -> tuple[float, float]:
    return (sent, plan.requests) if plan.requests else (round(seconds), (plan.minutes or 0) * 60)
