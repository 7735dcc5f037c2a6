"""How accurate models are as served: every image of a labelled set is sent over HTTP, and no answer is left out.

A request that fails, after retries if the server asked for them, counts as a wrong answer for top-1, top-5 and
agreement alike.
"""

import asyncio
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from loadtests.errors import LoadTestError
from loadtests.experiment.http_get import get_json
from loadtests.experiment.model import Measurement, Progress
from loadtests.experiment.server import service_for
from loadtests.generator.readers import Label, Payload, PayloadError, open_source
from service.manifest import Accuracy

TOP = 5
_ATTEMPTS = 8
_MAX_RETRY_SECONDS = 60
"""A server that asks for a longer pause is not waited for."""
_TIMEOUT_SECONDS = 60
_MAX_FAILED_CONNECTIONS = 3
"""That many failed connections in a row, per connection, mean that the server is gone."""


class AccuracyError(LoadTestError):
    """The models cannot be evaluated; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which models are evaluated on which images."""

    models: tuple[str, ...]
    """One, or two to be compared: the second is `--reference`."""
    data: Path
    url: str | None
    """Address of a running server; without one, a server is started for `repository`."""
    repository: Path
    limit: int | None
    """Number of images, from the first; None for all."""
    connections: int
    max_drop_points: float
    """Percentage points that top-1 may be off the manifest's on the same images."""
    service_arguments: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Model:
    """A served model, as it describes itself."""

    name: str
    version: int
    labels: tuple[str, ...] = field(repr=False)
    accuracy: Accuracy | None
    """The manifest's."""
    trained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A model's answer for one image."""

    index: int | None = None
    """The most probable class; None if the request failed."""
    label: str = ""
    probability: float = 0.0
    correct: bool = False
    """Whether that is the image's class; False if unknown, as in `correct_top5`."""
    correct_top5: bool = False
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One image and each model's answer."""

    position: int
    name: str
    label: Label
    answers: tuple[Answer, ...]


@dataclass(kw_only=True)
class AccuracyRun(Measurement):
    """Everything that was answered so far."""

    plan: Plan
    models: tuple[Model, ...] = ()
    total: int = 0
    """Images to be sent."""
    unlabelled: int = 0
    """Images left out because one model alone says nothing about them."""
    beyond_limit: int = 0
    """Images left out by `--limit`."""
    images: list[Image] = field(default_factory=list)
    """In the order of the data once `evaluate` has ended."""
    retries: int = 0
    """Requests sent again after a 429."""
    seconds: float = 0.0

    @property
    def measured(self) -> bool:
        """Whether an image was answered."""
        return bool(self.images)


def evaluate(run: AccuracyRun, out: Path, progress: Progress) -> None:
    """Send all images and fill `run`, also if this ends with an exception. A started server's log is kept in `out`.

    Raises PayloadError, ServerError, AccuracyError.
    """
    plan, source = run.plan, open_source(run.plan.data)
    out.mkdir(parents=True, exist_ok=True)
    models, log = ",".join(plan.models), out / "server.log"
    with service_for(
        models, repository=plan.repository, log=log, arguments=plan.service_arguments, url=plan.url
    ) as server:
        run.models = tuple(_describe(server.url, name) for name in plan.models)
        positions = _positions(run, source.labels)
        run.payloads, run.total = source.description, len(positions)
        _check_labels([source.labels[position] for position in positions], run.models)
        started, terminate = time.monotonic(), signal.getsignal(signal.SIGTERM)
        try:
            images = zip(positions, source.read(positions), strict=True)
            asyncio.run(_send_all(run, server.url, images, progress))
        finally:
            signal.signal(signal.SIGTERM, terminate)
            run.images.sort(key=lambda image: image.position)
            run.seconds = time.monotonic() - started


def _describe(url: str, name: str) -> Model:
    try:
        listed = get_json(f"{url}/v1/models", timeout=_TIMEOUT_SECONDS)
        known = {model["name"]: model for model in listed["models"]}
        if name not in known:
            family = " (a family: name one of its models)" if name in listed.get("families", {}) else ""
            raise AccuracyError(f"the server has no model {name!r}{family}: it has {', '.join(sorted(known))}")
        if known[name]["state"] != "ready":
            raise AccuracyError(f"{name} does not serve: {known[name].get('reason') or known[name]['state']}")
        detail = get_json(f"{url}/v1/models/{quote(name)}", timeout=_TIMEOUT_SECONDS)
        manifest = detail["manifest"]
        return Model(
            name=name,
            version=detail["version"],
            labels=tuple(detail["labels"]),
            accuracy=Accuracy.model_validate(manifest["accuracy"]) if manifest.get("accuracy") else None,
            trained=not manifest.get("random_weights"),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise AccuracyError(f"{url} does not answer as a StrideViT service does: {error}") from error


def _positions(run: AccuracyRun, labels: Sequence[Label]) -> list[int]:
    """Images to send: with one model only labelled ones."""
    positions = list(range(len(labels)))[: run.plan.limit]
    run.beyond_limit = len(labels) - len(positions)
    if len(run.plan.models) > 1:
        return positions
    labelled = [position for position in positions if labels[position] is not None]
    run.unlabelled = len(positions) - len(labelled)
    if not labelled:
        raise PayloadError(
            f"{run.plan.data} holds no labels: it needs a labels.csv, class folders, or a column fine_label or label "
            "(with --reference, two models can be compared without labels)"
        )
    return labelled


def _check_labels(labels: Sequence[Label], models: Sequence[Model]) -> None:
    """A class that a model does not know means the wrong data or the wrong model. Raises AccuracyError."""
    for model in models:
        known: set[Label] = {None, *range(len(model.labels)), *model.labels}
        if unknown := sorted({str(label) for label in labels if label not in known}):
            raise AccuracyError(
                f"the data is not labelled with the {len(model.labels)} classes of {model.name}: it does not know "
                f"{len(unknown)} of the labels, {unknown[0]!r} among them (its first class is {model.labels[0]!r})"
            )


async def _send_all(run: AccuracyRun, url: str, images: Iterator[tuple[int, Payload]], progress: Progress) -> None:
    """Keep `connections` requests in flight until all images are answered. Raises AccuracyError if the server is gone.

    A request that is cancelled, by an interruption or because the server is gone, leaves no image behind.
    """
    # asyncio turns Ctrl-C into a cancellation of this coroutine: a termination must do the same.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    connections = run.plan.connections
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    # A proxy of the environment must not come between.
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=_TIMEOUT_SECONDS, trust_env=False) as client:
        sender = _Sender(client, run)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(connections):
                    group.create_task(sender.work(images, progress))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None


class _Sender:
    """Sends image after image, and notices when the server is gone."""

    def __init__(self, client: httpx.AsyncClient, run: AccuracyRun) -> None:
        self._client, self._run = client, run
        self._failed_connections = 0

    async def work(self, images: Iterator[tuple[int, Payload]], progress: Progress) -> None:
        """Take images from the shared iterator until there are no more. Raises AccuracyError."""
        for position, payload in images:
            answers = tuple([await self._answer(model, payload) for model in self._run.models])
            self._run.images.append(Image(position=position, name=payload.name, label=payload.label, answers=answers))
            progress.step("images", len(self._run.images), self._run.total)
            if self._failed_connections >= _MAX_FAILED_CONNECTIONS * self._run.plan.connections:
                raise AccuracyError(f"the server is gone ({answers[-1].failure})")

    async def _answer(self, model: Model, image: Payload) -> Answer:
        query: dict[str, str | int] = {"model": model.name, "version": model.version, "top_k": TOP}
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                response = await self._client.post("/v1/classify", params=query, content=image.data)
            except httpx.RequestError as error:
                self._failed_connections += 1
                return Answer(failure=f"no answer: {type(error).__name__}" + (f", {error}" if str(error) else ""))
            self._failed_connections = 0
            if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
                return _parse(response, image.label)
            pause = _retry_after(response)
            if attempt == _ATTEMPTS or pause > _MAX_RETRY_SECONDS:
                return Answer(failure=f"429 {attempt} times, the last with Retry-After {pause:g} s")
            self._run.retries += 1
            await asyncio.sleep(pause)
        raise AssertionError("unreachable")


def _parse(response: httpx.Response, label: Label) -> Answer:
    if response.status_code != httpx.codes.OK:
        return Answer(failure=f"{response.status_code}: {response.text[:200]}")
    try:
        ranked: list[dict[str, Any]] = response.json()["results"][0]["predictions"]
        classes = [one["index"] if isinstance(label, int) else one["label"] for one in ranked]
        return Answer(
            index=ranked[0]["index"],
            label=ranked[0]["label"],
            probability=ranked[0]["probability"],
            correct=label is not None and classes[0] == label,
            correct_top5=label is not None and label in classes[:TOP],
        )
    except (ValueError, KeyError, IndexError, TypeError) as error:
        return Answer(failure=f"200, but not understood ({error!r}): {response.text[:200]}")


def _retry_after(response: httpx.Response) -> float:
    """Seconds; one if the header is missing or a date."""
    try:
        return max(0.0, float(response.headers.get("Retry-After", "1")))
    except ValueError:
        return 1.0
