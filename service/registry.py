"""The models that are being served: found in the repository, proven, warmed up, and given a queue."""

from dataclasses import dataclass

import numpy as np
import structlog

from service.bundle import Bundle, Manifest, model_names, read_bundle, versions
from service.engine import Device, Engine, resolve_device
from service.errors import BundleError, EngineError, StartError, UnknownModel
from service.golden import prove
from service.scheduler import Queue, Scheduler
from service.settings import Settings

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that takes traffic."""

    bundle: Bundle
    queue: Queue

    @property
    def manifest(self) -> Manifest:
        """What the model is."""
        return self.bundle.manifest


class Registry:
    """All ready models by name, and the reasons of those that could not be loaded."""

    def __init__(self, models: dict[str, Model], failed: dict[str, str], default: str) -> None:
        self.models = models
        self.failed = failed
        self.default = default

    def find(self, name: str | None) -> Model:
        """The model `name`, or the default for None. Raises UnknownModel naming those there are."""
        wanted = self.default if name is None else name
        if wanted in self.models:
            return self.models[wanted]
        if wanted in self.failed:
            raise UnknownModel(f"model {wanted!r} is unavailable: {self.failed[wanted]}")
        raise UnknownModel(f"no model {wanted!r} here; there are: {', '.join(sorted(self.models))}")


def load_models(settings: Settings, scheduler: Scheduler, *, threads: int) -> Registry:
    """Load the newest version of each model that the settings ask for. Blocks; call it off the event loop.

    A broken bundle is logged and left out. Raises StartError if it was asked for by name, or if nothing is left.
    """
    device, number = resolve_device(settings.device)
    try:
        names = list(settings.models) or model_names(settings.repository)
    except BundleError as error:
        raise StartError(str(error)) from error
    models: dict[str, Model] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            models[name] = _load(settings, scheduler, name, device=device, number=number, threads=threads)
        except (BundleError, EngineError) as error:
            if name in settings.models:
                raise StartError(f"model {name!r}: {error}") from error
            # Clients read the reason: where the repository lies is none of their business.
            failed[name] = str(error).replace(f"{settings.repository}/", "")
            log.error("model unavailable", model=name, reason=str(error))
    if not models:
        raise StartError(f"no model can be served from {settings.repository}: see the log above")
    if settings.default_model is not None and settings.default_model not in models:
        raise StartError(
            f"default_model {settings.default_model!r} is not among the ready models: {', '.join(sorted(models))}"
        )
    return Registry(models, failed, settings.default_model or _most_accurate(models))


def _load(settings: Settings, scheduler: Scheduler, name: str, *, device: Device, number: int, threads: int) -> Model:
    published = versions(settings.repository, name)
    if not published:
        raise BundleError(f"no version of it in {settings.repository}")
    bundle = read_bundle(settings.repository / name / str(published[-1]))
    if device not in bundle.manifest.devices:
        raise BundleError(f"{bundle.folder}: made for {', '.join(bundle.manifest.devices)}, not for {device}")
    engine = Engine(bundle.model_path, device=device, number=number, threads=threads)
    prove(bundle, engine)
    max_batch = min(settings.max_batch, bundle.manifest.max_batch or settings.max_batch)
    _, height, width, channels = bundle.manifest.input.shape
    # The largest batch first, so that the memory arena grows once.
    for size in (max_batch, 1):
        engine.run(np.zeros((size, height, width, channels), dtype=np.uint8))
    log.info("model ready", model=name, version=bundle.version, device=device, threads=threads)
    return Model(bundle=bundle, queue=scheduler.add(name, engine.run, max_batch=max_batch))


def _most_accurate(models: dict[str, Model]) -> str:
    def top1(name: str) -> float:
        accuracy = models[name].manifest.accuracy
        return accuracy.top1 if accuracy else -1.0

    return max(sorted(models), key=top1)
