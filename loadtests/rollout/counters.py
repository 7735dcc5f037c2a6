"""The counters of a service's rollouts at one moment, read from /metrics, and their differences."""

from collections import Counter
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families

from loadtests.errors import LoadTestError

ARMS = PRIMARY, CANDIDATE = ("primary", "candidate")
_PREFIX = "stridevit_rollout_"
_SECONDS = 30.0
"""Time for an answer of a busy service."""


@dataclass(kw_only=True)
class Duration:
    """Durations of one arm."""

    count: int = 0
    seconds: float = 0.0
    buckets: dict[float, int] = field(default_factory=dict)
    """How many took at most each number of seconds."""

    @property
    def mean_ms(self) -> float | None:
        """Mean in milliseconds; None without any."""
        return 1000 * self.seconds / self.count if self.count else None

    def quantile_ms(self, fraction: float) -> float | None:
        """As Prometheus's `histogram_quantile`: linear within a bucket; None without any."""
        rank, low, below = fraction * self.count, 0.0, 0
        if not self.count:
            return None
        for bound, count in sorted(self.buckets.items()):
            if count >= rank and count > below:
                return 1000 * (low if bound == float("inf") else low + (bound - low) * (rank - below) / (count - below))
            low, below = (low if bound == float("inf") else bound), count
        return None


@dataclass(kw_only=True)
class Counts:
    """What was counted for one rollout."""

    images: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By arm and outcome."""
    compared: Counter[str] = field(default_factory=Counter)
    """By `agree` or `differ`."""
    dropped: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    durations: dict[str, Duration] = field(default_factory=lambda: {arm: Duration() for arm in ARMS})

    def since(self, before: "Counts") -> "Counts":
        """What has been counted since an earlier moment. Raises LoadTestError if the service was restarted since."""
        if self.compared.total() < before.compared.total() or any(
            self.durations[arm].count < before.durations[arm].count for arm in ARMS
        ):
            raise LoadTestError(
                "the service was started again while it was read: its counters began anew; measure again"
            )
        return Counts(
            images=self.images - before.images,
            compared=self.compared - before.compared,
            dropped=self.dropped - before.dropped,
            fallbacks=self.fallbacks - before.fallbacks,
            durations={arm: _since(self.durations[arm], before.durations[arm]) for arm in ARMS},
        )


def _since(now: Duration, before: Duration) -> Duration:
    return Duration(
        count=now.count - before.count,
        seconds=now.seconds - before.seconds,
        buckets={bound: count - before.buckets.get(bound, 0) for bound, count in now.buckets.items()},
    )


def read(url: str, *, key: str | None = None) -> dict[tuple[str, str], Counts]:
    """The counts of each rollout by its kind (shadow, canary) and its name. Raises LoadTestError."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    address = f"{url.rstrip('/')}/metrics"
    try:
        # Never through a proxy that the environment names.
        answer = httpx.get(address, headers=headers, timeout=_SECONDS, trust_env=False).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise LoadTestError(f"no metrics from {address}: {error}; give the address of a running service") from error
    return parse(answer.text)


def parse(text: str) -> dict[tuple[str, str], Counts]:
    """The same from the text of /metrics."""
    found: dict[tuple[str, str], Counts] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = sample.labels
            if not sample.name.startswith(_PREFIX) or "rollout" not in labels:
                continue
            counts = found.setdefault((labels["kind"], labels["rollout"]), Counts())
            value = int(sample.value)
            match sample.name.removeprefix(_PREFIX):
                case "images_total":
                    counts.images[labels["arm"], labels["outcome"]] = value
                case "compared_total":
                    counts.compared[labels["top1"]] = value
                case "dropped_total":
                    counts.dropped[labels["reason"]] = value
                case "fallbacks_total":
                    counts.fallbacks[labels["reason"]] = value
                case "duration_seconds_sum":
                    counts.durations[labels["arm"]].seconds = sample.value
                case "duration_seconds_count":
                    counts.durations[labels["arm"]].count = value
                case "duration_seconds_bucket":
                    counts.durations[labels["arm"]].buckets[float(labels["le"])] = value
    return found
