"""Preprocessing: every kind of image becomes the pixels that a person would expect."""

import base64
import contextlib
import gc
import io
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from service.app import create_app
from service.bundle import read_bundle
from service.errors import BadImage, ImageError, TooManyPixels, UnsupportedImage
from service.images import LARGE_PIXELS, MAX_PIXELS, ImageRules, decode, open_image
from service.settings import Settings
from tests.processes import ROOT
from tests.service.conftest import encoded, noise
from tests.service.identity import publish_identity
from tests.service.test_draft import MUCH_LARGER, difference, grain, preprocessing


def pixels(data: bytes, crop: int = 32) -> npt.NDArray[np.uint8]:
    return decode(data, preprocessing(crop), max_pixels=1_000_000)


def test_an_image_of_the_right_size_is_unchanged() -> None:
    image = noise(32, 32)
    assert np.array_equal(pixels(encoded(image)), np.asarray(image))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_every_accepted_format_is_read(kind: str) -> None:
    image = noise(32, 32)
    difference = pixels(encoded(image, kind)).astype(int) - np.asarray(image)
    assert np.abs(difference).mean() < 12


@pytest.mark.parametrize("kind", ["ICO", "PPM", "JPEG2000", "TGA"])
def test_other_formats_are_refused_with_a_list_of_those_accepted(kind: str) -> None:
    with pytest.raises(UnsupportedImage, match="JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF"):
        pixels(encoded(noise(32, 32), kind))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_before_resizing(orientation: int) -> None:
    upright = noise(64, 32)
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(encoded(stored, exif=exif.tobytes())), pixels(encoded(upright)))


def test_transparent_pixels_become_white() -> None:
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    assert pixels(encoded(clear)).min() == 255
    half = Image.new("RGBA", (32, 32), (0, 0, 0, 128))
    assert np.unique(pixels(encoded(half))).tolist() == [127]
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([255, 0, 0] * 256)
    assert pixels(encoded(palette, transparency=0)).min() == 255


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    ours = pixels(encoded(Image.fromarray(ramp)))
    assert np.array_equal(ours[..., 0], (ramp >> 8).astype(np.uint8))


@pytest.mark.parametrize(("values", "expected"), [((0.0, 1.0), (0, 255)), ((0.0, 200.0), (0, 200))])
def test_float_grey_is_scaled_by_its_range(values: tuple[float, float], expected: tuple[int, int]) -> None:
    grey = np.full((32, 32), values[0], dtype=np.float32)
    grey[:, 16:] = values[1]
    ours = pixels(encoded(Image.fromarray(grey), "TIFF"))
    assert (ours[0, 0, 0], ours[0, -1, 0]) == expected


def test_cmyk_becomes_rgb() -> None:
    image = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    red = pixels(encoded(image, "TIFF"))[16, 16]
    assert red.tolist() == [255, 0, 0]


def test_an_animation_shows_its_first_frame() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(data)[0, 0].tolist() == [255, 0, 0]


def test_too_many_pixels_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("1", (2000, 1000)))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(TooManyPixels, match="2000 × 1000"):
        pixels(data)


def test_a_jpeg_of_thousands_of_scans_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoded(noise(2000, 2000), "JPEG", progressive=True)
    last_scan = whole[whole.rfind(b"\xff\xda") : -2]
    size = preprocessing()
    decode(whole, size, max_pixels=4_000_000)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BadImage, match="scans"):
        decode(whole[:-2] + last_scan * 1000 + whole[-2:], size, max_pixels=4_000_000)


def test_a_photo_with_a_video_behind_it_is_read() -> None:
    video = np.random.default_rng(0).bytes(8_000_000)
    assert video.count(b"\xff\xda") > 100
    assert pixels(encoded(noise(1000, 1000), "JPEG") + video).shape == (32, 32, 3)


def test_transparent_colours_do_not_bleed_into_visible_ones() -> None:
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (32, 0, 64, 64))
    edge = pixels(encoded(image))[16]
    assert edge[:, 1].tolist() == edge[:, 0].tolist(), "between white and blue, red and green fall alike"


def test_a_large_image_is_not_held_in_memory_several_times() -> None:
    code = """
import io, resource, sys
from PIL import Image
from service.manifest import Preprocessing
from service.images import decode
mode = sys.argv[1]
buffer = io.BytesIO()
Image.new(mode, (4000, 4000)).save(buffer, "TIFF", compression="tiff_lzw")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = Preprocessing(resize=224, crop=224, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
decode(buffer.getvalue(), size, max_pixels=16_000_000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 16e6)
"""
    for mode in ("RGB", "RGBA", "F"):
        ended = subprocess.run([sys.executable, "-c", code, mode], cwd=ROOT, check=True, capture_output=True, text=True)
        # The image that was encoded counts too, in `before`: Pillow frees and takes 4 bytes per pixel.
        assert float(ended.stdout) < 10, f"{mode}: {ended.stdout} bytes per pixel"


def test_empty_and_truncated_images_are_bad() -> None:
    with pytest.raises(BadImage, match="empty"):
        pixels(b"")
    whole = encoded(noise(200, 200), "JPEG")
    with pytest.raises(BadImage, match="damaged"):
        pixels(whole[: len(whole) // 2])


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]),
    damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    keep=st.floats(0.05, 1),
    crop=st.sampled_from([32, 2]),
)
def test_damaged_bytes_give_pixels_or_an_image_error(
    kind: str, damage: list[tuple[float, int]], keep: float, crop: int
) -> None:
    data = bytearray(encoded(noise(24, 24), kind))
    for place, value in damage:
        data[int(place * len(data))] = value
    try:
        # With 2 pixels a JPEG is drafted.
        assert pixels(bytes(data[: int(len(data) * keep)]), crop).shape == (crop, crop, 3)
    except ImageError:
        return


@pytest.mark.parametrize(("crop", "resize"), [(224, 256), (32, 32), (384, 384)])
def test_real_photos_become_the_pixels_that_torchvision_makes(data_dir: Path, crop: int, resize: int) -> None:
    files = sorted((data_dir / "photos").glob("*.jpg"))
    reference = v2.Compose([v2.Resize(resize, v2.InterpolationMode.BICUBIC), v2.CenterCrop(crop)])
    compared = 0
    for file in files:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            if image.getexif().get(0x0112, 1) != 1 or image.mode != "RGB":
                continue
            much_larger = min(image.size) >= MUCH_LARGER * resize
            expected = np.asarray(reference(image))
        exact = ImageRules(max_pixels=50_000_000, exact=True).open(data, preprocessing(crop, resize)).render()
        assert np.array_equal(exact, expected), file.name
        mean, largest = difference(decode(data, preprocessing(crop, resize), max_pixels=50_000_000), expected)
        assert mean <= (1 if much_larger else 0.005), file.name
        assert largest <= (16 if much_larger else 2), file.name
        compared += 1
    assert compared > len(files) / 2


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 200), height=st.integers(1, 200), crop=st.integers(1, 40), margin=st.integers(0, 10))
def test_any_size_becomes_what_torchvision_makes(width: int, height: int, crop: int, margin: int) -> None:
    image, resize = noise(width, height), crop + margin
    expected = v2.CenterCrop(crop)(v2.Resize(resize, v2.InterpolationMode.BICUBIC)(image))
    size = preprocessing(crop, resize)
    strip = max(width, height) > 7 * min(width, height)
    for exact in (True, False):
        ours = ImageRules(max_pixels=1_000_000, exact=exact).open(encoded(image), size).render()
        _, largest = difference(ours, np.asarray(expected))
        # Only the region that the crop keeps is resized, of strips in any case: its coefficients are rounded otherwise.
        assert largest <= (0 if exact and not strip else 2)


def test_a_strip_of_one_pixel_by_the_longest_side_is_not_resized_as_a_whole() -> None:
    strip = Image.new("RGB", (65_535, 1), (10, 20, 30))
    ours = decode(encoded(strip), preprocessing(224, resize=256), max_pixels=1_000_000)
    assert np.unique(ours.reshape(-1, 3), axis=0).tolist() == [[10, 20, 30]]


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_an_image_is_opened_without_being_decoded_and_then_rendered_as_by_decode(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(noise(300, 200), kind)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
        opened = open_image(data, preprocessing(), max_pixels=60_000)
    assert np.array_equal(opened.render(), pixels(data))


def test_limits_are_checked_when_an_image_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    large = encoded(noise(1000, 1000), "JPEG", progressive=True)
    last_scan = large[large.rfind(b"\xff\xda") : -2]
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(TooManyPixels, match="1000 × 1000"):
        open_image(large, preprocessing(), max_pixels=999_999)  # though 125 × 125 would be decoded
    with pytest.raises(BadImage, match="scans"):
        open_image(large[:-2] + last_scan * 4000 + large[-2:], preprocessing(), max_pixels=1_000_000)
    with pytest.raises(UnsupportedImage):
        open_image(b"GIF or JPEG", preprocessing(), max_pixels=1_000_000)
    with pytest.raises(BadImage, match="empty"):
        open_image(b"", preprocessing(), max_pixels=1_000_000)


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "GIF", "BMP"])
def test_damage_behind_the_header_is_found_when_an_image_is_rendered(kind: str) -> None:
    data = encoded(grain(200, 200), kind)
    for crop in (32, 200):  # a JPEG at a fraction of its size, and whole
        opened = open_image(data[: len(data) // 2], preprocessing(crop), max_pixels=40_000)
        with pytest.raises(BadImage, match="damaged"):
            opened.render()


def test_the_work_of_an_image_is_known_before_it_is_done() -> None:
    def work(data: bytes) -> int:
        return open_image(data, preprocessing(), max_pixels=20_000_000).pixels

    photo = noise(400, 300)
    assert work(encoded(photo, "JPEG")) == 400 * 300
    assert work(encoded(photo, "PNG")) == 2 * 400 * 300
    assert work(encoded(photo, "JPEG", progressive=True)) == pytest.approx(2 * 400 * 300, rel=0.1), "ten scans"
    thumbnail = encoded(photo.resize((40, 30)), "JPEG")
    assert work(encoded(photo, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + thumbnail)) == 400 * 300
    assert work(encoded(noise(640, 480), "PNG")) < LARGE_PIXELS < work(encoded(noise(4000, 3000), "JPEG"))


def test_images_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[object]] = []
    really_open = Image.open

    def watched(file: io.BytesIO, **options: Any) -> Image.Image:
        image = really_open(file, **options)
        alive.extend((weakref.ref(file), weakref.ref(image)))
        return image

    monkeypatch.setattr(Image, "open", watched)
    whole = encoded(grain(200, 200), "JPEG")
    gc.disable()
    try:
        for data, limit in ((whole, 40_000), (whole[:3000], 40_000), (whole, 39_999), (encoded(noise()), 40_000)):
            with contextlib.suppress(ImageError):
                open_image(data, preprocessing(), max_pixels=limit)
            with contextlib.suppress(ImageError):
                decode(data, preprocessing(), max_pixels=limit)
        assert len(alive) == 6, "what is refused or only opened never reaches Pillow"
        opened = open_image(whole, preprocessing(), max_pixels=40_000)
        opened.render()
        assert [left() for left in alive] == [None] * 8, "its pixels are gone though the opened image is still held"
    finally:
        gc.enable()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(noise(64, 48), "JPEG", exif=exif.tobytes())


def half_transparent() -> bytes:
    image = noise(40, 30).convert("RGBA")
    image.putalpha(128)
    return encoded(image)


def deep_grey() -> bytes:
    return encoded(Image.fromarray(np.linspace(0, 65535, 32 * 24).astype(np.uint16).reshape(24, 32)))


@pytest.mark.parametrize(
    "data",
    [turned(), half_transparent(), deep_grey(), encoded(noise(53, 37), "WEBP"), encoded(noise(640, 427), "JPEG")],
    ids=["EXIF", "alpha", "16 bits", "WebP", "drafted JPEG"],
)
def test_decode_gives_the_pixels_that_are_served(data: bytes, tmp_path: Path) -> None:
    """The model's logits are the pixels of its input."""
    bundle = read_bundle(publish_identity(tmp_path))
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(data).decode()]}
    with TestClient(create_app(Settings(repository=tmp_path, threads=1))) as client:
        answer = client.post("/v2/models/identity-a/infer", json={"inputs": [tensor]})
    (logits,) = (output["data"] for output in answer.json()["outputs"] if output["name"] == "logits")
    ours = decode(data, bundle.manifest.preprocessing, max_pixels=MAX_PIXELS)
    assert ours.flatten().tolist() == logits
