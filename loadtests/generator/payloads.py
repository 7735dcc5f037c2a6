"""The images that are sent: the same ones in the same order to every model, with their labels if known."""

import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from loadtests.generator.readers import Payload, PayloadError, Source, open_source

MAX_IMAGES = 1000
DEFAULT_SIZES = ((640, 480),)
"""(width, height) of generated images."""
_GENERATED = 64
_GENERATED_PIXELS = 150_000_000
"""Limit of all generated images together, unless one of each size exceeds it: more would only take longer to make."""
_MAX_SIDE = 8192
_MAX_WEIGHTS = 100
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})(?::(\d{1,5}))?")
_LISTED_SIZES = 4


def read_payloads(
    data: Path | None,
    *,
    seed: int = 0,
    limit: int | None = MAX_IMAGES,
    shuffle: bool = True,
    sizes: Sequence[tuple[int, int]] = DEFAULT_SIZES,
) -> list[Payload]:
    """At most `limit` images in the order in which they are sent, the same for one seed.

    `data` is a folder of a kind that `readers.open_source` knows.
    Without it, unlabelled JPEGs are generated whose sizes cycle through `sizes`. Without `shuffle`, images come in the
    order of their names or rows. Raises PayloadError.
    """
    source = open_source(data) if data else generated(sizes, seed)
    count = len(source.labels)
    order = np.random.default_rng(seed).permutation(count).tolist() if shuffle else list(range(count))
    chosen = order[:limit]
    if not chosen:
        raise PayloadError(f"{data} holds no image")
    ascending = sorted(chosen)
    found = dict(zip(ascending, source.read(ascending), strict=True))
    return [found[index] for index in chosen]


def describe(payloads: Sequence[Payload], data: Path | None) -> str:
    """How many images of what kind, their sizes in pixels and kB, and how many are labelled.

    `data` as given to `read_payloads`; of two middle sizes, the median is the larger one.
    """
    what = open_source(data).description if data else "generated JPEGs"
    kilobytes = sorted(len(payload.data) / 1000 for payload in payloads)
    labelled = sum(payload.label is not None for payload in payloads)
    return ", ".join(
        [
            f"{len(payloads)} {what}",
            *_pixel_sizes(payloads),
            f"{kilobytes[0]:.1f} to {kilobytes[-1]:.1f} kB",
            f"median {kilobytes[len(kilobytes) // 2]:.1f} kB",
            {0: "unlabelled", len(payloads): "all labelled"}.get(labelled, f"{labelled} of them labelled"),
        ]
    )


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """(width, height) of the images of one cycle, from `640x480,1920x1080` or, weighted, `640x480:3,224x224:1`.

    A weight is the number of images of that size in a cycle. Raises ValueError.
    """
    parsed: list[tuple[tuple[int, int], int]] = []
    for part in text.split(","):
        match = _SIZE.fullmatch(part.strip())
        width, height, weight = (int(number or 1) for number in match.groups()) if match else (0, 0, 0)
        if not (1 <= width <= _MAX_SIDE and 1 <= height <= _MAX_SIDE and weight >= 1):
            raise ValueError(
                f"{part.strip()!r} is not a size: give WIDTHxHEIGHT in pixels, sides of at most {_MAX_SIDE}, "
                "optionally with :WEIGHT (a whole number), separated by commas, such as 640x480:3,1920x1080:1"
            )
        parsed.append(((width, height), weight))
    divisor = math.gcd(*(weight for _, weight in parsed))
    cycle = [size for size, weight in parsed for _ in range(weight // divisor)]
    if len(cycle) > _MAX_WEIGHTS:
        raise ValueError(f"{text!r}: the weights may add up to at most {_MAX_WEIGHTS}, such as 640x480:3,1920x1080:1")
    return tuple(cycle)


def generated(sizes: Sequence[tuple[int, int]], seed: int) -> Source:
    """Blurred noise with grain: JPEGs that cost about as much as photos to decode."""

    def generate(positions: Sequence[int]) -> Iterator[Payload]:
        for index in positions:
            width, height = sizes[index % len(sizes)]
            generator = np.random.default_rng([seed, index])
            coarse = generator.integers(0, 256, size=(-(-height // 40), -(-width // 40), 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
            # One repeated tile of grain saves gigabytes of float64 for large images, and a JPEG shows no difference.
            tile = generator.normal(0, 9, size=(min(height, 480), min(width, 640), 3)).astype(np.int16)
            grain = np.tile(tile, (-(-height // tile.shape[0]), -(-width // tile.shape[1]), 1))[:height, :width]
            buffer = io.BytesIO()
            pixels = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
            pixels.save(buffer, format="JPEG", quality=90)
            yield Payload(f"generated-{width}x{height}-{index:05d}.jpg", buffer.getvalue())

    cycles = min(
        math.ceil(_GENERATED / len(sizes)), _GENERATED_PIXELS // sum(width * height for width, height in sizes)
    )
    labels = [None] * (max(1, cycles) * len(sizes))
    return Source(description="generated JPEGs", labels=labels, read=generate)


def _pixel_sizes(payloads: Sequence[Payload]) -> list[str]:
    sizes: Counter[tuple[int, int]] = Counter()
    for payload in payloads:
        # A hostile header may raise anything, and how large an image may be is the server's decision: so it is sent.
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(payload.data)) as image:
                sizes[image.size] += 1
    names = {size: f"{size[0]}×{size[1]}" for size in sizes}
    unreadable = len(payloads) - sizes.total()
    found = [f"{unreadable} with no readable header"] if unreadable else []
    if len(sizes) == 1:
        return [f"{next(iter(names.values()))} pixels", *found]
    if len(sizes) <= _LISTED_SIZES:
        return [*(f"{100 * count / len(payloads):.0f} % {names[size]}" for size, count in sizes.most_common()), *found]
    ordered = sorted(sizes.elements(), key=lambda size: (size[0] * size[1], size))
    smallest, middle, largest = (names[size] for size in (ordered[0], ordered[len(ordered) // 2], ordered[-1]))
    return [f"{len(sizes)} sizes from {smallest} to {largest} pixels, median {middle}", *found]
