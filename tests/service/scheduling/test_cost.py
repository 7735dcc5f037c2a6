"""The cost model: which batch sizes pay, how long work will take, and how it learns from timings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.scheduling.cost import Cost, Load, Plan, candidate_sizes, worthwhile_sizes
from tests.service.conftest import Clock


@pytest.mark.parametrize(
    ("limit", "sizes"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12))]
)
def test_candidates_are_powers_of_two_and_the_limit(limit: int, sizes: tuple[int, ...]) -> None:
    assert candidate_sizes(limit) == sizes


def test_a_large_batch_that_is_no_faster_per_image_is_not_used() -> None:
    assert worthwhile_sizes({1: 0.030, 2: 0.059, 4: 0.117, 8: 0.230}) == (1,)
    assert worthwhile_sizes({1: 0.010, 2: 0.012, 4: 0.016, 8: 0.032}) == (1, 2, 4)


def test_a_batch_is_padded_to_the_next_warmed_up_size_and_never_beyond_the_limit() -> None:
    cost = Cost({1: 0.01, 4: 0.02, 8: 0.03}, Load())
    assert [cost.padded(images) for images in (1, 2, 4, 5, 8)] == [1, 4, 4, 8, 8]
    with pytest.raises(ValueError, match="exceed the largest batch, 8"):
        cost.padded(9)


def test_a_batch_is_split_where_padding_costs_more_than_a_second_batch() -> None:
    dear = Cost({1: 0.010, 2: 0.020, 4: 0.040, 8: 0.080}, Load())
    assert dear.plan(5, free=1) == Plan(4, threads=1)
    cheap = Cost({1: 0.010, 2: 0.011, 4: 0.012, 8: 0.013}, Load())
    assert cheap.plan(5, free=1) == Plan(5, threads=1)
    assert cheap.plan(100, free=1) == Plan(8, threads=1)


def test_the_total_time_is_that_of_the_batches_as_they_would_be_formed() -> None:
    cost = Cost({1: 0.010, 2: 0.020, 4: 0.040, 8: 0.080}, Load())
    assert cost.total(0) == 0
    assert cost.total(21) == pytest.approx(0.080 + 0.080 + 0.040 + 0.010)


@given(
    baseline=st.dictionaries(st.sampled_from((1, 2, 4, 8, 16)), st.floats(1e-4, 1.0), min_size=1),
    waiting=st.integers(1, 100),
)
def test_whatever_the_timings_a_batch_is_never_empty_nor_too_large(baseline: dict[int, float], waiting: int) -> None:
    cost = Cost(baseline, Load())
    plan = cost.plan(waiting, free=1)
    assert plan
    assert 1 <= plan.images <= min(waiting, cost.limit)
    assert cost.padded(plan.images) in baseline
    assert cost.total(waiting) > 0


def test_a_busy_machine_makes_every_model_slower_in_the_prediction() -> None:
    load = Load(clock=Clock())
    one, other = Cost({1: 0.01}, load), Cost({1: 0.02}, load)
    for _ in range(50):
        one.observe(1, 0.03)
    assert one.seconds(1) == pytest.approx(0.03, rel=0.01)
    assert other.seconds(1) > 0.03, "it has not run, but shares the device"


def test_each_batch_size_learns_what_the_load_does_not_explain() -> None:
    load = Load(clock=Clock())
    wrong, right = Cost({1: 0.01}, load), Cost({1: 0.01}, load)
    for _ in range(500):
        wrong.observe(1, 0.02)
        right.observe(1, 0.01)
    assert wrong.seconds(1) == pytest.approx(0.02, rel=0.15)
    assert right.seconds(1) == pytest.approx(0.01, rel=0.15)


def test_a_cost_model_without_timings_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one batch size"):
        Cost({}, Load())


def test_observations_decay_so_that_one_stall_does_not_reject_everybody_for_ever() -> None:
    clock = Clock()
    load = Load(clock=clock)
    cost = Cost({1: 0.010}, load)
    for _ in range(3):
        cost.observe(1, 20.0)
    for _ in range(3):
        load.decoded(2.0, 100_000)
    slow = load.seconds_per_pixel
    stalled = cost.seconds(1)
    assert stalled > 0.05
    clock.now += 5.0
    assert 0.010 < cost.seconds(1) < 0.7 * stalled
    assert load.seconds_per_pixel < 0.8 * slow
    clock.now += 120.0
    assert cost.seconds(1) == pytest.approx(0.010, rel=0.2)
    assert load.decode_seconds < 0.001


def test_a_slow_phase_is_forgotten_after_some_minutes() -> None:
    """Twice as slow for ten minutes, one batch per second, then idle: nothing may be left of it."""
    clock = Clock()
    cost = Cost({1: 0.045}, Load(clock=clock))
    for _ in range(600):
        clock.now += 1.0
        cost.observe(1, 0.090)
    assert cost.seconds(1) == pytest.approx(0.090, rel=0.15)
    clock.now += 300.0
    assert cost.seconds(1) == pytest.approx(0.045, rel=0.1)


def test_after_a_pause_the_first_decoding_counts_in_full() -> None:
    clock = Clock()
    load = Load(clock=clock)
    load.decoded(0.02, 2_000_000)
    clock.now += 60.0
    load.decoded(0.0002, 20_000)
    assert load.decode_seconds == pytest.approx(0.0002, rel=0.05)


def test_one_decoding_that_is_far_slower_than_its_header_says_shuts_nobody_out() -> None:
    load = Load(clock=Clock())
    before = load.seconds_per_pixel
    load.decoded(30.0, 20_000)
    assert load.seconds_per_pixel < 1.4 * before
    load.decoded(1e-9, 2_000_000)
    assert load.seconds_per_pixel == pytest.approx(before, rel=0.01)


def test_decoders_that_are_slower_than_at_the_start_are_believed() -> None:
    load = Load(seconds_per_pixel=1e-8, clock=Clock())
    for work in (20_000, 500_000, 5_000_000) * 20:
        load.decoded(work * 3e-8, work)
    assert load.seconds_per_pixel == pytest.approx(3e-8, rel=0.05)
