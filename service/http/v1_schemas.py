"""The JSON of /v1: what it takes in the query, and what it answers."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, RootModel

from service.comparison import Agreement
from service.http.problems import Problem
from service.manifest import AccuracySummary, Manifest
from service.models.family import Choice
from service.models.index import State
from service.models.model import Model
from service.pipeline import RequestOptions, ranked
from service.scheduling.scheduler import Output


class ClassifyQuery(RequestOptions):
    """The query of a classification."""

    top_k: Annotated[int, Field(ge=1, le=1000)] = 5
    """How many classes to return, best first."""


class Prediction(BaseModel):
    """One class and its probability."""

    index: int
    label: str
    probability: float


class ImageResult(BaseModel):
    """The answer to one image: predictions, best first, or an error."""

    predictions: list[Prediction] | None = None
    error: Problem | None = None


Timings = dict[Literal["read", "decode", "queue", "inference", "total"], float]
"""Milliseconds by stage."""


class Classification(BaseModel):
    """The answer to a request; `results` are in the order of its images."""

    model: str
    version: int
    requested: str | None
    results: list[ImageResult]
    choice: Choice | None
    """Null unless a family answered or the request belongs to a canary's share."""
    timings_ms: Timings
    """With several images, `decode`, `queue` and `inference` are the longest of all images."""
    request_id: str


class PictureEvent(BaseModel):
    """The image as some models see it; it comes before their answers."""

    event: Literal["picture"]
    models: list[str]
    width: int
    height: int
    png: str
    """A PNG in base64."""


class AnswerEvent(BaseModel):
    """A model's answer: predictions, best first."""

    event: Literal["answer"]
    model: str
    version: int
    predictions: list[Prediction]
    timings_ms: Timings


class ErrorEvent(BaseModel):
    """A model that cannot answer; the others go on."""

    event: Literal["error"]
    model: str
    problem: Problem


class EndEvent(BaseModel):
    """The last line: without it, the answer was cut."""

    event: Literal["end"]
    request_id: str
    agreement: Agreement | None
    """Null if no model has answered."""


class ComparisonEvent(
    RootModel[Annotated[PictureEvent | AnswerEvent | ErrorEvent | EndEvent, Field(discriminator="event")]]
):
    """A line of the answer to a comparison: `event` says which kind."""


class ModelSummary(BaseModel):
    """A model of the repository."""

    name: str
    version: int | None
    state: State
    reason: str | None = None
    default: bool = False
    family: str | None = None
    architecture: str | None = None
    variant: str | None = None
    kv_tokens: int | None = None
    tokens: int | None = None
    params: int | None = None
    macs: int | None = None
    precision: str | None = None
    img_size: int | None = None
    num_classes: int | None = None
    accuracy: AccuracySummary | None = None
    """Without the bits of `manifest.accuracy.correct`, which GET /v1/models/NAME has."""


class ModelList(BaseModel):
    """All models of the repository, and the families of those that serve, the most accurate model first."""

    models: list[ModelSummary]
    families: dict[str, list[str]]


class ModelDetail(BaseModel):
    """A model that takes traffic: its manifest, and what the service has measured."""

    name: str
    versions: list[int]
    version: int
    manifest: Manifest
    batch_ms: dict[int, float]
    """Predicted duration of a batch, by its size; no other sizes are run."""
    waiting: int
    """Images that wait for the engine."""
    labels: tuple[str, ...]


def predictions(output: Output, labels: Sequence[str], *, top_k: int) -> list[dict[str, Any]]:
    """The most probable classes of an image, best first, each as the members of a Prediction."""
    return [
        {"index": index, "label": labels[index], "probability": probability}
        for index, probability in ranked(output.probabilities, top_k)
    ]


def summary(model: Model, *, default: bool) -> ModelSummary:
    """A model that takes traffic."""
    manifest = model.manifest
    known = {**dict(manifest.attention or {}), **dict(manifest), "img_size": manifest.preprocessing.crop}
    return ModelSummary.model_validate({**known, "version": model.version, "state": "ready", "default": default})
