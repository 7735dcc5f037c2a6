"""How an experiment runs: blocks in interleaved order, each with a fresh server, and each kept once it is measured."""

import hashlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadtests.experiment.arms import bundles, describe, flags_of
from loadtests.experiment.commits import checkout, own_repository, unknown_settings
from loadtests.experiment.engine_limit import engine_limit
from loadtests.experiment.environment import LOAD_AVERAGE
from loadtests.experiment.load_runner import apply_load, requests_of
from loadtests.experiment.model import Arm, Block, Experiment, Load, Progress
from loadtests.experiment.schedule import order
from loadtests.experiment.server import Server, ServerError, ServerStartError, running, service_for
from loadtests.experiment.store import Store, whole_rounds
from loadtests.generator import payload_cache
from loadtests.generator.load_result import LoadResult
from loadtests.generator.readers import Payload
from service.bundle import versions

SETTLE_SECONDS = 1.0
"""After the last load, before memory is read again."""

Measure = Callable[[Arm, Server, dict[str, Any], Progress], None]
"""Fills a block's info, little by little, with what it asks an arm's server."""
Serve = Callable[[Arm, Path], AbstractContextManager[Server]]
"""An arm's server, whose log is the path."""

_BASELINE = Path(__file__).parents[1] / "baseline"


class Bench:
    """Runs the blocks of an experiment and keeps them in `out/blocks`, and the servers' logs in `out/logs`.

    `describe` gives a block's facts about the arm's model; a bench with `measure` applies no loads, and needs no
    payloads. With `everything` each service serves all models. `serve` gives servers of a kind other than the arms say.
    """

    def __init__(
        self,
        experiment: Experiment[Any],
        payloads: Sequence[Payload],
        out: Path,
        *,
        describe: Callable[[Arm, Server, Path], dict[str, Any]] = describe,
        measure: Measure | None = None,
        everything: bool = False,
        serve: Serve | None = None,
    ) -> None:
        self.experiment, self.store = experiment, Store(out / "blocks")
        self._payloads, self._logs = payloads, out / "logs"
        self._describe, self._measure, self._everything = describe, measure, everything
        self._serve = serve or self._server
        self._sources: dict[str, Path] = {}
        self._started: set[str] = set()
        self._folder = Path()

    @contextmanager
    def opened(self, progress: Progress, *, fresh: bool, **chosen: Any) -> Iterator[dict[str, Any]]:
        """Prepare to measure; yields what the store has settled if the experiment is resumed.

        It is resumed if it was interrupted, and plan, payloads, bundles, code, machine and whatever else was `chosen`
        are the same; never with `fresh`. Raises StoreError or CommitError.
        """
        plan = self.experiment.plan
        settled = self.store.open({**self._fingerprint(), **chosen}, fresh=fresh)
        self._logs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="stridevit-load-") as folder:
            self._folder = Path(folder)
            payload_cache.save(self._payloads, self._folder)
            for arm in plan.arms:
                if arm.commit is None:
                    continue
                source = self._sources[arm.commit] = checkout(arm.commit, self._folder)
                if unknown := unknown_settings([*plan.service_arguments, *flags_of(arm)], source):
                    progress.note(f"warning: {arm.label} does not know {', '.join(unknown)}")
                if self._repository(arm) == plan.repository:
                    progress.note(f"warning: {arm.label} serves the present models, as it has no {plan.repository}")
            yield settled

    def _fingerprint(self) -> dict[str, Any]:
        plan, digest = self.experiment.plan, hashlib.sha256()
        for payload in self._payloads:
            digest.update(f"{payload.name}\0{payload.label}\0{len(payload.data)}\0".encode() + payload.data)
        facts = {name: value for name, value in self.experiment.environment.items() if name != LOAD_AVERAGE}
        models = bundles(plan.arms, plan.repository)
        return {**vars(plan), "payloads": digest.hexdigest(), "bundles": models, "environment": facts}

    def rounds(
        self,
        loads: Callable[[Arm], Sequence[Load]],
        progress: Progress,
        *,
        further_steps: int = 0,
        stop: Callable[[int], str | None] = lambda _: None,
    ) -> None:
        """Measure all blocks that the store does not hold in whole rounds, and fill `experiment.blocks`.

        `stop(round)` may end the experiment before a round, with a reason for `ended_early`. `further_steps` follow
        and count in the progress. Raises ServerError if an arm cannot be started at all.
        """
        experiment, plan = self.experiment, self.experiment.plan
        # What `measure` finds does not depend on when it is found.
        blocks = [(0, arm) for arm in plan.arms] if self._measure else order(plan.arms, plan.rounds, seed=plan.seed)
        kept = self.store.blocks() if self._measure else whole_rounds(self.store.blocks(), len(plan.arms))
        experiment.blocks = list(kept.values())
        self._started.update(block.arm for block in kept.values() if block.failure is None)
        for number, (round_number, arm) in enumerate(blocks):
            if number in kept:
                continue
            if number % len(plan.arms) == 0 and (reason := stop(round_number)):
                experiment.ended_early = reason
                return
            what = f"round {round_number + 1} of {plan.rounds}, {arm.label}"
            progress.step(what, number, len(blocks) + further_steps)
            if self._measure:
                block = self._measured_block(arm, round_number, self._measure, progress)
            else:
                block = self._block(arm, round_number, loads(arm))
            self.store.add(block, number)
            experiment.blocks.append(block)

    def _measured_block(self, arm: Arm, number: int, measure: Measure, progress: Progress) -> Block:
        """Whatever ends such a block early ends the experiment; what was found so far is reported, but not kept."""
        block = Block(arm=arm.label, round=number)
        try:
            with self.serving(arm, f"round{number + 1:02d}") as server:
                measure(arm, server, block.info, progress)
        except BaseException as error:
            if block.info:
                self.experiment.blocks.append(replace(block, failure=str(error) or "interrupted"))
            raise
        return block

    def _block(self, arm: Arm, number: int, loads: Sequence[Load]) -> Block:
        """Measure an arm in a round; a server that fails on the way loses the block."""
        try:
            return self._engine_block(arm, number) if arm.kind == "engine" else self._server_block(arm, number, loads)
        except ServerError as error:
            # An arm that could never be started never will be.
            if arm.label not in self._started and (isinstance(error, ServerStartError) or arm.kind == "engine"):
                raise
            return Block(arm=arm.label, round=number, failure=str(error))

    def _engine_block(self, arm: Arm, number: int) -> Block:
        plan, images = self.experiment.plan, self._folder / payload_cache.IMAGES
        info = engine_limit(arm.model, plan.repository, images, plan.seconds, plan.service_arguments)
        self._started.add(arm.label)
        return Block(arm=arm.label, round=number, info=info)

    def _server_block(self, arm: Arm, number: int, loads: Sequence[Load]) -> Block:
        results: dict[str, LoadResult] = {}
        saturated, seconds = 0.0, self.experiment.plan.seconds
        with self.serving(arm, f"round{number + 1:02d}") as server:
            info = self._describe(arm, server, self._repository(arm)) if arm.kind == "service" else {}
            idle_bytes = server.memory_bytes()
            for load in loads:
                # Every arm gets the same arrivals; they differ between rounds.
                result = self.apply(arm, server, load.at(saturated), seconds=seconds, seed=number)
                results[load.name] = result
                saturated = result.throughput if load.connections is not None else saturated
            time.sleep(SETTLE_SECONDS)
            after_bytes = server.memory_bytes()
            if not server.alive():
                raise server.died("after its loads")
        return Block(
            arm=arm.label, round=number, idle_bytes=idle_bytes, after_bytes=after_bytes, loads=results, info=info
        )

    def apply(self, arm: Arm, server: Server, load: Load, *, seconds: float, seed: int) -> LoadResult:
        """Put an arm's server under a load. Raises ServerError, also if a closed loop gets no answer.

        A closed loop without answers or failures is repeated once: the machine may have stood still for its seconds.
        """
        plan = self.experiment.plan
        requests = requests_of(self._folder, plan, arm.model)
        for _ in range(2):
            result = apply_load(
                server,
                requests,
                load,
                warmup_seconds=plan.warmup_seconds,
                seconds=seconds,
                seed=plan.seed + seed,
                cores=plan.generator_cores,
            )
            if load.connections is None or arm.kind == "refusing" or result.throughput:
                return result
            if result.errors:
                break
        raise ServerError(f"{server.name} answered nothing with 200:\n{server.log_tail()}\n(log: {server.log})")

    @contextmanager
    def serving(self, arm: Arm, purpose: str) -> Iterator[Server]:
        """The arm's server, fresh unless it runs elsewhere; the log is named by purpose and arm. Raises ServerError."""
        name = re.sub(r"[^\w.-]+", "-", arm.label)
        with self._serve(arm, self._logs / f"{purpose}-{name}.log") as server:
            self._started.add(arm.label)
            yield server

    def _server(self, arm: Arm, log: Path) -> AbstractContextManager[Server]:
        cores = self.experiment.plan.server_cores
        if arm.kind == "refusing":
            command = [sys.executable, str(_BASELINE / "refusing.py"), "--port"]
            return running(command, name="the refusing server", log=log, cores=cores)
        repository, models = self._repository(arm), None if self._everything else arm.model
        if arm.kind == "plain":
            if not (published := versions(repository, arm.model)):
                raise ServerStartError(f"model {arm.model!r}: no version of it in {repository}")
            bundle = repository / arm.model / str(published[-1])
            plain = [sys.executable, str(_BASELINE / "plain_fastapi.py"), str(bundle), "--port"]
            return running(plain, name=f"the plain server for {arm.model}", log=log, cores=cores)
        flags = [*self.experiment.plan.service_arguments, *flags_of(arm)]
        source = self._sources[arm.commit] if arm.commit else None
        return service_for(
            models, repository=repository, log=log, arguments=flags, url=arm.url, source=source, cores=cores
        )

    def _repository(self, arm: Arm) -> Path:
        repository: Path = self.experiment.plan.repository
        return repository if arm.commit is None else own_repository(repository, self._sources[arm.commit])
