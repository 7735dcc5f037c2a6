"""What a service answers, typed, and its errors. Members that a newer service adds are ignored.

StrideViTError
├── Unreachable         no connection, or it broke
├── DeadlineExceeded    the deadline passed first, by the service's clock (504) or by the client's
├── Busy                no room (429), or not ready (503), after all tries
└── Rejected            anything else: a retry would get the same answer
"""

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Problem(_Answer):
    """An error as RFC 9457 describes it. Part of the results where one image or one model has an error of its own."""

    detail: str
    """For people; names the fix where there is one."""
    code: str
    """For programs, such as `overloaded`; docs/service.md lists them."""
    status: int | None = None
    """The HTTP status; None if there was no answer."""
    request_id: str | None = None
    """The service's log has it too."""
    retry_after_ms: int | None = None


class StrideViTError(Exception):
    """A call that has no answer, with the members of its `Problem`."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.problem = problem
        self.detail, self.code, self.status = problem.detail, problem.code, problem.status
        self.request_id, self.retry_after_ms = problem.request_id, problem.retry_after_ms

    def __str__(self) -> str:
        named = f", request {self.request_id}" if self.request_id else ""
        return f"{self.detail} ({self.code}{named})"


class Unreachable(StrideViTError):
    """No service answers at this address, or the connection broke."""


class DeadlineExceeded(StrideViTError):
    """The deadline passed before there was an answer."""


class Busy(StrideViTError):
    """The service has no room or is not ready. Nothing was computed."""


class Rejected(StrideViTError):
    """The service rejected the call, or failed on it."""


class Prediction(_Answer):
    """One class and its probability."""

    index: int
    label: str
    probability: float


class ImageResult(_Answer):
    """The answer to one image: predictions, best first, or an error."""

    predictions: tuple[Prediction, ...] | None = None
    error: Problem | None = None


class Skipped(_Answer):
    """A more accurate model that was not chosen."""

    model: str
    predicted_ms: float


class Choice(_Answer):
    """Why a family chose its model."""

    family: str
    reason: str
    predicted_ms: float
    skipped: tuple[Skipped, ...] = ()


class Classification(_Answer):
    """The answer to a request; `results` are in the order of its images."""

    model: str
    version: int
    results: tuple[ImageResult, ...]
    choice: Choice | None = None
    """None if a model was named."""
    timings_ms: dict[str, float]
    request_id: str

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        """The predictions for the only image, best first; for several, see `results`."""
        (only,) = self.results
        return only.predictions or ()


class Accuracy(_Answer):
    """The accuracy of a model on a data set, as fractions of its `n` images."""

    dataset: str
    split: str
    n: int
    top1: float
    top5: float


class Model(_Answer):
    """A model of the repository. A member that is None is unknown, or unknown until the model is ready."""

    name: str
    version: int | None = None
    state: str
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
    accuracy: Accuracy | None = None


class Models(_Answer):
    """All models of the repository, and the families of those that serve, the most accurate model first."""

    models: tuple[Model, ...]
    families: dict[str, tuple[str, ...]]


class Picture(_Answer):
    """An image as some models see it, before normalisation."""

    models: tuple[str, ...]
    width: int
    height: int
    png: str
    """In base64."""


class ModelAnswer(_Answer):
    """One model's answer: predictions, best first, or a problem."""

    model: str
    version: int | None = None
    predictions: tuple[Prediction, ...] | None = None
    timings_ms: dict[str, float] | None = None
    problem: Problem | None = None


class Agreement(_Answer):
    """How many other models have the same best class as `model`, the most accurate one that answered."""

    model: str
    of: int
    """The other models that answered, and have the same labels."""
    agree: int


class Comparison(_Answer):
    """Every model's answer to one image, in the order of arrival."""

    pictures: tuple[Picture, ...]
    answers: tuple[ModelAnswer, ...]
    agreement: Agreement | None = None
    request_id: str

    @classmethod
    def of(cls, events: list[dict[str, Any]]) -> "Comparison":
        """The events of `POST /v1/compare`, put together. Raises ValueError if the last of them is missing."""
        if not events or events[-1].get("event") != "end":
            raise ValueError("the answer breaks off before its end")
        pictures = [event for event in events if event.get("event") == "picture"]
        answers = [event for event in events if event.get("event") in ("answer", "error")]
        return cls.model_validate({**events[-1], "pictures": pictures, "answers": answers})
