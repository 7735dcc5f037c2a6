"""One candidate and its primary: what both did, counted in /metrics, and the status of the rollout."""

from typing import Literal, get_args

from pydantic import BaseModel

from service.errors import ClientDisconnected, ImageError, NotReady, RequestError, UnknownModel
from service.metrics import Metrics
from service.models.model import Model
from service.models.registry import Registry
from service.rollouts.split import Kind, Split
from service.scheduling.outputs import Output

Arm = Literal["primary", "candidate"]
Fallback = Literal["not-ready", "labels", "input", "top1", "late", "refused", "model-fault"]
"""Why a request of the canary's share was answered by the primary."""


class RolloutStatus(BaseModel):
    """A share of the traffic that also or instead goes to a candidate, with the counts since the start."""

    kind: Kind
    primary: str
    """The model or family whose traffic is split."""
    candidate: str
    """With `@VERSION` if one is named."""
    share: float
    state: str
    """`on`, or why the candidate takes no traffic."""
    primary_images: int
    """Images of the traffic that the primary answered."""
    candidate_images: int
    """Images that the candidate answered: to clients (canary), or beside the primary (shadow)."""
    compared: int
    """Images that both have answered."""
    agree: int
    """Those of them with the same top-1."""
    dropped: int
    """Images that were not compared because there was no time or room for it."""
    fallbacks: int
    """Images of the canary's share that the primary answered."""
    errors: int
    """Images that the candidate failed to answer."""
    primary_ms: float | None
    """Mean: of whole requests (canary), or of the engine, for images that both compute in turn (shadow)."""
    candidate_ms: float | None


class Rollout:
    """Keeps its counts only in `metrics`, from where the status reads them."""

    def __init__(self, split: Split, registry: Registry, metrics: Metrics) -> None:
        self.split, self.primary = split, split.primary or split.candidate
        self._registry, self._metrics = registry, metrics
        self._labels = split.kind, f"{split.primary}:{split.title}"
        self._compared: tuple[Model, Model, bool] | None = None
        # If a series begins with its first event, rates over it miss that event.
        arms: tuple[Arm, Arm] = "primary", "candidate"
        for arm in arms:
            metrics.rollout_images(*self._labels, arm, "ok")
            metrics.rollout_seconds(*self._labels, arm)
        for top1 in ("agree", "differ"):
            metrics.rollout_compared(*self._labels, top1)
        if split.kind == "canary":
            for reason in get_args(Fallback):
                metrics.rollout_fallbacks(*self._labels, reason)

    @property
    def candidate(self) -> Model | None:
        """The model that takes the share, if it takes traffic."""
        return self._registry.get(self.split.candidate, self.split.version)

    @property
    def primary_model(self) -> Model | None:
        """What the candidate is compared with: the primary, or the most accurate other member of a family."""
        try:
            members = self._registry.candidates(self.primary)[1]
        except (UnknownModel, NotReady):
            return None
        candidate = self.candidate
        return next((model for model in members if model is not candidate), None)

    def alike(self, one: Model, other: Model) -> bool:
        """Whether two models have the same labels: either may have been replaced since the start."""
        if self._compared is None or self._compared[0] is not one or self._compared[1] is not other:
            self._compared = one, other, one.bundle.labels == other.bundle.labels
        return self._compared[2]

    def fell_back(self, reason: Fallback, images: int) -> None:
        """Count images of the share that go to the primary."""
        self._metrics.rollout_fallbacks(*self._labels, reason).inc(images)

    def dropped(self, reason: str) -> None:
        """Count an image that will not be compared."""
        self._metrics.rollout_dropped(*self._labels, reason).inc()

    def failed(self, arm: Arm, error: RequestError, images: int) -> None:
        """Count images that an arm could not answer, through no fault of the images or the client."""
        if not isinstance(error, ImageError | ClientDisconnected):
            self._metrics.rollout_images(*self._labels, arm, error.code).inc(images)

    def answered(self, arm: Arm, images: int) -> None:
        """Count images that an arm has answered."""
        self._metrics.rollout_images(*self._labels, arm, "ok").inc(images)

    def took(self, arm: Arm, seconds: float) -> None:
        """Count a duration of an arm."""
        self._metrics.rollout_seconds(*self._labels, arm).observe(seconds)

    def compared(self, top1: int, output: Output) -> None:
        """Count an image that both have answered, the first one with class `top1`."""
        same = top1 == int(output.probabilities.argmax())
        self._metrics.rollout_compared(*self._labels, "agree" if same else "differ").inc()

    def status(self) -> RolloutStatus:
        """The rollout's part of /v1/status."""
        compared = self._counts("rollout_compared", "top1")
        images = self._counts("rollout_images", "arm", "outcome")
        errors = sum(count for (arm, outcome), count in images.items() if arm == "candidate" and outcome != "ok")
        return RolloutStatus(
            kind=self.split.kind,
            primary=self.primary,
            candidate=self.split.title,
            share=self.split.share,
            state=self._state(),
            primary_images=images.get(("primary", "ok"), 0),
            candidate_images=images.get(("candidate", "ok"), 0),
            compared=sum(compared.values()),
            agree=compared.get(("agree",), 0),
            dropped=sum(self._counts("rollout_dropped", "reason").values()),
            fallbacks=sum(self._counts("rollout_fallbacks", "reason").values()),
            errors=errors,
            primary_ms=self._mean_ms("primary"),
            candidate_ms=self._mean_ms("candidate"),
        )

    def _state(self) -> str:
        if self.candidate:
            return "on"
        split = self.split
        known = [e for e in self._registry.index if e.name == split.candidate and split.version in (None, e.version)]
        reason = f"{known[-1].state}: {known[-1].reason}" if known else "not in the repository"
        return reason if len(reason) <= _STATE else f"{reason[: _STATE - 1]}…"

    def _counts(self, counter: str, *by: str) -> dict[tuple[str, ...], int]:
        return {
            tuple(labels[name] for name in by): int(count)
            for labels, count in self._metrics.totals(counter)
            if (labels["kind"], labels["rollout"]) == self._labels
        }

    def _mean_ms(self, arm: Arm) -> float | None:
        count, seconds = self._metrics.rollout_duration(*self._labels, arm)
        return round(1000 * seconds / count, 3) if count else None


_STATE = 100
"""Most characters of a state: the status is small."""
