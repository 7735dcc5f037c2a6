"""Images in the forms that the clients take, turned into the bytes that are sent."""

import errno
import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeAlias, TypeGuard

if TYPE_CHECKING:
    import PIL.Image

Image: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | PIL.Image.Image"
"""A path, an encoded image's bytes, an open file, or a Pillow image, which is sent as PNG."""
Images: TypeAlias = "Image | Iterable[Image]"

MOST_BYTES: Final = 256 * 1024**2
"""Largest file that is read: eight times what a service takes as it is delivered."""

_IN_PNG = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")


def encoded(image: Image) -> bytes:
    """An image as a file's bytes. Raises OSError, also for a file beyond MOST_BYTES; TypeError if it is no `Image`."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        path = Path(image)
        if path.stat().st_size > MOST_BYTES:
            raise OSError(errno.EFBIG, f"larger than {MOST_BYTES // 1024**2} MiB, too large to be sent", str(path))
        return path.read_bytes()
    if _is_of_pillow(image):
        buffer = io.BytesIO()
        lossless: Any = image if image.mode in _IN_PNG else image.convert("RGB")
        lossless.save(buffer, "PNG", exif=image.getexif())  # its orientation counts
        return buffer.getvalue()
    read: Any = getattr(image, "read", None)
    if read is None:
        raise TypeError(f"not an image: {type(image).__name__}")
    data = read()
    if not isinstance(data, bytes):
        raise TypeError("the file is open as text: open it with 'rb'")
    return data


def all_encoded(images: Images) -> list[bytes]:
    """One or many images as files' bytes. Raises OSError, TypeError, or ValueError if there are none."""
    single = isinstance(images, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(images, "read")
    each: Any = [images] if single or _is_of_pillow(images) else images
    found = [encoded(image) for image in each]
    if not found:
        raise ValueError("no images are given")
    return found


def _is_of_pillow(image: object) -> "TypeGuard[PIL.Image.Image]":
    pillow = sys.modules.get("PIL.Image")  # whoever has such an image has imported it
    return pillow is not None and isinstance(image, pillow.Image)
