"""The choice of variant: under load a family gives up a little accuracy, instead of a lot of latency.

A request takes the family's most accurate model whose predicted finish fits its deadline. The family steps down to a
less accurate model at once; stepping back up needs more headroom than staying would, so that the choice does not
oscillate while the load is near a limit.

If accurate models fill the time up to the deadline, the next request is late even with the fastest one, and refused. So
while requests are refused, the more accurate a model is, the shorter a request may wait for it: the backlog then
settles where the chosen models keep up with the requests that arrive, if the fastest can.

Research systems choose in this way: INFaaS (ATC'21), Proteus (ASPLOS'24), SuperServe (NSDI'25).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from typing_extensions import TypedDict

from service.errors import NoSuitableModel
from service.models.model import Model

Reason = Literal["most_accurate", "deadline", "headroom", "canary"]

_MAX_RELATIVE_COST = 0.9


class Skipped(TypedDict):
    """A more accurate model that was not chosen."""

    model: str
    predicted_ms: float


class Choice(TypedDict):
    """Why a family chose its model, as /v1 returns it."""

    family: str
    """For a canary, the model that the request is for."""
    reason: Reason
    """`most_accurate`: no model that the request allows is more accurate; `deadline`: more accurate ones would be late;
    `headroom`: a more accurate one would be in time, but without enough headroom; `canary`: the request belongs to the
    share of a model on trial."""
    predicted_ms: float
    """Predicted finish of the chosen model."""
    skipped: list[Skipped]


def pareto_front(members: Sequence[Model]) -> list[Model]:
    """Members (most accurate first) that cost at most 0.9 times as much per image as every more accurate one.

    The others would hardly ever be the better choice, and each further queue makes the batches smaller.
    """
    kept: list[Model] = []
    for model in members:
        if not kept or model.queue.cost.per_image() < _MAX_RELATIVE_COST * kept[-1].queue.cost.per_image():
            kept.append(model)
    return kept


def require_top1(model: Model, min_top1: float) -> None:
    """Raise NoSuitableModel if a model that is not chosen by its family is below the accuracy that a request needs."""
    # Without a minimum, models of unknown accuracy answer too.
    if min_top1 > 0 and model.top1 < min_top1:
        has = f"it has {model.top1:.4f}" if model.top1 >= 0 else "its accuracy is unknown"
        raise NoSuitableModel(
            f"model {model.name!r} does not reach a top-1 of {min_top1:g}: {has}; name a family to get its most "
            "accurate model that meets the deadline"
        )


class Family:
    """Chooses among the models of a family, and remembers which it chose last."""

    def __init__(self, name: str, *, step_up_headroom: float) -> None:
        """`step_up_headroom`: fraction of the time that a more accurate model's own run leaves until the deadline; the
        wait for the model must be within it before the family steps back up to it, and, for the most accurate model,
        while requests are refused."""
        self.name = name
        self._step_up_headroom = step_up_headroom
        self._last_top1 = 1.0

    def decide(
        self,
        members: Sequence[Model],
        *,
        predict: Callable[[Model], float],
        predict_idle: Callable[[Model], float],
        allowed_seconds: float,
        min_top1: float = 0.0,
        refusing: bool = False,
    ) -> tuple[Model, Choice]:
        """The most accurate of `members` (most accurate first) that fits `allowed_seconds`, and why. No side effects.

        `predict` gives a model's predicted finish in seconds, `predict_idle` what it would be on an idle service. If
        none fits, the one with the earliest predicted finish, for admission to judge. `refusing`: requests have been
        refused lately because they were late. Raises NoSuitableModel if none reaches `min_top1`.
        """
        candidates = [model for model in members if model.top1 >= min_top1]
        if not candidates:
            best = f"the best has {members[0].top1:.4f}" if members else "it has no ready model with a known accuracy"
            raise NoSuitableModel(f"no model of family {self.name!r} reaches a top-1 of {min_top1:g}: {best}")
        skipped: list[Skipped] = []
        lacks_headroom = False
        for steps, model in enumerate(candidates):
            predicted, limit, share = predict(model), allowed_seconds, 1.0
            if refusing and len(candidates) > 1:
                share = self._step_up_headroom + (1 - self._step_up_headroom) * steps / (len(candidates) - 1)
            elif model.top1 > self._last_top1:
                share = self._step_up_headroom
            if share < 1:
                idle = predict_idle(model)
                limit = idle + (allowed_seconds - idle) * share
            if predicted <= limit <= allowed_seconds:
                reason: Reason = "headroom" if lacks_headroom else "deadline" if skipped else "most_accurate"
                break
            lacks_headroom = predicted <= allowed_seconds
            skipped.append({"model": model.name, "predicted_ms": _rounded_ms(predicted)})
        else:
            # None fits, or none with enough headroom.
            model, predicted = min(((model, predict(model)) for model in candidates), key=lambda pair: pair[1])
            reason = "deadline"
            skipped = [other for other in skipped if other["model"] != model.name]
        return model, Choice(family=self.name, reason=reason, predicted_ms=_rounded_ms(predicted), skipped=skipped)

    def follow(self, model: Model) -> None:
        """Remember that a request took the model: stepping back up from it needs headroom."""
        self._last_top1 = model.top1


def _rounded_ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def families_of(models: Iterable[Model]) -> dict[str, list[Model]]:
    """Models that can replace each other, by family and the most accurate first.

    Only those of known accuracy, and with the labels and the input of the most accurate one.
    """
    families: dict[str, list[Model]] = {}
    for model in sorted(models, key=lambda model: -model.top1):
        if model.top1 >= 0:
            members = families.setdefault(model.manifest.family, [])
            if not members or _interchangeable(members[0], model):
                members.append(model)
    return families


def _interchangeable(one: Model, other: Model) -> bool:
    return one.bundle.labels == other.bundle.labels and one.manifest.input == other.manifest.input
