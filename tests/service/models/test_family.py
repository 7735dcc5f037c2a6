"""A family answers with its most accurate model that is in time, and does not flap."""

from itertools import pairwise
from typing import cast

import pytest

from service.errors import NoSuitableModel
from service.models.family import Choice, Family
from service.models.model import Model


class Rung:
    """A model as far as the choice looks at it."""

    def __init__(self, name: str, top1: float) -> None:
        self.name, self.top1 = name, top1


LADDER = [cast(Model, Rung(name, top1)) for name, top1 in (("best", 0.8), ("middle", 0.7), ("fastest", 0.6))]
ALONE = {"best": 0.040, "middle": 0.020, "fastest": 0.010}


def choose(family: Family, waiting: float, *, allowed: float = 0.100, min_top1: float = 0.0) -> Choice:
    """With `waiting` images ahead, each at the speed of the model that is asked about."""
    return family.choose(
        LADDER,
        predict=lambda model: ALONE[model.name] * (1 + waiting),
        alone=lambda model: ALONE[model.name],
        allowed_seconds=allowed,
        min_top1=min_top1,
    )


def test_an_idle_service_answers_with_the_most_accurate_model() -> None:
    choice = choose(Family("f"), waiting=0)
    assert (choice.model.name, choice.reason, choice.passed_over) == ("best", "most_accurate", ())
    assert choice.predicted_ms == pytest.approx(40)


def test_under_load_it_steps_down_to_what_fits_and_says_what_it_passed_over() -> None:
    choice = choose(Family("f"), waiting=3)
    assert (choice.model.name, choice.reason) == ("middle", "deadline")
    assert [(name, round(ms)) for name, ms in choice.passed_over] == [("best", 160)]


def test_if_nothing_fits_the_fastest_is_left_for_admission_to_judge() -> None:
    choice = choose(Family("f"), waiting=50)
    assert choice.model.name == "fastest"
    assert choice.predicted_ms > 100


def test_a_step_back_up_needs_more_headroom_than_staying() -> None:
    family = Family("f", recover=0.5)
    assert choose(family, waiting=1.4).model.name == "best"
    assert choose(family, waiting=3).model.name == "middle"
    hovering = choose(family, waiting=1.4)
    assert (hovering.model.name, hovering.reason) == ("middle", "recovering")
    assert choose(family, waiting=0.7).model.name == "best"
    assert choose(family, waiting=1.4).model.name == "best", "it stands there again"


def test_a_load_around_the_limit_does_not_make_it_flap() -> None:
    family = Family("f", recover=0.5)
    names = [choose(family, waiting=1.45 + 0.1 * (step % 2)).model.name for step in range(100)]
    assert sum(a != b for a, b in pairwise(names)) <= 1


def test_a_model_that_needs_most_of_the_deadline_by_itself_is_not_locked_out() -> None:
    family = Family("f", recover=0.5)
    assert choose(family, waiting=3, allowed=0.050).model.name == "fastest"
    assert choose(family, waiting=0, allowed=0.050).model.name == "best"


def test_the_floor_is_kept_even_if_that_means_being_late() -> None:
    choice = choose(Family("f"), waiting=50, min_top1=0.65)
    assert choice.model.name == "middle"


def test_a_floor_above_all_models_is_an_error_that_names_the_best() -> None:
    with pytest.raises(NoSuitableModel, match=r"reaches a top-1 of 0\.9: the best has 0\.8000"):
        choose(Family("f"), waiting=0, min_top1=0.9)
    with pytest.raises(NoSuitableModel, match="no ready model"):
        Family("f").choose([], predict=lambda _: 0, alone=lambda _: 0, allowed_seconds=1)
