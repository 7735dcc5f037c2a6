"""How accurate the models are as served: every image of a labelled set is asked over HTTP, and no answer is left out.

A request that fails, after retries where the server asked for them, counts as a wrong answer, for top-1, top-5 and
agreement alike.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from loadtests.errors import LoadTestError
from loadtests.experiment.server import service_for
from loadtests.generator.readers import Label, Payload, PayloadError, Source, open_source

TOP = 5
_ATTEMPTS = 8
_LONGEST_WAIT_SECONDS = 60
"""A server that wants a longer pause than this is not waited for."""
_TIMEOUT_SECONDS = 60
_LOST_AFTER = 3
"""As many failed connections in a row, for each of ours, mean that the server is gone."""
_GRACE_SECONDS = 5


class AccuracyError(LoadTestError):
    """The models cannot be asked; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who is asked about what."""

    models: tuple[str, ...]
    """One, or two that are compared: the second one is `--against`."""
    data: Path
    url: str | None
    """Of a server that runs already; else one is started for `repository`."""
    repository: Path
    most: int | None
    """Images, from the first; None for all."""
    connections: int
    service_arguments: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Stated:
    """The accuracy that a model's manifest states; parts of 1."""

    dataset: str
    split: str
    n: int
    top1: float
    top5: float


@dataclass(frozen=True, kw_only=True)
class Model:
    """A served model, as it describes itself."""

    name: str
    version: int
    labels: tuple[str, ...] = field(repr=False)
    stated: Stated | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model made of one image."""

    index: int | None = None
    """Of the likeliest class; None where the request failed."""
    label: str = ""
    probability: float = 0.0
    right: bool = False
    """The likeliest class is the image's; False where that is not known, as in `right_in_top5`."""
    right_in_top5: bool = False
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One image and what each model answered."""

    position: int
    name: str
    label: Label
    answers: tuple[Answer, ...]


@dataclass(kw_only=True)
class Survey:
    """All that was asked until now, in the order of the data."""

    plan: Plan
    words: str = ""
    """What the images are."""
    models: tuple[Model, ...] = ()
    images: int = 0
    """To be asked."""
    unlabelled: int = 0
    """Left out, because with one model nothing can be said of them."""
    asked: list[Asked] = field(default_factory=list)
    cut: int = 0
    """Left out by `--most`."""
    retries: int = 0
    """After an answer with 429."""
    seconds: float = 0.0
    ended_early: str | None = None


def survey(plan: Plan, out: Path, found: Survey, *, on_progress: Callable[[int, int], None]) -> None:
    """Ask about all images and fill `found`, which is in order even if this ends with an exception.

    `on_progress` is told how many images of how many were answered. The log of a server of our own is kept in `out`.
    Raises PayloadError, ServerError, AccuracyError.
    """
    source = open_source(plan.data)
    out.mkdir(parents=True, exist_ok=True)
    with _server(plan, out / "server.log") as url, _client(url, plan.connections) as client:
        found.models = tuple(_model(client, name) for name in plan.models)
        wanted = _wanted(source, plan, found)
        found.words, found.images = source.description, len(wanted)
        _check_labels([source.labels[index] for index in wanted], found.models)
        asker = _Asker(client, found.models, zip(wanted, source.read(wanted), strict=True))
        started = time.monotonic()
        try:
            asker.run(plan.connections, lambda done: on_progress(done, len(wanted)))
        finally:
            found.asked = sorted(asker.done.copy(), key=lambda asked: asked.position)
            found.retries, found.seconds = asker.retries, time.monotonic() - started
            found.ended_early = asker.lost


@contextmanager
def _server(plan: Plan, log: Path) -> Iterator[str]:
    if plan.url is not None:
        yield plan.url
        return
    names = ",".join(plan.models)
    with service_for(names, repository=plan.repository, log=log, arguments=plan.service_arguments) as server:
        yield server.url


@contextmanager
def _client(url: str, connections: int) -> Iterator[httpx.Client]:
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    try:
        # Proxies of the environment have no business in between.
        with httpx.Client(base_url=url, limits=limits, timeout=_TIMEOUT_SECONDS, trust_env=False) as client:
            yield client
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise AccuracyError(f"--url {url!r}: give an address such as http://127.0.0.1:8000") from error


def _model(client: httpx.Client, name: str) -> Model:
    """Raises AccuracyError."""
    listed = _get(client, "/v1/models")
    try:
        known = {model["name"]: model for model in listed["models"]}
        if name not in known:
            family = " (a family: name one of its models)" if name in listed.get("families", {}) else ""
            raise AccuracyError(f"the server has no model {name!r}{family}: it has {', '.join(sorted(known))}")
        if known[name]["state"] != "ready":
            raise AccuracyError(f"{name} does not serve: {known[name].get('reason') or known[name]['state']}")
        detail = _get(client, f"/v1/models/{name}")
        stated = detail["manifest"].get("accuracy")
        return Model(
            name=name,
            version=detail["version"],
            labels=tuple(detail["labels"]),
            stated=Stated(**{key: stated[key] for key in ("dataset", "split", "n", "top1", "top5")})
            if stated
            else None,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise AccuracyError(f"{client.base_url} does not answer as a StrideViT service does") from error


def _get(client: httpx.Client, path: str) -> Any:
    try:
        response = client.get(path)
        response.raise_for_status()
        return response.json()
    except httpx.HTTPStatusError as error:
        raise AccuracyError(f"{error.request.url} answers {error.response.status_code}") from error
    except (httpx.RequestError, ValueError) as error:
        if isinstance(error, httpx.UnsupportedProtocol):
            raise
        raise AccuracyError(f"{client.base_url} does not answer as a StrideViT service does: {error}") from error


def _wanted(source: Source, plan: Plan, found: Survey) -> list[int]:
    """Positions of the images to ask about: without a second model only the labelled ones."""
    wanted = list(range(len(source.labels)))[: plan.most]
    found.cut = len(source.labels) - len(wanted)
    if len(plan.models) > 1:
        return wanted
    labelled = [index for index in wanted if source.labels[index] is not None]
    found.unlabelled = len(wanted) - len(labelled)
    if not labelled:
        raise PayloadError(
            f"{plan.data} holds no labels: it needs a labels.csv, class folders, or a column fine_label or label "
            "(with --against, two models can be compared without)"
        )
    return labelled


def _check_labels(labels: Sequence[Label], models: Sequence[Model]) -> None:
    """A set with classes that a model does not know is the wrong set, or the wrong model. Raises AccuracyError."""
    for model in models:
        known: set[Label] = {*range(len(model.labels)), *model.labels}
        unknown = sorted({str(label) for label in labels if label is not None and label not in known})
        if unknown:
            raise AccuracyError(
                f"the data is not labelled with the {len(model.labels)} classes of {model.name}: it does not know "
                f"{len(unknown)} of the labels, {unknown[0]!r} among them (its first class is {model.labels[0]!r})"
            )


class _Asker:
    """Some threads that take image after image and ask all models about it."""

    def __init__(self, client: httpx.Client, models: tuple[Model, ...], images: Iterator[tuple[int, Payload]]) -> None:
        self.done: list[Asked] = []
        self.retries = 0
        self.lost: str | None = None
        self._client, self._models, self._images = client, models, images
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failed_connections = 0
        self._most_failed_connections = 0
        self._error: Exception | None = None

    def run(self, connections: int, on_progress: Callable[[int], None]) -> None:
        """Until all is answered, the server is lost, or an exception comes."""
        self._most_failed_connections = _LOST_AFTER * connections
        threads = [threading.Thread(target=self._work, name="asker", daemon=True) for _ in range(connections)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.1)
                    on_progress(len(self.done))
        finally:
            self._stop.set()
            deadline = time.monotonic() + _GRACE_SECONDS
            for thread in threads:
                if thread.ident is not None:
                    thread.join(max(0.0, deadline - time.monotonic()))
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                with self._lock:
                    position, image = next(self._images, (0, None))
                if image is None:
                    return
                answers = tuple(self._answer(model, image) for model in self._models)
                interrupted = self._stop.is_set() and self.lost is None
                # What fails while all is being stopped was not asked in earnest.
                if not (interrupted and any(answer.failure for answer in answers)):
                    self.done.append(Asked(position=position, name=image.name, label=image.label, answers=answers))
        except Exception as error:  # noqa: BLE001 (raised again in the thread that waits)
            self._error = error
            self._stop.set()

    def _answer(self, model: Model, image: Payload) -> Answer:
        query: dict[str, str | int] = {"model": model.name, "version": model.version, "top_k": TOP}
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                response = self._client.post("/v1/classify", params=query, content=image.data)
            except httpx.RequestError as error:
                return Answer(failure=self._unanswered(error))
            self._failed_connections = 0
            if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
                return _answer(response, image.label)
            pause = _retry_after(response)
            if attempt == _ATTEMPTS or pause > _LONGEST_WAIT_SECONDS or self._stop.wait(pause):
                return Answer(failure=f"429 {attempt} times, the last with Retry-After {pause:g} s")
            with self._lock:
                self.retries += 1
        raise AssertionError("unreachable")

    def _unanswered(self, error: httpx.RequestError) -> str:
        what = f"no answer: {type(error).__name__}" + (f", {error}" if str(error) else "")
        with self._lock:
            self._failed_connections += 1
            if self._failed_connections >= self._most_failed_connections and not self._stop.is_set():
                self.lost = f"the server is gone ({what})"
                self._stop.set()
        return what


def _answer(response: httpx.Response, label: Label) -> Answer:
    if response.status_code != httpx.codes.OK:
        return Answer(failure=f"{response.status_code}: {response.text[:200]}")
    try:
        ranked = response.json()["results"][0]["predictions"]
        known = [one["index"] if isinstance(label, int) else one["label"] for one in ranked]
        return Answer(
            index=ranked[0]["index"],
            label=ranked[0]["label"],
            probability=ranked[0]["probability"],
            right=label is not None and known[0] == label,
            right_in_top5=label is not None and label in known[:TOP],
        )
    except (ValueError, KeyError, IndexError, TypeError) as error:
        return Answer(failure=f"200, yet not understood ({error!r}): {response.text[:200]}")


def _retry_after(response: httpx.Response) -> float:
    """Seconds; one where the header is missing, or a date."""
    try:
        return max(0.0, float(response.headers.get("Retry-After", "1")))
    except ValueError:
        return 1.0
