"""Failed requests to a store, and when to retry them: after pauses that double."""

from collections.abc import Callable, Container, Hashable
from dataclasses import dataclass

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 600.0


@dataclass(slots=True)
class _Failure:
    tag: str
    error: Exception
    count: int
    again_at: float


class Attempts:
    """Failures by what was requested. Something new (another tag) may be requested at once."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures: dict[Hashable, _Failure] = {}

    def pending(self, key: Hashable, tag: str = "") -> Exception | None:
        """The last error while it is too early for another attempt, else None."""
        failure = self._failures.get(key)
        if failure is None or failure.tag != tag or self._clock() >= failure.again_at:
            return None
        return failure.error

    def failed(self, key: Hashable, error: Exception, tag: str = "") -> bool:
        """Note a failure; returns whether its reason is news."""
        known = self._failures.get(key)
        count = known.count + 1 if known and known.tag == tag else 1
        pause = min(_FIRST_PAUSE_SECONDS * 2 ** min(count - 1, 20), _LONGEST_PAUSE_SECONDS)
        self._failures[key] = _Failure(tag, error, count, self._clock() + pause)
        return known is None or str(known.error) != str(error)

    def forget(self, key: Hashable) -> None:
        """Forget a failure: the request succeeded, or its object is gone."""
        self._failures.pop(key, None)

    def forget_others(self, known: Container[Hashable]) -> None:
        """Forget the failures of anything else: it is gone."""
        self._failures = {key: failure for key, failure in self._failures.items() if key in known}

    def clear(self) -> None:
        """Allow everything to be retried now."""
        for failure in self._failures.values():
            failure.again_at = self._clock()
