"""Preprocessing: from an encoded image to the model's pixels. All limits are checked before anything is decoded.

`decode` does it in one call. `open_image` and `OpenedImage.render` are its two steps, for callers that must know the
amount of work first. Everything that needs the served pixels calls these, including the load tests.

- `scan` finds format, size and cost in a file's structure, with a module for each format, and refuses what costs too
  much.
- `render` has Pillow decode what is left of the file, and makes the model's pixels.
"""

from service.images.header import MAX_PIXELS, MAX_SIDE, ImageHeader
from service.images.memory import MemoryBudget
from service.images.render import LARGE_PIXELS, SMALL_BYTES, ImageRules, OpenedImage, decode, draft_scale, open_image
from service.images.sniff import FORMATS, Format

__all__ = [
    "FORMATS",
    "LARGE_PIXELS",
    "MAX_PIXELS",
    "MAX_SIDE",
    "SMALL_BYTES",
    "Format",
    "ImageHeader",
    "ImageRules",
    "MemoryBudget",
    "OpenedImage",
    "decode",
    "draft_scale",
    "open_image",
]
