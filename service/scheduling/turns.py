"""Whose turn it is: interactive work goes first, and batch work keeps a guaranteed part of the turns."""

BATCH_SHARE = 0.1
"""Where no setting says otherwise."""


class Turns:
    """The turns of one worker, or of several that share a queue. Not safe for threads: its queue's lock guards it."""

    def __init__(self, batch_share: float) -> None:
        """`batch_share`: fraction of the turns that batch work gets while both wait, above 0 and at most 1/2."""
        self._every = round(1 / batch_share)
        self._passed = 0

    def batch_first(self, *, interactive_waits: bool, batch_waits: bool) -> bool:
        """Take the next turn: whether it belongs to batch work."""
        if not (interactive_waits and batch_waits):
            self._passed = 0
            return batch_waits
        self._passed += 1
        if self._passed < self._every:
            return False
        self._passed = 0
        return True
