"""Whose turn it is: interactive work goes first, and batch work keeps a guaranteed part of the turns."""

BATCH_SHARE = 0.1
"""Unless a setting says otherwise."""


class Turns:
    """The turns of one worker, or of several that share a queue. Not thread-safe: its queue's lock guards it."""

    def __init__(self, batch_share: float) -> None:
        """`batch_share`: fraction of the turns that batch work gets while both wait, above 0 and at most 1/2."""
        self._every = round(1 / batch_share)
        self._passed = 0

    def batch_first(self, *, interactive_waits: bool, batch_waits: bool) -> bool:
        """Take the next turn; returns whether it belongs to batch work."""
        due = self.due(interactive_waits=interactive_waits, batch_waits=batch_waits)
        self.take(batch_first=due, both_wait=interactive_waits and batch_waits)
        return due

    def due(self, *, interactive_waits: bool, batch_waits: bool) -> bool:
        """Whether the next turn belongs to batch work, without taking it."""
        return batch_waits and (not interactive_waits or self._passed + 1 >= self._every)

    def take(self, *, batch_first: bool, both_wait: bool) -> None:
        """Take a turn, as `due` said."""
        self._passed = self._passed + 1 if both_wait and not batch_first else 0
