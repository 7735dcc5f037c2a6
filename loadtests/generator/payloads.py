"""The images that are sent: the same ones in the same order to every model, with their labels where these are known."""

import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from loadtests.generator.labelled import IMAGE_SUFFIXES, Label, Payload, PayloadError, Source, source_of

__all__ = [
    "DEFAULT_SIZES",
    "IMAGE_SUFFIXES",
    "MAX_IMAGES",
    "Label",
    "Payload",
    "PayloadError",
    "describe",
    "parse_sizes",
    "read_payloads",
]

MAX_IMAGES = 1000
DEFAULT_SIZES = ((640, 480),)
"""(width, height) of generated images."""
_GENERATED = 64
_GENERATED_PIXELS = 150_000_000
"""Of all generated images together, where one of each size is not more: more would only take longer to make."""
_MAX_SIDE = 8192
_MAX_WEIGHTS = 100
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})(?::(\d{1,5}))?")
_LISTED_SIZES = 4


def read_payloads(
    data: Path | None,
    *,
    seed: int = 0,
    most: int | None = MAX_IMAGES,
    shuffle: bool = True,
    sizes: Sequence[tuple[int, int]] = DEFAULT_SIZES,
) -> list[Payload]:
    """At most `most` images, the same for one seed, in the order in which they are to be sent.

    `data` is a folder
    - of image files, labelled by its `labels.csv` if there is one (columns `file`, and `index`, `label`, an index or
      a class's name, or `imagenet1k_index`; empty where not known),
    - of parquet files with a column `img` or `image` of encoded bytes, and `fine_label` or `label` (the test split if
      there is one, all its files), or
    - of one folder a class, by the class's name or index.
    Without it JPEGs of these `sizes` in turn are generated, unlabelled. Without `shuffle` images come in the order of
    their names or rows. Raises PayloadError.
    """
    source: Source = source_of(data) if data else _Generated(tuple(sizes), seed)
    count = len(source.labels)
    order = np.random.default_rng(seed).permutation(count).tolist() if shuffle else list(range(count))
    chosen = order if most is None else order[:most]
    if not chosen:
        raise PayloadError(f"{data} holds no image")
    ascending = sorted(chosen)
    found = dict(zip(ascending, source.read(ascending), strict=True))
    return [found[index] for index in chosen]


def describe(payloads: Sequence[Payload], data: Path | None) -> str:
    """What is sent, in words: how many of what, of which sizes in pixels and kB, and how many of them are labelled.

    `data` as given to `read_payloads`; a median of two middle sizes is the larger one.
    """
    what = source_of(data).words if data else _Generated.words
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
    """(width, height) of each generated image in turn, from `640x480,1920x1080` or, weighted, `640x480:3,224x224:1`.

    A weight is how many images of this size there are to one turn. Raises ValueError.
    """
    parsed: list[tuple[tuple[int, int], int]] = []
    for part in text.split(","):
        match = _SIZE.fullmatch(part.strip())
        width, height, weight = (int(number or 1) for number in match.groups()) if match else (0, 0, 0)
        if not (1 <= width <= _MAX_SIDE and 1 <= height <= _MAX_SIDE and weight >= 1):
            raise ValueError(
                f"{part.strip()!r} is no size: give WIDTHxHEIGHT in pixels, sides of at most {_MAX_SIDE}, and if need "
                "be :WEIGHT (a whole number), separated by commas, such as 640x480:3,1920x1080:1"
            )
        parsed.append(((width, height), weight))
    divisor = math.gcd(*(weight for _, weight in parsed))
    turns = [[size] * (weight // divisor) for size, weight in parsed]
    if sum(map(len, turns)) > _MAX_WEIGHTS:
        raise ValueError(f"{text!r}: the weights may add up to at most {_MAX_WEIGHTS}, such as 640x480:3,1920x1080:1")
    return tuple(size for turn in turns for size in turn)


class _Generated:
    """Blurred noise with grain: JPEGs that cost about what photos cost to decode."""

    words = "generated JPEGs"

    def __init__(self, sizes: tuple[tuple[int, int], ...], seed: int) -> None:
        turns = min(math.ceil(_GENERATED / len(sizes)), _GENERATED_PIXELS // sum(w * h for w, h in sizes))
        self._sizes, self._seed = sizes, seed
        self.labels: Sequence[Label] = [None] * (max(1, turns) * len(sizes))

    def read(self, wanted: Iterable[int]) -> Iterator[Payload]:
        for index in wanted:
            width, height = self._sizes[index % len(self._sizes)]
            generator = np.random.default_rng([self._seed, index])
            coarse = generator.integers(0, 256, size=(-(-height // 40), -(-width // 40), 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
            # One tile of grain, repeated, spares large images gigabytes of float64, and a JPEG does not notice.
            tile = generator.normal(0, 9, size=(min(height, 480), min(width, 640), 3)).astype(np.int16)
            grain = np.tile(tile, (-(-height // tile.shape[0]), -(-width // tile.shape[1]), 1))[:height, :width]
            buffer = io.BytesIO()
            pixels = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
            pixels.save(buffer, format="JPEG", quality=90)
            yield Payload(f"generated-{width}x{height}-{index:05d}.jpg", buffer.getvalue())


def _pixel_sizes(payloads: Sequence[Payload]) -> list[str]:
    sizes: Counter[tuple[int, int]] = Counter()
    unreadable = 0
    for payload in payloads:
        try:
            with warnings.catch_warnings():
                # How large an image may be is for the server to say.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(payload.data)) as image:
                    sizes[image.size] += 1
        except Exception:  # noqa: BLE001 (a hostile file's header raises whatever it likes, and is sent all the same)
            unreadable += 1
    said = []
    if len(sizes) == 1:
        said.append(f"{_by(next(iter(sizes)))} pixels")
    elif len(sizes) <= _LISTED_SIZES:
        said += [f"{100 * count / len(payloads):.0f} % {_by(size)}" for size, count in sizes.most_common()]
    else:
        ordered = sorted(sizes.elements(), key=lambda size: (size[0] * size[1], size))
        middle = ordered[len(ordered) // 2]
        said.append(f"{len(sizes)} sizes from {_by(ordered[0])} to {_by(ordered[-1])} pixels, median {_by(middle)}")
    return [*said, f"{unreadable} with no readable header"] if unreadable else said


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"
