"""How long to wait before something that ended is started again."""

from typing import Final

_FIRST, _MOST = 0.25, 30.0
_STABLE_SECONDS: Final = 60.0
"""What ran for this long begins again with the shortest pause."""


class Pause:
    """Pauses that double, up to half a minute, while what is started does not last."""

    def __init__(self) -> None:
        self._next = _FIRST

    def after(self, ran_seconds: float) -> float:
        """The pause in seconds, after something that ran for `ran_seconds`."""
        if ran_seconds >= _STABLE_SECONDS:
            self._next = _FIRST
        pause, self._next = self._next, min(_MOST, 2 * self._next)
        return pause
