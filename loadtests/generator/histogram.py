"""Latencies as a histogram that can be merged: HDR, 1 µs to 1 hour, three significant digits.

Locust rounds its own percentiles to two digits. A histogram costs the same for any number of requests, and the
histograms of several workers add up exactly.
"""

from typing import Any

from hdrh.histogram import HdrHistogram

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)

_LARGEST_US = 3_600_000_000
_DIGITS = 3


class Latencies:
    """Histogram of the answered requests, and the number of those without an answer."""

    def __init__(self) -> None:
        self._answered = HdrHistogram(1, _LARGEST_US, _DIGITS)
        self.failed = 0

    def add(self, latency_ms: float, *, ok: bool) -> None:
        """Count one request."""
        if ok:
            self._answered.record_value(min(max(1, round(latency_ms * 1000)), _LARGEST_US))
        else:
            self.failed += 1

    def take(self) -> dict[str, Any]:
        """Everything added since the last call, to be merged by another process."""
        taken = {"answered": self._answered.encode().decode("ascii"), "failed": self.failed}
        self._answered.reset()
        self.failed = 0
        return taken

    def merge(self, taken: dict[str, Any]) -> None:
        """Add what another process took."""
        self._answered.decode_and_add(taken["answered"].encode("ascii"))
        self.failed += taken["failed"]

    def as_dict(self) -> dict[str, Any]:
        """Counts, and percentiles in ms; a failed request counts as slower than every answered one."""
        answered: int = self._answered.get_total_count()
        found: dict[str, Any] = {"answered": answered, "failed": self.failed}
        for rank in PERCENTILES:
            place = rank / 100 * (answered + self.failed)
            found[f"p{rank:g}_ms"] = (
                self._answered.get_value_at_percentile(100 * place / answered) / 1000 if 0 < place <= answered else None
            )
        return found

    def summary(self) -> str:
        """The same as one line of text."""
        found = self.as_dict()
        counts = f"{found.pop('answered')} answered, {found.pop('failed')} not"
        times = {name.removesuffix("_ms"): "not answered" if ms is None else f"{ms:.2f}" for name, ms in found.items()}
        return f"{counts}; ms from the moment each was due: {', '.join(map(' '.join, times.items()))}"
