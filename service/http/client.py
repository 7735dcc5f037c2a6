"""The client of a request, who may leave before the answer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Client:
    """The client that sent a request. Watching it costs less than a task that awaits `http.disconnect`."""

    __slots__ = ("_on_leaving", "left")

    def __init__(self) -> None:
        self.left = False
        self._on_leaving: Callable[[], None] | None = None

    def leave(self) -> None:
        """Note that the client has left: nobody will read the answer."""
        if self.left:
            return
        self.left = True
        if self._on_leaving:
            self._on_leaving()

    @contextmanager
    def watched(self, on_leaving: Callable[[], None]) -> Iterator[None]:
        """Until the block ends, call `on_leaving` when the client leaves; at once if it has left already."""
        self._on_leaving = on_leaving
        if self.left:
            on_leaving()
        try:
            yield
        finally:
            self._on_leaving = None
