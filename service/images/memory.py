"""A memory budget for all images that are decoded at once."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class MemoryBudget:
    """Threads wait here until there is room for what they will take, first come, first served."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._free = limit_bytes
        self._waiting: deque[object] = deque()
        self._change = threading.Condition()

    @property
    def taken_bytes(self) -> int:
        """What is held now."""
        return self.limit_bytes - self._free

    def __len__(self) -> int:
        """Threads that wait."""
        return len(self._waiting)

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Wait for `amount` bytes, at most the limit, and give them back at the end."""
        if not 0 <= amount <= self.limit_bytes:
            raise ValueError(f"{amount} bytes are never free of {self.limit_bytes}")
        turn = object()
        with self._change:
            self._waiting.append(turn)
            # A small one behind a large one waits too: otherwise the large one might wait forever.
            self._change.wait_for(lambda: self._waiting[0] is turn and self._free >= amount)
            self._waiting.popleft()
            self._free -= amount
            self._change.notify_all()
        try:
            yield
        finally:
            with self._change:
                self._free += amount
                self._change.notify_all()
