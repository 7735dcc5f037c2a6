"""How an arm is written, in which order arms are measured, and what fits in a budget."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.compare.compare import one_two_five, rounded
from loadtests.experiment.arms import ArmError, checkout, parse_arms, repeated, resolved
from loadtests.experiment.model import Arm, Plan
from loadtests.experiment.schedule import LONGEST_SECONDS, SHORTEST_SECONDS, Costs, fitted, order
from service.host import git
from tests.processes import in_a_checkout


def test_models_settings_urls_and_commits_are_arms() -> None:
    arms = parse_arms("a, a?max_batch=1&intra_op_threads=2, a@http://10.0.0.7:8000, a?max_batch=1@git:HEAD~1, a")
    assert arms == (
        Arm(label="a", model="a"),
        Arm(
            label="a?max_batch=1&intra_op_threads=2",
            model="a",
            settings=(("max_batch", "1"), ("intra_op_threads", "2")),
        ),
        Arm(label="a@http://10.0.0.7:8000", model="a", url="http://10.0.0.7:8000"),
        Arm(label="a?max_batch=1@git:HEAD~1", model="a", settings=(("max_batch", "1"),), commit="HEAD~1"),
    )
    assert repeated(arms[0]) == Arm(label="a (again)", model="a", repeat_of="a")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" , ", "no model is named"),
        ("@http://a:1", "begins with the name of a model"),
        ("a?max_batch", "settings are written"),
        ("a?--x=1", "settings are written"),
        ("a@ftp://x", "http://HOST:PORT or git:COMMIT"),
        ("a@git:", "http://HOST:PORT or git:COMMIT"),
        ("a?max_batch=1@http://a:1", "cannot be given settings"),
    ],
)
def test_what_is_no_arm_is_refused_with_the_way_to_write_it(text: str, reason: str) -> None:
    with pytest.raises(ArmError, match=reason):
        parse_arms(text)


@in_a_checkout
def test_a_commit_is_unpacked_beside_this_checkout(tmp_path: Path) -> None:
    (arm,) = parse_arms("a@git:HEAD")
    digest = resolved(arm).commit
    assert digest == git("rev-parse", "HEAD")
    folder = checkout(digest, tmp_path)
    assert (folder / "service" / "app.py").is_file()
    assert checkout(digest, tmp_path) == folder
    for wrong in ("no-such-commit", "--output=x"):
        with pytest.raises(ArmError, match="cannot be had from this checkout"):
            resolved(replace(arm, commit=wrong))


def plan(**changes: object) -> Plan:
    arms = parse_arms("a,b,c")
    values: dict[str, object] = {
        "repository": Path("models"),
        "arms": (*arms, repeated(arms[0])),
        "data": None,
        "protocol": "v1",
        "connections": 16,
        "seconds": 0.0,
        "warmup_seconds": 1.0,
        "rounds": 10,
        "default_rounds": 10,
        "load_fractions": (0.3, 0.7),
        "objective_ms": 50.0,
        "objective_percentile": 99.0,
        "capacity_searches": 1,
        "budget_minutes": 30.0,
        "service_arguments": (),
        "seed": 0,
    }
    return Plan(**{**values, **changes})  # type: ignore[arg-type]


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
def test_a_plan_fits_its_budget_or_is_as_small_as_it_can_be(
    budget: float, server: float, generator: float, rounds: int, searches: int
) -> None:
    costs = Costs(server=server, generator=generator)
    found = fitted(plan(budget_minutes=budget, rounds=rounds, capacity_searches=searches), costs, seconds=None)
    assert SHORTEST_SECONDS <= found.seconds <= LONGEST_SECONDS
    assert 2 <= found.rounds <= rounds
    assert costs.whole(found) <= budget * 60 or (found.seconds, found.rounds) == (SHORTEST_SECONDS, 2)
    # Windows give way before rounds do.
    assert found.rounds == rounds or found.seconds == SHORTEST_SECONDS
    # There is no room for half a second more.
    longer = replace(found, seconds=found.seconds + 0.5)
    assert costs.whole(longer) > budget * 60 or found.seconds == LONGEST_SECONDS or found.rounds < rounds


def test_a_wished_length_stays_and_rounds_give_way() -> None:
    found = fitted(plan(budget_minutes=10, capacity_searches=0), Costs(), seconds=12.0)
    assert found.seconds == 12
    assert 2 <= found.rounds < 10
    assert Costs().whole(found) <= 600


def test_numbers_that_one_can_say() -> None:
    assert [rounded(rate) for rate in (123.4, 1.234, 0.0567, 987.6)] == [120, 1.2, 0.057, 990]
    assert [one_two_five(number) for number in (0.9, 1.5, 31, 60, 890, 1000)] == [1, 2, 50, 100, 1000, 1000]
