"""The models that are served: found in the repository, proven, warmed up, and exchanged while serving.

A version takes traffic only once its digests and golden outputs are checked and every batch size is warmed up. A
broken version leaves the old one serving and says why in the index. An unloaded one first answers what it accepted.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import structlog

from service.bundle import Bundle, model_names, read_bundle, versions
from service.engine import Engine, Tuning, resolve_device
from service.engine_timer import time_runs
from service.errors import BundleError, NotReady, ServiceError, StartupError, UnknownModel
from service.host import resident_bytes
from service.models.family import Family
from service.models.model import Model
from service.models.verify import prove
from service.scheduling.cost import Cost, Load, candidate_sizes, worthwhile_sizes
from service.scheduling.scheduler import Queue, Scheduler
from service.settings import Settings

log = structlog.get_logger()

State = Literal["ready", "loading", "unloading", "unavailable"]

_TIMINGS, _TIMING_SECONDS = 5, 0.5
"""Of each batch size at warm-up: so many, unless they take longer together."""

_WORTH_A_THREAD, _LONG_SECONDS = 1.25, 0.02
"""More threads must make a single image faster by this factor, else they only wait for each other, and for the decoders
on the same cores. A model that takes this long gains from them in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A version in the index."""

    name: str
    version: int | None
    """None where not even that is known."""
    state: State
    reason: str = ""


@dataclass(slots=True, kw_only=True)
class _Found:
    """What a look at one model in the repository gave."""

    published: list[int]
    loaded: list[Model] = field(default_factory=list)
    wanted: set[int] = field(default_factory=set)
    """Versions that shall serve: those just loaded, and those that go on."""
    failures: list[str] = field(default_factory=list)


class Registry:
    """Ready models by name and version, families, and the reasons of what could not be loaded.

    `load_all` blocks and is for the start; `load`, `unload` and `refresh` are for the event loop, while serving.
    """

    def __init__(self, settings: Settings, scheduler: Scheduler, load: Load, *, threads: int) -> None:
        """Raises StartupError if the device cannot be had."""
        self._settings, self._scheduler, self._load, self._threads = settings, scheduler, load, threads
        self._device, self._number = resolve_device(settings.device)
        self._models: dict[str, dict[int, Model]] = {}
        self._entries: dict[tuple[str, int | None], Entry] = {}
        self._families: dict[str, Family] = {}
        self._unloaded: set[str] = set()
        """Unloaded by request: polling leaves them alone."""
        self._exchange = asyncio.Lock()
        self._ladders: dict[str, list[Model]] | None = None
        """The families, until the models change."""

    @property
    def ready(self) -> list[Model]:
        """Every model that takes traffic, by name and version."""
        return [self._models[name][version] for name in sorted(self._models) for version in sorted(self._models[name])]

    @property
    def index(self) -> list[Entry]:
        """Everything that is or could be served, and what became of it."""
        return sorted(self._entries.values(), key=lambda entry: (entry.name, entry.version or 0))

    @property
    def default(self) -> str | None:
        """What answers a request that names no model: as the settings say, else the most accurate one."""
        if self._settings.default_model is not None:
            return self._settings.default_model
        newest = [self._newest(name) for name in sorted(self._models)]
        return max(newest, key=lambda model: model.top1).name if newest else None

    def find(self, name: str | None, version: int | None = None) -> Model:
        """A model by its name, the default one for None; the newest version unless one is named.

        Raises UnknownModel naming those there are, or NotReady while the model is being loaded.
        """
        wanted = name or self.default
        if wanted is None:
            raise NotReady("no model is loaded: load one, then retry")
        ready = self._models.get(wanted, {})
        if version is None and ready:
            return self._newest(wanted)
        if version in ready:
            return ready[version]
        known = [entry for entry in self.index if entry.name == wanted and version in (None, entry.version)]
        if any(entry.state == "loading" for entry in known):
            raise NotReady(f"model {wanted!r} is being loaded: retry")
        if known:
            raise UnknownModel(f"model {wanted!r} is {known[-1].state}: {known[-1].reason or 'ask later'}")
        if ready:
            raise UnknownModel(f"model {wanted!r} has no version {version} here; there are: {_listed(ready)}")
        names, families = _listed(self._models) or "none", _listed(self.families) or "none"
        raise UnknownModel(f"no model {wanted!r} here; there are: {names}; families: {families}")

    @property
    def families(self) -> dict[str, list[Model]]:
        """Models of which one may stand in for another, the most accurate first.

        Only those of known accuracy, and with the labels and the input of the most accurate one.
        """
        if self._ladders is None:
            self._ladders = self._find_families()
        return self._ladders

    def _find_families(self) -> dict[str, list[Model]]:
        found: dict[str, list[Model]] = {}
        newest = (self._newest(name) for name in sorted(self._models))
        for model in sorted(newest, key=lambda model: -model.top1):
            if model.top1 >= 0:
                members = found.setdefault(model.manifest.family, [])
                if not members or _alike(members[0], model):
                    members.append(model)
        return found

    def family(self, name: str) -> tuple[Family, list[Model]] | None:
        """A family and its ladder; None if there is no such family, or a model has that very name."""
        if name in self._models or name not in (families := self.families):
            return None
        return self._families.setdefault(name, Family(name, recover=self._settings.step_up_headroom)), families[name]

    def load_all(self) -> None:
        """Load what the settings ask for. Blocks.

        A broken bundle is logged and left out. Raises StartupError if it was asked for by name, or if nothing is left.
        """
        try:
            names = list(self._settings.models) or model_names(self._settings.repository)
        except BundleError as error:
            raise StartupError(str(error)) from error
        for name in names:
            found = self._read(name, fresh=True)
            self._admit(found)
            if not found.wanted and name in self._settings.models:
                raise StartupError(f"model {name!r}: {found.failures[-1]}")
        if not self._models:
            raise StartupError(f"no model can be served from {self._settings.repository}: see the log above")
        default = self._settings.default_model
        if default is not None and default not in self._models:
            raise StartupError(f"default_model {default!r} is not among the ready models: {_listed(self._models)}")

    async def load(self, name: str) -> None:
        """Load the newest versions of a model anew, and exchange them for those that serve.

        Raises UnknownModel if the repository has none or the settings leave it out, and BundleError if a version
        cannot be loaded; what served before goes on.
        """
        async with self._exchange:
            await asyncio.to_thread(self._require_known, name)
            self._unloaded.discard(name)
            found = await self._update(name, fresh=True)
            if found.failures:
                raise BundleError(f"model {name!r}: {'; '.join(found.failures)}")

    async def unload(self, name: str) -> None:
        """Take a model out of service, once it has answered what it accepted. Raises UnknownModel."""
        async with self._exchange:
            if name not in self._models:
                raise UnknownModel(f"model {name!r} is not loaded")
            self._unloaded.add(name)
            await self._retire(list(self._models[name].values()), reason="unloaded")

    async def refresh(self) -> None:
        """Look at the repository once: take in new versions, retire those that are gone."""
        async with self._exchange:
            try:
                there = await asyncio.to_thread(model_names, self._settings.repository)
            except BundleError as error:
                log.error("repository cannot be read", reason=str(error))
                return
            for name in self._settings.models or sorted({*there, *self._models}):
                if name not in self._unloaded:
                    await self._update(name, fresh=False)

    def _require_known(self, name: str) -> None:
        if self._settings.models and name not in self._settings.models:
            raise UnknownModel(f"the settings serve only: {', '.join(self._settings.models)}")
        # A name from a request never becomes a path unless the repository lists it.
        if name not in model_names(self._settings.repository):
            raise UnknownModel(f"no model {name!r} in the repository")

    async def _update(self, name: str, *, fresh: bool) -> "_Found":
        before = dict(self._models.get(name, {}))
        found = await asyncio.to_thread(self._read, name, fresh=fresh)
        self._admit(found)
        replaced = {model.version for model in found.loaded}
        # Nothing is retired for a version that cannot serve.
        if found.wanted or not found.published:
            retired = [m for version, m in before.items() if version in replaced or version not in found.wanted]
            await self._retire(retired, reason="" if found.published else "removed from the repository")
        return found

    def _read(self, name: str, *, fresh: bool) -> "_Found":
        """Load the newest versions that can be loaded. Blocks; engines run on the engine's thread only.

        Unless `fresh`, those that serve are kept and those that failed are not tried again: bundles never change.
        """
        serving = set(self._models.get(name, {}))
        found = _Found(published=versions(self._settings.repository, name))
        if not found.published and not serving:
            found.failures.append("no version of it in the repository")
            self._note(Entry(name=name, version=None, state="unavailable", reason=found.failures[0]))
        for version in reversed(found.published):
            if len(found.wanted) == self._settings.versions_to_serve:
                break
            known = self._entries.get((name, version))
            if not fresh and version in serving:
                found.wanted.add(version)
            elif fresh or known is None or known.state != "unavailable":
                if version not in serving:
                    self._note(Entry(name=name, version=version, state="loading"))
                try:
                    found.loaded.append(self._build(self._settings.repository / name / str(version)))
                    found.wanted.add(version)
                except Exception as error:  # whatever is wrong with one bundle, the others are served
                    if not isinstance(error, ServiceError):
                        log.exception("loading failed", model=name, version=version)
                    # Clients read the reason: where the repository lies is none of their business.
                    reason = str(error).replace(f"{self._settings.repository}/", "")
                    found.failures.append(reason)
                    log.error("model unavailable", model=name, version=version, reason=str(error))
                    if version in serving:
                        found.wanted.add(version)
                        self._note(Entry(name=name, version=version, state="ready", reason=f"not reloaded: {reason}"))
                    else:
                        self._note(Entry(name=name, version=version, state="unavailable", reason=reason))
        return found

    def _build(self, folder: Path) -> Model:
        bundle = read_bundle(folder)
        if self._device not in bundle.manifest.devices:
            raise BundleError(f"{folder}: made for {', '.join(bundle.manifest.devices)}, not for {self._device}")
        before = resident_bytes()
        engine, threads = self._open(bundle)
        loaded = resident_bytes()
        self._scheduler.on_engine(lambda: prove(bundle, engine))
        baseline = warm_up(bundle, engine, max_batch=self._settings.max_batch, on_engine=self._scheduler.on_engine)
        log.info(
            "model ready",
            model=bundle.manifest.name,
            version=bundle.version,
            device=self._device,
            threads=threads,
            batch_ms={size: round(seconds * 1000, 2) for size, seconds in baseline.items()},
        )
        return Model(
            bundle,
            engine,
            Queue(bundle.manifest.name, engine.run, Cost(baseline, self._load)),
            model_bytes=max(0, loaded - before),
            arena_bytes=max(0, resident_bytes() - loaded),
        )

    def _open(self, bundle: Bundle) -> tuple[Engine, int]:
        """An engine with as many threads as pay for this model."""

        def engine_with(threads: int) -> Engine:
            return Engine(
                bundle.model_path,
                device=self._device,
                number=self._number,
                threads=threads,
                tuning=tuning(self._settings),
            )

        asked = self._settings.intra_op_threads or self._threads
        engine = engine_with(asked)
        if self._settings.intra_op_threads or asked == 1 or self._device != "cpu":
            return engine, asked
        seconds = single_image_seconds(bundle, engine, on_engine=self._scheduler.on_engine)
        if seconds > _LONG_SECONDS:
            return engine, asked
        alone = engine_with(1)
        if single_image_seconds(bundle, alone, on_engine=self._scheduler.on_engine) > _WORTH_A_THREAD * seconds:
            alone.close()
            return engine, asked
        engine.close()
        return alone, 1

    def _admit(self, found: "_Found") -> None:
        for model in found.loaded:
            self._scheduler.add(model.queue)
            self._models.setdefault(model.name, {})[model.version] = model
            self._note(Entry(name=model.name, version=model.version, state="ready"))
        self._ladders = None

    async def _retire(self, models: list[Model], *, reason: str = "") -> None:
        """Let them answer what they accepted, then give their memory back."""
        for model in models:
            serving = self._models.get(model.name, {})
            if serving.get(model.version) is model:
                del serving[model.version]
                if not serving:
                    del self._models[model.name]
                self._note(Entry(name=model.name, version=model.version, state="unloading"))
        self._ladders = None
        for model in models:
            await model.unused()
            self._scheduler.remove(model.queue)
            await asyncio.to_thread(self._scheduler.on_engine, model.engine.close)
            # Unless the version has come back in the meantime.
            if self._entries[model.name, model.version].state == "unloading":
                if reason == "unloaded":
                    self._note(Entry(name=model.name, version=model.version, state="unavailable", reason=reason))
                else:
                    del self._entries[model.name, model.version]
            log.info("model retired", model=model.name, version=model.version)

    def _note(self, entry: Entry) -> None:
        self._entries[entry.name, entry.version] = entry

    def _newest(self, name: str) -> Model:
        return self._models[name][max(self._models[name])]


def tuning(settings: Settings) -> Tuning:
    """The settings that are the engine's."""
    return Tuning(
        allow_spinning=settings.allow_spinning,
        gpu_memory_bytes=settings.gpu_memory_bytes,
        tf32=settings.tf32,
        cuda_graphs=settings.cuda_graphs,
        tensorrt_cache=settings.tensorrt_cache,
    )


def warm_up(
    bundle: Bundle, engine: Engine, *, max_batch: int, on_engine: Callable[[Callable[[], float]], float]
) -> dict[int, float]:
    """Time the batch sizes that a model may run, and leave the engine ready for those that pay: seconds by size.

    Each run is a job of its own for `on_engine`, so that live traffic waits for one at most.
    """
    limit = min(max_batch, bundle.manifest.max_batch or max_batch)
    shape = bundle.manifest.input.shape[1:]

    seconds: dict[int, float] = {}
    for size in candidate_sizes(limit):
        images = np.zeros((size, *shape), dtype=np.uint8)
        runs = time_runs(partial(engine.run, images), seconds=_TIMING_SECONDS, max_runs=_TIMINGS, on_thread=on_engine)
        # The fastest, for all that disturbs a run makes it longer; the live timings know the disturbance.
        seconds[size] = min(runs)
        # Two sizes in a row that do not pay, and each run takes long: the next would only cost time and memory.
        if sum(runs) > _TIMING_SECONDS and len(seconds) >= len(worthwhile_sizes(seconds)) + 2:
            break
    for larger, smaller in pairwise(sorted(seconds, reverse=True)):
        # The larger batch could always be run in the smaller one's place: what took longer was disturbed.
        seconds[smaller] = min(seconds[smaller], seconds[larger])
    sizes = worthwhile_sizes(seconds)
    largest = np.zeros((sizes[-1], *shape), dtype=np.uint8)

    def settle() -> float:
        engine.shrink(largest)
        return 0.0

    on_engine(settle)
    for size in reversed(sizes):
        images = np.zeros((size, *shape), dtype=np.uint8)
        time_runs(partial(engine.run, images), seconds=0, warm_up_runs=0, on_thread=on_engine)
    return {size: seconds[size] for size in sizes}


def single_image_seconds(bundle: Bundle, engine: Engine, *, on_engine: Callable[[Callable[[], float]], float]) -> float:
    """The fastest of some runs of one image."""
    image = np.zeros((1, *bundle.manifest.input.shape[1:]), dtype=np.uint8)
    run = partial(engine.run, image)
    return min(time_runs(run, seconds=_TIMING_SECONDS, max_runs=_TIMINGS, on_thread=on_engine))


def _alike(one: Model, other: Model) -> bool:
    return one.bundle.labels == other.bundle.labels and one.manifest.input == other.manifest.input


def _listed(names: object) -> str:
    return ", ".join(str(name) for name in sorted(names))  # type: ignore[call-overload]
