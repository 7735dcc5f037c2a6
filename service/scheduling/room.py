"""The room for requests: bounds on images and bytes that keep memory flat, with a part for each kind of client.

A kind of client that fills its part cannot take what is kept for the others: neither batch nor interactive work can
take the other's part, and large uploads cannot take that of small ones.
"""

from collections.abc import Callable

from service.errors import Overloaded


class Room:
    """What all requests being answered hold."""

    def __init__(
        self,
        *,
        max_images: int,
        max_bytes: int,
        reserved_fraction: float = 0.0,
        large_body_bytes: int = 1 << 20,
        large_bodies_fraction: float = 1.0,
    ) -> None:
        """As the settings of the service describe them."""
        self._max_images, self._max_bytes = max_images, max_bytes
        self._max_of_class = max_images - int(max_images * reserved_fraction)
        self._large_body, self._max_large_bytes = large_body_bytes, int(max_bytes * large_bodies_fraction)
        self._images_of_class = [0, 0]
        self._large_bytes = 0
        self.images = 0
        """Images accepted and not yet answered."""
        self.bytes = 0
        """Bytes of bodies accepted and not yet answered."""

    @property
    def crowded(self) -> bool:
        """Whether a priority class may be without room."""
        return self.images >= self._max_of_class

    def full(self, *, batch: bool) -> bool:
        """Whether there is no room for one more image of the priority class."""
        return self.images >= self._max_images or self._images_of_class[batch] >= self._max_of_class

    def require(self, images: int, *, batch: bool, drain_seconds: Callable[[], float]) -> None:
        """Raise Overloaded unless there is room for `images` more of the priority class."""
        of_class = self._images_of_class[batch]
        if self.images + images > self._max_images:
            held = f"{self.images} images are pending and {self._max_images} are allowed"
        elif of_class + images > self._max_of_class:
            name = "batch" if batch else "interactive"
            held = f"{of_class} images of priority {name} are pending and {self._max_of_class} are allowed"
        else:
            return
        raise Overloaded(
            f"{held}: nothing was done for this request, send it again later",
            reason="images",
            retry_after_s=drain_seconds(),
        )

    def hold_images(self, count: int, *, batch: bool) -> None:
        """Account for accepted images."""
        self.images += count
        self._images_of_class[batch] += count

    def free_images(self, count: int, *, batch: bool) -> None:
        """Account for answered images."""
        self.hold_images(-count, batch=batch)

    def require_bytes(self, count: int, *, before: int, drain_seconds: Callable[[], float]) -> None:
        """Raise Overloaded unless a body of `before` bytes so far can be held with `count` more."""
        after = before + count
        if self.bytes + count > self._max_bytes:
            held = f"{self.bytes:,} bytes are pending and {self._max_bytes:,} are allowed"
        elif after > self._large_body and self._large_bytes + self._large(after) - self._large(before) > (
            self._max_large_bytes
        ):
            held = (
                f"{self._large_bytes:,} bytes of bodies of more than {self._large_body:,} are pending and "
                f"{self._max_large_bytes:,} are allowed"
            )
        else:
            return
        raise Overloaded(
            f"{held}: nothing was done for this request, send it again later",
            reason="bytes",
            retry_after_s=drain_seconds(),
        )

    def hold_bytes(self, count: int, *, before: int, drain_seconds: Callable[[], float]) -> None:
        """Account for `count` more bytes of a body. Raises Overloaded if there is no room for them."""
        self.require_bytes(count, before=before, drain_seconds=drain_seconds)
        self.bytes += count
        self._large_bytes += self._large(before + count) - self._large(before)

    def free_bytes(self, count: int) -> None:
        """Account for a body that is no longer held."""
        self.bytes -= count
        self._large_bytes -= self._large(count)

    def _large(self, count: int) -> int:
        """How many bytes a body of `count` bytes takes of the room for large ones."""
        return count if count > self._large_body else 0
