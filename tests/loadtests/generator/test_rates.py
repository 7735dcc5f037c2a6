"""When images are due."""

import itertools

import numpy as np
import pytest

from loadtests.generator.rates import Part, parse_rates, poisson_arrivals, rate_at


def arrivals(count: int, *, rate: float, seed: str) -> list[float]:
    return list(itertools.islice(poisson_arrivals(rate, seed=seed), count))


def test_arrivals_are_a_poisson_process() -> None:
    gaps = np.diff([0.0, *arrivals(10_000, rate=50, seed="a")])
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    # Exponential gaps vary as much as their mean; a steady beat would not.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert np.corrcoef(gaps[:-1], gaps[1:])[0, 1] == pytest.approx(0, abs=0.05)


def test_a_seed_gives_the_same_arrivals_again_and_another_one_others() -> None:
    assert arrivals(50, rate=3, seed="a") == arrivals(50, rate=3, seed="a") != arrivals(50, rate=3, seed="b")


def test_rates_over_time() -> None:
    parts = parse_rates("200:30, 50>500:60,1000:5")
    assert parts[1] == Part(first=50, last=500, seconds=60)
    assert rate_at(parts, 29.9) == 200
    assert rate_at(parts, 60) == pytest.approx(275)
    assert rate_at(parts, 94.9) == 1000
    assert rate_at(parts, 95.1) is None
    for wrong in ("", "200", "200:", "0:5", "5:0", "a:1", "1:2:3", "1>2"):
        with pytest.raises(ValueError, match=r"RATE:SECONDS|greater than zero"):
            parse_rates(wrong)
