"""The work of decoding is known from a header alone, for whatever bytes, and it is what decoding costs."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from service.image_work import FIXED_WORK, least_works, seconds_per_pixel, work_of, work_of_bytes, work_of_opened
from service.images import LARGE_PIXELS, ImageRules, open_image
from service.manifest import Preprocessing
from tests.service.conftest import encoded, noise

PREPROCESSING = Preprocessing(resize=32, crop=32, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
LIMIT = 50_000_000


def work(data: bytes) -> int:
    return work_of(data, PREPROCESSING, ImageRules(max_pixels=LIMIT))


@pytest.mark.parametrize(
    ("kind", "options", "pixels"),
    [
        ("JPEG", {}, 60 * 40),
        ("JPEG", {"progressive": True}, 2 * 60 * 40),
        ("JPEG", {"exif": b"Exif\0\0" + bytes(5000), "comment": b"\xff\xc0" * 20}, 60 * 40),
        ("PNG", {}, 2 * 60 * 40),
        ("GIF", {}, 2 * 60 * 40),
        ("BMP", {}, 2 * 60 * 40),
        ("WEBP", {}, 2 * 60 * 40),
        ("WEBP", {"lossless": True}, 2 * 60 * 40),
        ("WEBP", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}, 2 * 60 * 40),
        ("TIFF", {}, 0),
    ],
)
def test_it_is_the_decoded_pixels_the_bytes_and_a_constant(kind: str, options: dict[str, object], pixels: int) -> None:
    data = encoded(noise(60, 40), kind, **options)
    assert work(data) == pixels + len(data) + FIXED_WORK


@pytest.mark.parametrize(("side", "reduction"), [(191, 1), (192, 2), (384, 4), (767, 4), (768, 8), (2000, 8)])
def test_a_jpeg_that_is_decoded_at_a_fraction_of_its_size_is_less_work(side: int, reduction: int) -> None:
    data = encoded(noise(side, side), "JPEG")
    assert work(data) == side * side // reduction**2 + work_of_bytes(len(data))


def test_an_image_that_will_be_refused_for_its_size_is_no_work() -> None:
    png = bytearray(encoded(noise(8, 8)))
    png[16:24] = (2**31 - 1).to_bytes(4, "big") * 2
    assert work(bytes(png)) == work_of_bytes(len(png))


def test_a_jpeg_of_segments_without_end_is_not_walked_to_its_end() -> None:
    segments = b"\xff\xd8" + b"\xff\xe1\x00\x02" * 1_000_000 + encoded(noise(8, 8), "JPEG")[2:]
    assert work(segments) == work_of_bytes(len(segments))


class Counted(bytes):
    """Bytes that count how often one of them is read."""

    reads = 0

    def __getitem__(self, key: Any) -> Any:
        self.reads += 1
        return super().__getitem__(key)


def test_the_fill_bytes_of_a_jpeg_are_not_walked_to_their_end() -> None:
    few = encoded(noise(8, 8), "JPEG")
    assert work(few[:2] + b"\xff" * 100 + few[2:]) == 8 * 8 + work_of_bytes(len(few) + 100)
    many = Counted(few[:2] + b"\xff" * 100_000 + few[2:])
    assert work(many) == work_of_bytes(len(many))
    assert many.reads < 5_000


@given(
    kind=st.sampled_from(("JPEG", "PNG", "GIF", "BMP", "WEBP")),
    cut=st.integers(0, 400),
    changes=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), max_size=8),
)
def test_no_bytes_are_an_error_nor_more_work_than_the_limit_allows(
    kind: str, cut: int, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(encoded(noise(60, 40), kind))
    for at, value in changes:
        data[at % len(data)] = value
    found = work(bytes(data[:cut] if cut < len(data) else data))
    assert work_of_bytes(0) <= found <= 2 * LIMIT + work_of_bytes(len(data))


def test_a_header_says_what_the_decoder_finds_for_real_photos() -> None:
    if not (folder := os.environ.get("STRIDEVIT_DATA")):
        pytest.skip("needs STRIDEVIT_DATA")
    photos = [path.read_bytes() for path in sorted((Path(folder) / "photos").glob("*.jpg"))]
    assert photos
    for data in photos:
        opened = open_image(data, PREPROCESSING, max_pixels=LIMIT)
        if not Image.open(io.BytesIO(data)).info.get("progressive"):
            assert work(data) == work_of_opened(opened, len(data))


def test_the_scans_that_a_header_hides_count_once_the_image_is_open() -> None:
    data = encoded(noise(640, 480), "JPEG", progressive=True)
    scans = data.count(b"\xff\xda")
    # Scans that do nothing but cost a pass each.
    many = data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 50 + data[-2:]
    one, other = (work_of_opened(open_image(file, PREPROCESSING, max_pixels=LIMIT), len(file)) for file in (data, many))
    assert other - one >= 640 * 480 * 50 // 10
    assert scans > 1


def test_this_machine_s_speed_is_measured() -> None:
    measured = seconds_per_pixel()
    assert np.isfinite(measured)
    assert measured > 0


@pytest.mark.parametrize("count", [0, 1000, LARGE_PIXELS, 32 << 20])
def test_the_least_work_of_a_body_is_that_of_small_images(count: int) -> None:
    works = least_works(count)
    assert sum(works) == work_of_bytes(count)
    assert max(works) <= LARGE_PIXELS
