"""Intervals against known answers, and what they promise against simulated reports of equal arms."""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import signal, stats

from loadtests.statistics import (
    Effect,
    holm,
    independent_proportions,
    paired_difference,
    paired_proportions,
    paired_ratio,
    percentile,
    trend,
    unpaired_ratio,
    wilson,
)

INF = math.inf
ARMS, METRICS, ROUNDS = 4, 9, 10
TESTS = (ARMS - 1) * METRICS
values = st.lists(st.floats(0.5, 500).map(lambda value: round(value, 3)), min_size=6, max_size=6)


def present(effect: Effect | None) -> Effect:
    assert effect is not None
    return effect


def test_holm_s_procedure_stops_at_the_first_p_value_that_is_too_large() -> None:
    results = holm([0.01, 0.04, 0.03, 0.005], 0.05)
    assert [result.rejected for result in results] == [True, False, False, True]
    assert [result.p_value for result in results] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [result.level for result in results] == pytest.approx([1 - 0.05 / 3, 0.975, 0.975, 0.9875])
    assert [result.rejected for result in holm([0.01, 0.04, 0.02], 0.05)] == [True, True, True]
    assert holm([], 0.05) == []


def test_a_percentile_is_a_sample_and_may_be_infinite_but_never_nan() -> None:
    samples = [*range(1, 91), *[INF] * 10]
    assert percentile(samples, 50) == 51
    assert percentile(samples, 95) == INF
    assert percentile([1.0, 2.0, INF], 50, min_beyond=0) == 2
    assert percentile([1.0, 2.0, INF], 51, min_beyond=0) == INF
    assert percentile([INF, INF], 30, min_beyond=0) == INF
    assert percentile([], 50, min_beyond=0) is None


@pytest.mark.parametrize(
    ("count", "rank", "shown"),
    [(0, 50, False), (9, 50, False), (10, 50, True), (499, 99, False), (500, 99, True), (5000, 99.9, True)],
)
def test_a_percentile_needs_five_samples_beyond_it(count: int, rank: float, shown: bool) -> None:
    assert (percentile(np.arange(float(count)), rank) is not None) is shown


@given(st.lists(st.floats(0, 1e4), min_size=1), st.integers(0, 100))
def test_at_least_the_share_of_a_percentile_is_not_above_it(samples: list[float], rank: int) -> None:
    found = percentile(samples, rank, min_beyond=0)
    assert found in samples
    assert sum(sample <= found for sample in samples) * 100 >= (len(samples) - 1) * rank


def test_a_ratio_that_is_the_same_in_all_rounds_is_known_exactly() -> None:
    baseline = [100.0, 120.0, 90.0, 333.0, 101.7]
    effect = present(paired_ratio([1.1 * value for value in baseline], baseline))
    assert effect.at(0.99815) == pytest.approx((1.1, 1.1, 1.1))
    assert effect.p_value < 1e-12


def test_rounds_that_are_the_same_in_both_arms_show_no_difference() -> None:
    for effect in (paired_ratio([3.0] * 5, [3.0] * 5), paired_difference([3.0] * 5, [3.0] * 5, ceiling=9)):
        assert present(effect).p_value == 1
        assert present(effect).centre == 0


def test_the_interval_is_student_s() -> None:
    arm, baseline = [21.0, 24.0, 19.0, 25.0, 22.0, 23.5], [20.0, 21.0, 19.5, 22.0, 21.0, 20.0]
    effect = present(paired_difference(arm, baseline, ceiling=99))
    expected = stats.ttest_rel(arm, baseline)
    assert effect.p_value == pytest.approx(expected.pvalue)
    estimate, low, high = effect.at(0.9)
    interval = expected.confidence_interval(0.9)
    assert (estimate, low, high) == pytest.approx((1.8333333, interval.low, interval.high))


def test_four_rounds_and_values_of_zero_give_no_interval() -> None:
    assert paired_ratio([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 5.0]) is None
    assert paired_difference([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 5.0], ceiling=9) is None
    assert paired_ratio([1.0, 2.0, 3.0, 4.0, 0.0], [1.0] * 5) is None
    assert unpaired_ratio([1.0] * 9, [1.0] * 4) is None
    assert paired_difference([INF] * 5, [INF] * 5, ceiling=INF) is None


def test_requests_never_answered_make_an_arm_worse_by_an_unknown_amount() -> None:
    baseline = [10.0, 11.0, 10.5, 9.5, 10.2]
    effect = present(paired_difference([INF] * 5, baseline, ceiling=50))
    estimate, low, high = effect.at(0.95)
    assert (estimate, high) == (INF, INF)
    assert 38 < low < 39.76
    mirrored = present(paired_difference(baseline, [INF] * 5, ceiling=50))
    assert mirrored.at(0.95) == (-INF, -INF, -low)
    assert mirrored.p_value == effect.p_value < 0.001


def test_one_round_without_answers_is_no_verdict_and_both_arms_without_are_alike() -> None:
    baseline = [10.0, 11.0, 10.5, 9.5, 10.2]
    once = present(paired_difference([INF, *baseline[1:]], baseline, ceiling=50))
    estimate, low, high = once.at(0.95)
    assert (estimate, high) == (INF, INF)
    assert low < 0
    assert present(paired_difference([INF] * 5, [INF] * 5, ceiling=50)).at(0.95) == (0, -INF, INF)


def test_an_arm_may_be_better_although_one_of_its_rounds_was_not_answered() -> None:
    arm = [INF, 10.0, 10.1, 9.9, 10.0, 10.2]
    estimate, low, high = present(paired_difference(arm, [INF] * 6, ceiling=50)).at(0.95)
    assert estimate == pytest.approx((3 * -40 - 39.9 - 40.1 - 39.8 + 40) / 6)
    assert low == -INF
    assert high < 0


def answers(both: int, only_arm: int, only_baseline: int, neither: int) -> tuple[list[bool], list[bool]]:
    arm = [True] * both + [True] * only_arm + [False] * only_baseline + [False] * neither
    return arm, [True] * both + [False] * only_arm + [True] * only_baseline + [False] * neither


def test_right_answers_on_the_same_images_are_compared_as_pairs() -> None:
    # CIFAR-100's test images, by C-SRA at R=2 and by MHA: 1,045 that the first alone has right, 836 the second alone.
    paired = present(paired_proportions(*answers(4325, 1045, 836, 3794)))
    assert paired.at(0.95) == pytest.approx((2.09, 1.24, 2.94), abs=0.005)
    assert paired.p_value == pytest.approx(1.58e-6, rel=0.01)
    independent = present(independent_proportions(0.5370, 10_000, 0.5161, 10_000))
    assert independent.at(0.95) == pytest.approx((2.09, 0.71, 3.47), abs=0.01)


def test_the_paired_interval_is_that_of_agresti_and_min() -> None:
    # Approval of a prime minister, 150 against 86 of 1,600 who changed their minds (Agresti 2013, section 11.1).
    approval = present(paired_proportions(*answers(794, 150, 86, 570)))
    assert approval.at(0.95) == pytest.approx((4, 2.13, 5.86), abs=0.02)
    # By hand: 1.95996 · √(1 + 0) / 12 on both sides of none.
    assert present(paired_proportions(*answers(5, 0, 0, 5))).at(0.95) == pytest.approx((0, -16.333, 16.333), abs=1e-3)
    assert present(paired_proportions(*answers(0, 3, 0, 0))).at(0.95)[2] <= 100
    assert paired_proportions([], []) is None


@pytest.mark.parametrize(("only_one", "only_other"), [(0, 0), (1, 0), (5, 5), (12, 4), (62, 45)])
def test_mcnemar_s_p_value_counts_all_outcomes_that_are_no_more_likely(only_one: int, only_other: int) -> None:
    trials = only_one + only_other
    few = sum(math.comb(trials, number) for number in range(min(only_one, only_other) + 1))
    one, other = (
        present(paired_proportions(*answers(1, *only, 1))).p_value
        for only in ((only_one, only_other), (only_other, only_one))
    )
    assert one == other == pytest.approx(min(1, 2 * few / 2**trials))


@pytest.mark.parametrize(("hits", "of"), [(0, 10), (5, 10), (10, 10), (5161, 10_000)])
def test_wilson_s_interval_holds_the_shares_from_which_the_hits_are_not_far(hits: int, of: int) -> None:
    low, high = wilson(hits, of)
    for share in {low, high} - {0.0, 1.0}:
        assert abs(hits / of - share) == pytest.approx(1.959964 * math.sqrt(share * (1 - share) / of))
    assert 0 <= low <= hits / of <= high <= 1
    assert wilson(0, 0) == (0, 1)


def test_shares_of_right_answers_are_compared_as_if_of_other_images() -> None:
    # (60 + 1) / 102 and (50 + 1) / 102; sqrt(0.59804 * 0.40196 / 102 + 0.25 / 102) = 0.06934.
    effect = present(independent_proportions(0.6, 100, 0.5, 100))
    assert effect.at(0.95) == pytest.approx((10, 9.80 - 13.59, 9.80 + 13.59), abs=0.02)
    assert present(independent_proportions(1, 100, 1, 100)).at(0.95)[1] < 0
    assert present(independent_proportions(0.55, 10_000, 0.5, 10_000)).p_value < 1e-6
    assert independent_proportions(0.5, 0, 0.5, 10) is None


def test_two_runs_are_compared_by_welch_s_test() -> None:
    new, old = [9.0, 9.4, 8.8, 9.1, 9.2, 9.9], [10.0, 12.0, 11.0, 9.0, 10.5]
    effect = present(unpaired_ratio(new, old))
    expected = stats.ttest_ind(np.log(new), np.log(old), equal_var=False)
    assert effect.df == pytest.approx(expected.df)
    assert effect.p_value == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    ratio = stats.gmean(new) / stats.gmean(old)
    assert effect.at(0.95) == pytest.approx((ratio, math.exp(interval.low), math.exp(interval.high)))
    assert present(unpaired_ratio([2.0] * 5, [2.0] * 5)).p_value == 1


@given(values, values)
def test_arms_that_change_places_give_the_reciprocal_and_the_negative(arm: list[float], baseline: list[float]) -> None:
    one, other = present(paired_ratio(arm, baseline)), present(paired_ratio(baseline, arm))
    estimate, low, high = one.at(0.95)
    assert other.at(0.95) == pytest.approx((1 / estimate, 1 / high, 1 / low))
    assert one.p_value == pytest.approx(other.p_value)
    estimate, low, high = present(paired_difference(arm, baseline, ceiling=1e3)).at(0.95)
    assert present(paired_difference(baseline, arm, ceiling=1e3)).at(0.95) == (-estimate, -high, -low)


@given(values, values, st.sampled_from([0.001, 3.0, 1000.0]))
def test_the_unit_of_the_figures_changes_nothing_else(arm: list[float], baseline: list[float], unit: float) -> None:
    scaled = [[unit * value for value in one] for one in (arm, baseline)]
    ratio, same = present(paired_ratio(arm, baseline)), present(paired_ratio(*scaled))
    assert same.at(0.95) == pytest.approx(ratio.at(0.95), rel=1e-6)
    difference = present(paired_difference(arm, baseline, ceiling=1e9))
    times = present(paired_difference(*scaled, ceiling=1e9))
    assert times.at(0.95) == pytest.approx([unit * end for end in difference.at(0.95)], rel=1e-6, abs=1e-9 * unit)


@given(st.lists(st.tuples(values, values, st.booleans()), min_size=1, max_size=6))
def test_an_interval_excludes_no_difference_exactly_where_holm_rejects(
    pairs: list[tuple[list[float], list[float], bool]],
) -> None:
    effects = [
        present(paired_ratio(arm, baseline) if ratio else paired_difference(arm, baseline, ceiling=1e3))
        for arm, baseline, ratio in pairs
    ]
    tests = holm([effect.p_value for effect in effects], 0.05)
    for effect, test in zip(effects, tests, strict=True):
        # Not at the edge itself, where the last bit decides.
        assume(abs(effect.p_value - (1 - test.level)) > 1e-9)
        _, low, high = effect.at(test.level)
        even = 1.0 if effect.ratio else 0.0
        assert (not low <= even <= high) == test.rejected == (test.p_value <= 0.05)


def equal_reports(count: int, seed: int) -> Iterator[npt.NDArray[np.float64]]:
    """Blocks by round, arm and figure: rounds differ, noise is heavy-tailed, figures go together, some blocks stall."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        rounds = generator.normal(0, 0.05, (ROUNDS, 1, METRICS))
        together, alone = (
            generator.normal(size=shape) if number % 2 else generator.standard_t(3, size=shape) / math.sqrt(3)
            for shape in ((ROUNDS, ARMS, 1), (ROUNDS, ARMS, METRICS))
        )
        stalls = generator.random((ROUNDS, ARMS, 1)) < (0.03 if number % 4 >= 2 else 0)
        noise = 0.035 * (math.sqrt(0.3) * together + math.sqrt(0.7) * alone)
        yield 100 * np.exp(rounds + noise - stalls * generator.uniform(0.2, 0.7, (ROUNDS, ARMS, 1)))


def effects_of(report: npt.NDArray[np.float64]) -> list[Effect]:
    """Every arm against the first: the first figure and the last as ratios, the others as differences."""
    return [
        present(
            paired_ratio(report[:, arm, metric], report[:, 0, metric])
            if metric in {0, METRICS - 1}
            else paired_difference(report[:, arm, metric], report[:, 0, metric], ceiling=1e9)
        )
        for arm in range(1, ARMS)
        for metric in range(METRICS)
    ]


@pytest.mark.parametrize(("count", "most"), [(300, 28), pytest.param(4000, 243, marks=pytest.mark.long)])
def test_at_most_5_percent_of_reports_on_equal_arms_raise_any_alarm(count: int, most: int) -> None:
    alarms = [
        any(test.rejected for test in holm([effect.p_value for effect in effects_of(report)], 0.05))
        for report in equal_reports(count, seed=1)
    ]
    # If it were exactly 5 %, more than `most` would come in one of a thousand such simulations.
    assert sum(alarms) <= most


def test_the_bootstrap_s_own_percentiles_would_raise_far_more_alarms() -> None:
    generator = np.random.default_rng(2)
    alarms = 0
    for report in equal_reports(60, seed=1):
        differences = (np.log(report[:, 1:]) - np.log(report[:, :1])).reshape(ROUNDS, TESTS)
        drawn = generator.multinomial(ROUNDS, np.full(ROUNDS, 1 / ROUNDS), size=4000) / ROUNDS @ differences
        low, high = np.quantile(drawn, (0.05 / TESTS / 2, 1 - 0.05 / TESTS / 2), axis=0)
        alarms += bool(((low > 0) | (high < 0)).any())
    assert alarms > 0.15 * 60


@pytest.mark.parametrize(("noise", "share"), [(0.03, 0.9), (0.04, 0.75)])
def test_ten_percent_less_throughput_is_mostly_found_among_27_tests(noise: float, share: float) -> None:
    generator = np.random.default_rng(3)
    found = 0
    for _ in range(100):
        report = 100 * np.exp(
            generator.normal(0, noise, (ROUNDS, ARMS, METRICS)) + generator.normal(0, 0.05, (ROUNDS, 1, 1))
        )
        report[:, 1, 0] *= 0.9
        effects = effects_of(report)
        first, *_ = holm([effect.p_value for effect in effects], 0.05)
        found += first.rejected and effects[0].at(first.level)[2] < 1
    assert found > share * 100


def test_a_trend_is_the_slope_per_unit_of_time() -> None:
    moments = np.linspace(0, 10, 200)
    found = trend(moments, 3 + 0.5 * moments)
    assert found
    assert found.at(0.95) == pytest.approx((0.5, 0.5, 0.5))
    assert trend(moments[:9], moments[:9]) is None
    flat = trend(moments, np.full(200, 7))
    assert flat
    assert flat.at(0.95) == (0, 0, 0)
    # A part of the time without a value says nothing about its course.
    assert trend([0, 0.1, 0.2, 9.8, 9.9, 10] * 3, [1] * 18) is None


def test_the_interval_of_a_trend_keeps_its_level_where_neighbours_are_alike() -> None:
    generator, moments, covered = np.random.default_rng(0), np.linspace(0, 1, 200), 0
    for _ in range(400):
        noise = signal.lfilter([1], [1, -0.5], generator.normal(size=400))[200:]
        _, low, high = present(trend(moments, noise)).at(0.95)
        covered += low <= 0 <= high
    # Least squares over all values: 77 %.
    assert covered / 400 == pytest.approx(0.95, abs=0.03)
