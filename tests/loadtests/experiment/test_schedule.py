"""In which order arms are measured, and what fits in a budget."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.compare.compare import one_two_five, rounded
from loadtests.experiment.arms import parse_arms, repeated
from loadtests.experiment.model import Arm, ComparisonPlan
from loadtests.experiment.schedule import LONGEST_SECONDS, SHORTEST_SECONDS, Costs, fitted, order
from tests.loadtests.experiment.benches import comparison_plan


def plan(**changes: Any) -> ComparisonPlan:
    arms = parse_arms("a,b,c")
    return comparison_plan(*arms, repeated(arms[0]), **{"warmup_seconds": 1.0, **changes})


@settings(deadline=None)
@given(st.integers(2, 5), st.integers(1, 12), st.integers(0, 1000))
def test_every_round_has_every_arm_once_and_every_second_goes_backwards(arms: int, rounds: int, seed: int) -> None:
    these = [Arm(label=str(number), model="m") for number in range(arms)]
    blocks = order(these, rounds, seed=seed)
    by_round = [[arm.label for number, arm in blocks if number == wanted] for wanted in range(rounds)]
    assert all(sorted(labels) == [arm.label for arm in these] for labels in by_round)
    for first, second in zip(by_round[::2], by_round[1::2], strict=False):
        assert second == first[::-1]
    assert blocks == order(these, rounds, seed=seed)


def test_the_order_begins_at_random() -> None:
    arms = list(plan().arms)
    firsts = {order(arms, 1, seed=seed)[0][1].label for seed in range(40)}
    assert firsts == {arm.label for arm in arms}


@settings(deadline=None)
@given(st.floats(1, 200), st.floats(1, 30), st.floats(0, 5), st.integers(2, 20), st.integers(0, 3))
def test_a_plan_fits_its_budget_or_is_as_small_as_possible(
    budget: float, server: float, generator: float, rounds: int, searches: int
) -> None:
    costs = Costs(server=server, generator=generator)
    found = fitted(plan(budget_minutes=budget, rounds=rounds, capacity_searches=searches), costs)
    assert SHORTEST_SECONDS <= found.seconds <= LONGEST_SECONDS
    assert 2 <= found.rounds <= rounds
    assert costs.whole(found) <= budget * 60 or (found.seconds, found.rounds) == (SHORTEST_SECONDS, 2)
    # Windows give way before rounds do.
    assert found.rounds == rounds or found.seconds == SHORTEST_SECONDS
    # There is no room for half a second more.
    longer = replace(found, seconds=found.seconds + 0.5)
    assert costs.whole(longer) > budget * 60 or found.seconds == LONGEST_SECONDS or found.rounds < rounds


def test_a_given_length_stays_and_rounds_give_way() -> None:
    found = fitted(plan(budget_minutes=10, capacity_searches=0, seconds=12.0), Costs())
    assert found.seconds == 12
    assert 2 <= found.rounds < 10
    assert Costs().whole(found) <= 600


@pytest.mark.parametrize(("rate", "said"), [(123.4, 120), (1.234, 1.2), (0.0567, 0.057), (987.6, 990)])
def test_rates_have_two_digits(rate: float, said: float) -> None:
    assert rounded(rate) == said


def test_objectives_are_round_numbers() -> None:
    assert [one_two_five(number) for number in (0.9, 1.5, 31, 60, 890, 1000)] == [1, 2, 50, 100, 1000, 1000]
