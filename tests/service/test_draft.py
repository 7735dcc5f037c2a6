"""Drafting: a JPEG that is much larger than the model's input is decoded at a fraction of its size, within bounds."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw, ImageOps

from service.errors import BadImage, NotReady
from service.images import ImageRules, MemoryBudget, OpenedImage, decode
from service.manifest import Preprocessing
from tests.service.conftest import encoded, noise

MUCH_LARGER = 6
"""Times `resize`: a JPEG whose shorter side is so long, or longer, is drafted."""


def preprocessing(crop: int = 32, resize: int | None = None) -> Preprocessing:
    return Preprocessing(
        resize=resize or crop, crop=crop, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )


def drafted(data: bytes, crop: int = 32) -> npt.NDArray[np.uint8]:
    return decode(data, preprocessing(crop), max_pixels=20_000_000)


def whole(data: bytes, crop: int = 32) -> npt.NDArray[np.uint8]:
    """What is expected of a JPEG: all its pixels decoded and turned upright, and only then made small."""
    with Image.open(io.BytesIO(data)) as image:
        return drafted(encoded(ImageOps.exif_transpose(image).convert("RGB"), "BMP"), crop)


def difference(ours: npt.NDArray[np.uint8], expected: npt.NDArray[np.uint8]) -> tuple[float, int]:
    """Mean and largest, in levels of 255."""
    levels = np.abs(ours.astype(int) - expected)
    return float(levels.mean()), int(levels.max())


def grain(width: int, height: int) -> Image.Image:
    """Every pixel a random colour."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(height, width, 3), dtype=np.uint8))


def writing(width: int, height: int) -> Image.Image:
    """Text in pure colours on white: sharp edges everywhere."""
    image, generator = Image.new("RGB", (width, height), "white"), np.random.default_rng(0)
    draw = ImageDraw.Draw(image)
    for y in range(0, height, 26):
        red, green, blue = (int(channel) for channel in generator.integers(0, 2, size=3) * 255)
        text = "".join(chr(code) for code in generator.integers(33, 127, size=width // 8))
        draw.text((3, y), text, fill=(red, green, blue), font_size=24)
    return image


ENCODINGS: dict[str, Callable[[Image.Image], bytes]] = {
    "4:2:0": lambda image: encoded(image, "JPEG"),
    "4:4:4": lambda image: encoded(image, "JPEG", quality=92, subsampling=0),
    "progressive": lambda image: encoded(image, "JPEG", quality=85, progressive=True),
    "grey": lambda image: encoded(image.convert("L"), "JPEG", quality=90),
    "cmyk": lambda image: encoded(image.convert("CMYK"), "JPEG", quality=90),
    "several pictures": lambda image: encoded(image, "MPO", save_all=True, append_images=[noise(*image.size)]),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("draw", "mean_bound", "largest_bound"),
    [
        pytest.param(noise, 0.5, 3, id="smooth"),
        pytest.param(grain, 3, 14, id="grain"),
        pytest.param(writing, 4, 40, id="writing"),
    ],
)
@pytest.mark.parametrize(("crop", "fraction"), [(32, 2), (32, 4), (32, 8), (224, 2)])
def test_a_drafted_jpeg_stays_within_a_bound_of_the_whole_one(
    crop: int,
    fraction: int,
    draw: Callable[[int, int], Image.Image],
    mean_bound: float,
    largest_bound: int,
    encoding: str,
) -> None:
    # The smallest size that gives this fraction: the worst. Odd, so that the last row and column are fractions too.
    side = fraction * MUCH_LARGER // 2 * crop + 1
    data = ENCODINGS[encoding](draw(side + side // 5, side))
    mean, largest = difference(drafted(data, crop), whole(data, crop))
    assert mean <= mean_bound
    assert largest <= largest_bound


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG"])
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((191, 300), (191, 300)),
        ((192, 300), (96, 150)),
        ((383, 385), (192, 193)),
        ((384, 385), (96, 97)),
        ((4000, 3000), (500, 375)),
    ],
)
def test_only_a_jpeg_that_is_much_larger_is_decoded_at_a_fraction(
    size: tuple[int, int], expected: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = noise(*size)
    data = encoded(image, kind, **({"save_all": True, "append_images": [image]} if kind == "MPO" else {}))
    decoded = []
    resize = Image.Image.resize

    def watched(image: Image.Image, *arguments: Any) -> Image.Image:
        decoded.append(image.size)
        return resize(image, *arguments)

    monkeypatch.setattr(Image.Image, "resize", watched)
    drafted(data)
    assert decoded[0] == (size if kind == "PNG" else expected)


@pytest.mark.parametrize("crop", [32, 200])
def test_a_jpeg_that_is_not_much_larger_keeps_every_pixel(crop: int) -> None:
    data = encoded(grain(MUCH_LARGER * crop - 1, MUCH_LARGER * crop + 50), "JPEG")
    assert np.array_equal(drafted(data, crop), whole(data, crop))


@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9])
def test_a_drafted_jpeg_is_turned_upright_and_not_shifted(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    # 97 by 103 pixels are decoded, of which the last ones hold the picture to an eighth only: 0.3 pixels of the result.
    data = encoded(noise(769, 817), "JPEG", quality=95, exif=exif.tobytes())
    assert difference(drafted(data), whole(data))[1] <= 3


@pytest.mark.parametrize("size", [(8001, 301), (301, 8001)])
def test_a_drafted_strip_shows_its_middle(size: tuple[int, int]) -> None:
    data = encoded(noise(*size), "JPEG", quality=95)
    assert difference(drafted(data), whole(data))[1] <= 3


def test_a_drafted_jpeg_that_is_cut_off_is_bad() -> None:
    data = encoded(grain(1000, 1000), "JPEG")
    with pytest.raises(BadImage, match="damaged"):
        drafted(data[: len(data) * 2 // 3])


@pytest.mark.parametrize("progressive", [False, True])
def test_a_drafted_jpeg_asks_for_the_memory_of_what_is_decoded(*, progressive: bool) -> None:
    data = encoded(noise(4000, 3000), "JPEG", quality=50, progressive=progressive)
    rules = ImageRules(max_pixels=20_000_000)
    drafted, whole = rules.open(data, preprocessing(32)), rules.open(data, preprocessing(2000))
    assert (drafted.draft_scale, whole.draft_scale) == (8, 1)
    assert whole.decoded_bytes == whole.header.decoded_bytes
    assert whole.decoded_bytes - drafted.decoded_bytes == 8 * (4000 * 3000 - 500 * 375)
    if not progressive:
        budget = MemoryBudget(100_000_000)
        with budget.hold(100_000_000):
            # It does not wait behind large ones.
            ImageRules(max_pixels=20_000_000, memory=budget).open(data, preprocessing(32)).render()


def test_an_image_for_which_memory_is_short_is_not_called_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(OpenedImage, "_render", short)
    with pytest.raises(NotReady, match="too little memory for this image at present: retry"):
        drafted(encoded(noise(40, 40)))
