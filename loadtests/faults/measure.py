"""One fault, from a fresh service under a steady load to its recovery."""

import asyncio
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from loadtests.experiment.model import Arm, Progress
from loadtests.experiment.sending import run_interruptibly
from loadtests.experiment.server import Server, ServerError
from loadtests.faults.client import Client
from loadtests.faults.fault import ELSEWHERE, Fault, World
from loadtests.faults.figures import summarise
from loadtests.faults.load import Load, Sample
from loadtests.faults.models import publish_numbered
from loadtests.faults.plan import ANSWER_SECONDS, DEADLINE_MS, FaultPlan, FaultResult
from loadtests.faults.service import NotRun, Service

WARMUP_SECONDS = 1.0
"""Warm-up of the load, not sampled."""
_LONGEST_SECONDS = 180.0
"""A fault that is not over by then is given up."""


class FaultRunner:
    """Serves and measures the arms of a `FaultPlan`; the bench calls `serve` and then `measure` for each."""

    def __init__(self, plan: FaultPlan, faults: dict[str, Fault], scratch: Path) -> None:
        """The plan's repository holds the models; `scratch` is an empty folder."""
        self._plan, self._faults, self._scratch = plan, faults, scratch

    @contextmanager
    def serve(self, arm: Arm, log: Path) -> Iterator[Server]:
        """A service with a repository of its own, which `measure` starts."""
        fault = self._faults[arm.label]
        folder = self._scratch / arm.label
        repository = folder / "models"
        for model in {fault.model, "numbered-other"}:
            shutil.copytree(self._plan.repository / model, repository / model)
        if fault.elsewhere:
            publish_numbered(folder / ELSEWHERE, fault.elsewhere)
        flags = (*self._plan.service_arguments, *fault.launch.flags)
        try:
            yield Service(repository, folder, log, replace(fault.launch, flags=flags))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def measure(self, arm: Arm, server: Server, info: dict[str, Any], progress: Progress) -> None:
        """Put the result of a fault into `info`."""
        assert isinstance(server, Service)  # noqa: S101 (from `serve`)
        fault = self._faults[arm.label]
        result = FaultResult(
            fault=fault.name, what=fault.what, survives=fault.survives, spares_others=fault.spares_others
        )
        try:
            with server.opened():
                result = run_interruptibly(self._run(fault, server, result))
        except NotRun as reason:
            result = replace(result, not_run=str(reason))
        except ServerError as error:
            result = replace(result, unmet=(str(error).strip(),))
        for text in result.broken:
            progress.note(f"{fault.name}: {text}")
        info["result"] = asdict(result)

    async def _run(self, fault: Fault, service: Service, result: FaultResult) -> FaultResult:
        plan = self._plan
        client = Client("127.0.0.1", service.port, answer_seconds=ANSWER_SECONDS)
        samples: list[Sample] = []
        load = Load(client, fault.model, deadline_ms=plan.deadline_ms or DEADLINE_MS, keep=samples.append)
        world = World(service=service, load=load, seconds=plan.seconds)
        service.read()
        stop = asyncio.Event()
        sending = asyncio.create_task(load.open_loop(plan.rate, stop, seed=f"{plan.seed}-{fault.name}"))
        watching = [asyncio.create_task(work) for work in (service.supervise(), service.watch_memory())]
        try:
            await asyncio.sleep(WARMUP_SECONDS)
            samples.clear()
            await asyncio.sleep(plan.seconds)
            began = time.monotonic()
            await _act(fault, world)
            ended = time.monotonic()
            if not await service.ready():
                world.unmet.append("it was not ready two minutes after the fault")
            after = time.monotonic()
            await asyncio.sleep(plan.seconds)
            stop.set()
            await sending
            peak = service.peak_bytes
        finally:
            for task in (sending, *watching):
                task.cancel()
            failures = await asyncio.gather(sending, *watching, return_exceptions=True)
            service.stop_reading()
            client.close()
        for failure in failures:
            if isinstance(failure, Exception):
                raise failure
        figures = summarise(result, samples, began_s=began, ended_s=ended, after_s=after, ends=service.ends)
        found: dict[str, Any] = {**figures, "peak_bytes": peak}
        return FaultResult(**{**found, "notes": tuple(world.notes), "unmet": tuple(world.unmet)})


async def _act(fault: Fault, world: World) -> None:
    try:
        async with asyncio.timeout(_LONGEST_SECONDS):
            await fault.act(world)
    except TimeoutError:
        world.unmet.append(f"the fault was given up after {_LONGEST_SECONDS:.0f} s")
