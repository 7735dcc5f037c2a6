"""A family answers with its most accurate model that is in time, and does not oscillate."""

from itertools import pairwise
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from service.errors import NoSuitableModel
from service.models.family import Choice, Family, pareto_front
from service.models.model import Model


class FakeModel:
    """A model, as far as the choice reads it."""

    def __init__(self, name: str, top1: float) -> None:
        self.name, self.top1 = name, top1
        self.queue = SimpleNamespace(cost=SimpleNamespace(per_image=lambda: IDLE_SECONDS[name]))


MEMBERS = [cast(Model, FakeModel(name, top1)) for name, top1 in (("best", 0.8), ("middle", 0.7), ("fastest", 0.6))]
IDLE_SECONDS = {"best": 0.040, "middle": 0.020, "fastest": 0.010}


def family() -> Family:
    return Family("f", step_up_headroom=0.5)


def choose(
    chooser: Family, waiting: float, *, allowed: float = 0.100, min_top1: float = 0.0, refusing: bool = False
) -> tuple[str, Choice]:
    """The name of the model chosen and why, with `waiting` images ahead, each at the speed of the model asked about."""
    model, choice = chooser.decide(
        MEMBERS,
        predict=lambda model: IDLE_SECONDS[model.name] * (1 + waiting),
        predict_idle=lambda model: IDLE_SECONDS[model.name],
        allowed_seconds=allowed,
        min_top1=min_top1,
        refusing=refusing,
    )
    chooser.follow(model)
    return model.name, choice


def test_an_idle_service_answers_with_the_most_accurate_model() -> None:
    name, choice = choose(family(), waiting=0)
    assert (name, choice["reason"], choice["skipped"]) == ("best", "most_accurate", [])
    assert choice["predicted_ms"] == pytest.approx(40)


def test_an_idle_service_keeps_to_it_however_the_times_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    for idle, allowed in zip(random.uniform(0.02, 0.04, 5000), random.uniform(0.04, 1, 5000), strict=True):
        monkeypatch.setitem(IDLE_SECONDS, "best", float(idle))
        assert choose(family(), waiting=0, allowed=float(allowed))[0] == "best", (idle, allowed)


def test_under_load_it_steps_down_to_what_fits_and_names_the_models_it_skipped() -> None:
    name, choice = choose(family(), waiting=3)
    assert (name, choice["reason"]) == ("middle", "deadline")
    assert choice["skipped"] == [{"model": "best", "predicted_ms": 160}]


def test_if_nothing_fits_the_fastest_is_left_for_admission_to_judge() -> None:
    name, choice = choose(family(), waiting=50)
    assert name == "fastest"
    assert choice["predicted_ms"] > 100


def test_a_step_back_up_needs_more_headroom_than_staying() -> None:
    chooser = family()
    assert choose(chooser, waiting=1.4)[0] == "best"
    assert choose(chooser, waiting=3)[0] == "middle"
    name, choice = choose(chooser, waiting=1.4)
    assert (name, choice["reason"]) == ("middle", "headroom")
    assert choose(chooser, waiting=0.7)[0] == "best"
    assert choose(chooser, waiting=1.4)[0] == "best", "it stands there again"


def test_a_load_around_the_limit_does_not_make_it_oscillate() -> None:
    chooser = family()
    names = [choose(chooser, waiting=1.45 + 0.1 * (step % 2))[0] for step in range(100)]
    assert sum(a != b for a, b in pairwise(names)) <= 1


def test_while_requests_are_refused_the_time_left_beside_its_own_work_is_shared_among_the_models() -> None:
    def chosen(wait: float, *, refusing: bool, min_top1: float = 0.0) -> tuple[str, str]:
        """With work ahead that takes `wait` seconds, whichever model is chosen; 100 ms are allowed."""
        model, choice = family().decide(
            MEMBERS,
            predict=lambda model: wait + IDLE_SECONDS[model.name],
            predict_idle=lambda model: IDLE_SECONDS[model.name],
            allowed_seconds=0.100,
            min_top1=min_top1,
            refusing=refusing,
        )
        return model.name, choice["reason"]

    # Beside their own work 60, 80 and 90 ms are left: half of it for the best, three quarters, and all of it.
    waits = (0.0, 0.029, 0.031, 0.059, 0.061, 0.079, 0.081, 0.089)
    assert [chosen(wait, refusing=True)[0] for wait in waits] == [
        "best", "best", "middle", "middle", "fastest", "fastest", "fastest", "fastest",
    ]  # fmt: skip
    assert [chosen(wait, refusing=False)[0] for wait in waits] == [
        "best", "best", "best", "best", "middle", "middle", "fastest", "fastest",
    ]  # fmt: skip
    assert chosen(0.031, refusing=True)[1] == "headroom"
    assert chosen(0.091, refusing=True) == ("fastest", "deadline"), "it is for admission to refuse it"
    assert chosen(0.059, refusing=True, min_top1=0.8) == ("best", "most_accurate"), "nothing faster is allowed"


def test_a_load_that_the_fastest_model_could_answer_is_answered_nearly_whole() -> None:
    """One server, without batches, and a request each 12 ms, for which the models take 40, 20 and 10 ms."""
    gaps = np.random.default_rng(0).exponential(0.012, 20_000)

    def serve(*, refusing_seconds: float) -> tuple[float, float]:
        """The shares of requests that were refused, and that were answered rightly."""
        chooser, ahead, now, refused_at, right, refused = family(), 0.0, 0.0, -1e9, 0.0, 0
        for gap in gaps:
            now, ahead = now + gap, max(0.0, ahead - gap)
            model, _ = chooser.decide(
                MEMBERS,
                predict=lambda model, ahead=ahead: ahead + IDLE_SECONDS[model.name],  # type: ignore[misc]
                predict_idle=lambda model: IDLE_SECONDS[model.name],
                allowed_seconds=0.250,
                refusing=now < refused_at + refusing_seconds,
            )
            if ahead + IDLE_SECONDS[model.name] > 0.250:
                refused, refused_at = refused + 1, now
                continue
            chooser.follow(model)
            ahead, right = ahead + IDLE_SECONDS[model.name], right + model.top1
        return refused / len(gaps), right / len(gaps)

    greedy, shared = serve(refusing_seconds=0), serve(refusing_seconds=10)
    assert shared[0] < greedy[0] / 2
    assert shared[1] > greedy[1]


def test_a_model_that_needs_most_of_the_deadline_by_itself_is_not_locked_out() -> None:
    chooser = family()
    assert choose(chooser, waiting=3, allowed=0.050)[0] == "fastest"
    assert choose(chooser, waiting=0, allowed=0.050)[0] == "best"


def test_the_floor_is_kept_even_if_that_means_being_late() -> None:
    assert choose(family(), waiting=50, min_top1=0.65)[0] == "middle"


def test_a_floor_above_all_models_is_an_error_that_names_the_best() -> None:
    with pytest.raises(NoSuitableModel, match=r"reaches a top-1 of 0\.9: the best has 0\.8000"):
        choose(family(), waiting=0, min_top1=0.9)
    with pytest.raises(NoSuitableModel, match="no ready model"):
        family().decide([], predict=lambda _: 0, predict_idle=lambda _: 0, allowed_seconds=1)


def test_models_hardly_cheaper_than_a_more_accurate_one_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pareto_front(MEMBERS) == MEMBERS
    monkeypatch.setitem(IDLE_SECONDS, "middle", 0.038)
    assert [model.name for model in pareto_front(MEMBERS)] == ["best", "fastest"]
