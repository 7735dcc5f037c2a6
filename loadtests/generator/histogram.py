"""Latencies as a histogram that can be merged: HDR, 1 µs to 1 hour, three significant digits.

Locust's own percentiles are rounded to two digits. A histogram costs the same however many requests there are, and
those of several workers add up exactly.
"""

from typing import Any

from hdrh.histogram import HdrHistogram

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)

_LARGEST_US = 3_600_000_000
_DIGITS = 3


class Latencies:
    """Of the answered requests; those without an answer are counted."""

    def __init__(self) -> None:
        self._answered = HdrHistogram(1, _LARGEST_US, _DIGITS)
        self.failed = 0

    def add(self, latency_ms: float, *, ok: bool) -> None:
        """One request."""
        if ok:
            self._answered.record_value(min(max(1, round(latency_ms * 1000)), _LARGEST_US))
        else:
            self.failed += 1

    def take(self) -> dict[str, Any]:
        """All that was added since the last time, to be sent to who merges."""
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
        whole = answered + self.failed
        return {
            "answered": answered,
            "failed": self.failed,
            **{f"p{rank:g}_ms": self._percentile(rank, answered, whole) for rank in PERCENTILES},
        }

    def lines(self) -> list[str]:
        """The same in words."""
        found = self.as_dict()
        ranks = ", ".join(
            f"p{rank:g} {'not answered' if found[f'p{rank:g}_ms'] is None else format(found[f'p{rank:g}_ms'], '.2f')}"
            for rank in PERCENTILES
        )
        return [f"{found['answered']} answered, {found['failed']} not; ms from the moment each was due: {ranks}"]

    def _percentile(self, rank: float, answered: int, whole: int) -> float | None:
        if not answered or rank / 100 * whole > answered:
            return None
        return float(self._answered.get_value_at_percentile(rank * whole / answered) / 1000)
