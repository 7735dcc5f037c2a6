"""Reads a service's counters at the ends of equal rounds, while its clients send the traffic."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loadtests.errors import LoadTestError
from loadtests.experiment.model import Measurement, Progress
from loadtests.rollout.counters import ARMS, CANDIDATE, PRIMARY, Counts
from loadtests.statistics import MIN_ROUNDS, Effect, paired_ratio, wilson

CONFIDENCE = 0.95
_LOOK_SECONDS = 0.5

Name = tuple[str, str]
"""Kind and name of a rollout."""


@dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """What is read, and for how long."""

    url: str
    seconds: float
    """Time to read, at most."""
    images: int | None
    """Images to compare, of the rollout that has compared the fewest; None for as many as there are in the time."""
    rounds: int


@dataclass(kw_only=True)
class RolloutReading(Measurement):
    """The counts of each round."""

    plan: RolloutPlan
    rounds: list[dict[Name, Counts]] = field(default_factory=list)

    @property
    def measured(self) -> bool:
        """Whether a round was read to its end."""
        return bool(self.rounds)

    def names(self) -> list[Name]:
        """The rollouts that were there in all rounds."""
        return sorted(name for name in self.rounds[0] if all(name in counts for counts in self.rounds))

    def of(self, name: Name) -> list[Counts]:
        """The counts of one rollout, by rounds."""
        return [counts[name] for counts in self.rounds]


def measure(
    reading: RolloutReading,
    progress: Progress,
    read: Callable[[], dict[Name, Counts]],
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Fill the rounds. Raises LoadTestError if there is no rollout, or the service is restarted."""
    plan, began = reading.plan, clock()
    first = before = read()
    if not first:
        raise LoadTestError(f"{plan.url} has no rollout: start the service with --shadow or --canary")
    while len(reading.rounds) < plan.rounds:
        sleep(_LOOK_SECONDS)
        now = read()
        changes = {name: counts.since(before[name]) for name, counts in now.items() if name in before}
        compared = min((now[name].since(first[name]).compared.total() for name in first if name in now), default=0)
        done = (clock() - began) / plan.seconds
        if plan.images:
            done = max(done, compared / plan.images)
        progress.step(f"{compared:,} images compared", min(done, 1.0), 1.0)
        if done >= (len(reading.rounds) + 1) / plan.rounds:
            reading.rounds.append(changes)
            before = now
        if done >= 1:
            break


def total(rounds: list[Counts]) -> Counts:
    """The sum of some rounds."""
    found = Counts()
    for counts in rounds:
        for name in ("images", "compared", "dropped", "fallbacks"):
            getattr(found, name).update(getattr(counts, name))
        for arm in ARMS:
            whole, part = found.durations[arm], counts.durations[arm]
            whole.count += part.count
            whole.seconds += part.seconds
            for bound, count in part.buckets.items():
                whole.buckets[bound] = whole.buckets.get(bound, 0) + count
    return found


def latency(rounds: list[Counts]) -> Effect | None:
    """The candidate's mean duration against the primary's, paired by rounds; None for fewer than five such rounds."""
    means = [[counts.durations[arm].mean_ms for arm in (CANDIDATE, PRIMARY)] for counts in rounds]
    pairs = [(one, other) for one, other in means if one and other]
    if len(pairs) < MIN_ROUNDS:
        return None
    return paired_ratio(*zip(*pairs, strict=True))


def figures(rounds: list[Counts]) -> dict[str, Any]:
    """What the report says of one rollout."""
    whole, effect = total(rounds), latency(rounds)
    agree, compared = whole.compared["agree"], whole.compared.total()
    low, high = wilson(agree, compared, level=CONFIDENCE)
    estimate = effect.at(CONFIDENCE) if effect else None
    arms = {
        arm: {
            "images": whole.images[arm, "ok"],
            "errors": {
                outcome: n for (of, outcome), n in sorted(whole.images.items()) if of == arm and outcome != "ok"
            },
            "durations": whole.durations[arm].count,
            "mean_ms": whole.durations[arm].mean_ms,
            "p50_ms": whole.durations[arm].quantile_ms(0.5),
            "p99_ms": whole.durations[arm].quantile_ms(0.99),
        }
        for arm in ARMS
    }
    return {
        "compared": compared,
        "agree": agree,
        "agreement": {"share": agree / compared if compared else None, "low": low, "high": high},
        "latency": estimate and dict(zip(("estimate", "low", "high"), estimate, strict=True)),
        "arms": arms,
        "dropped": dict(sorted(whole.dropped.items())),
        "fallbacks": dict(sorted(whole.fallbacks.items())),
    }
