"""The choice of variant: under load a family gives up a little accuracy, instead of a lot of latency.

A family's models stand on a ladder by accuracy. A request takes the most accurate one whose predicted finish fits its
deadline. A step down is taken at once; a step back up needs more headroom than staying would, so that the choice does
not flap while the load hovers around a limit.

Research systems choose so: INFaaS (ATC'21), Proteus (ASPLOS'24), SuperServe (NSDI'25).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from service.errors import NoSuitableModel
from service.models.model import Model

Reason = Literal["most_accurate", "deadline", "recovering"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which model of a family answers, and why."""

    family: str
    model: Model
    reason: Reason
    """`most_accurate` of those allowed; `deadline`: the more accurate ones would be late; `recovering`: they would be
    in time, but only just, and the family had stepped down."""
    predicted_ms: float
    """Of the model that was chosen."""
    passed_over: tuple[tuple[str, float], ...]
    """More accurate models that were not taken, and their predicted milliseconds."""

    def as_dict(self) -> dict[str, object]:
        """For an answer."""
        return {
            "family": self.family,
            "reason": self.reason,
            "predicted_ms": round(self.predicted_ms, 3),
            "passed_over": [
                {"model": name, "predicted_ms": round(predicted, 3)} for name, predicted in self.passed_over
            ],
        }


_MIN_SPEEDUP = 0.9


def pareto_front(ladder: Sequence[Model]) -> list[Model]:
    """Of a ladder, best first, the models that cost a good deal less an image than every more accurate one.

    The others would never be the better choice, and each more queue makes the batches smaller.
    """
    kept: list[Model] = []
    for model in ladder:
        if not kept or model.queue.cost.per_image() < _MIN_SPEEDUP * kept[-1].queue.cost.per_image():
            kept.append(model)
    return kept


class Family:
    """Remembers how far down the ladder the family stands."""

    def __init__(self, name: str, *, recover: float = 0.6) -> None:
        """`recover`: to step back up, waiting may take this part of what the deadline leaves beside the work itself."""
        self.name = name
        self._recover = recover
        self._standing = 1.0
        """Top-1 of the model that was last chosen."""

    def choose(
        self,
        ladder: Sequence[Model],
        *,
        predict: Callable[[Model], float],
        alone: Callable[[Model], float],
        allowed_seconds: float,
        min_top1: float = 0.0,
    ) -> Choice:
        """The most accurate model of the `ladder` (best first) that fits `allowed_seconds`.

        `predict` gives a model's predicted finish, `alone` what it would be on an idle service.
        If none does, the one with the earliest predicted finish, for admission to judge. Raises NoSuitableModel if
        none reaches `min_top1`.
        """
        candidates = [model for model in ladder if model.top1 >= min_top1]
        if not candidates:
            best = f"the best has {ladder[0].top1:.4f}" if ladder else "it has no ready model with a known accuracy"
            raise NoSuitableModel(f"no model of family {self.name!r} reaches a top-1 of {min_top1:g}: {best}")
        passed_over: list[tuple[str, float]] = []
        recovering = False
        for model in candidates:
            predicted = predict(model)
            own = alone(model)
            enough = own + (allowed_seconds - own) * (self._recover if model.top1 > self._standing else 1.0)
            if predicted <= enough <= allowed_seconds:
                self._standing = model.top1
                reason: Reason = "recovering" if recovering else "deadline" if passed_over else "most_accurate"
                return self._chosen(model, reason, predicted, passed_over)
            recovering = predicted <= allowed_seconds
            passed_over.append((model.name, predicted * 1000))
        # Nothing fits, or all that fits was to be left alone until there is more headroom.
        model, predicted = min(((model, predict(model)) for model in candidates), key=lambda pair: pair[1])
        self._standing = model.top1
        others = [other for other in passed_over if other[0] != model.name]
        return self._chosen(model, "deadline", predicted, others)

    def _chosen(self, model: Model, reason: Reason, predicted: float, passed_over: list[tuple[str, float]]) -> Choice:
        return Choice(
            family=self.name,
            model=model,
            reason=reason,
            predicted_ms=predicted * 1000,
            passed_over=tuple(passed_over),
        )
