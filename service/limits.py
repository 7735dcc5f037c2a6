"""The limits of requests, in one place for all that enforce them."""

from dataclasses import dataclass
from typing import Any

from service.images import ImageRules, MemoryBudget


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of requests, as the settings of the same names describe them."""

    max_pending_images: int
    reserved_fraction: float
    batch_share: float
    max_pending_bytes: int
    large_body_bytes: int
    large_bodies_fraction: float
    max_body_bytes: int
    max_images_per_request: int
    max_pixels: int
    max_decode_bytes: int
    image_formats: tuple[str, ...]
    exact_preprocessing: bool
    body_timeout_seconds: float
    min_upload_rate: int
    upload_window_seconds: float
    default_deadline_ms: float
    max_deadline_ms: float
    deadline_margin: float
    max_consecutive_faults: int
    trim_memory_bytes: int

    def of_room(self) -> dict[str, Any]:
        """The bounds of `service.scheduling.room.Room`."""
        return {
            "max_images": self.max_pending_images,
            "max_bytes": self.max_pending_bytes,
            "reserved_fraction": self.reserved_fraction,
            "large_body_bytes": self.large_body_bytes,
            "large_bodies_fraction": self.large_bodies_fraction,
        }

    def image_rules(self) -> ImageRules:
        """Which images are decoded, and how; with a memory budget of its own."""
        return ImageRules(
            max_pixels=self.max_pixels,
            formats=self.image_formats,
            exact=self.exact_preprocessing,
            memory=MemoryBudget(self.max_decode_bytes),
        )
