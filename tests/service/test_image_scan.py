"""The cost of an image is bounded before a decoder sees it."""

import io
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from service.errors import BadImage, ImageError, TooManyPixels, UnsupportedImage
from service.images import FORMATS, ImageHeader, ImageRules, MemoryBudget, OpenedImage, av1
from tests.processes import ROOT, wait_until
from tests.service import hostile_images as hostile
from tests.service.conftest import encoded, noise
from tests.service.test_draft import preprocessing

MAX_PIXELS = 50_000_000
RULES = ImageRules(max_pixels=MAX_PIXELS)
SIZE = preprocessing()


def inspect(data: bytes, *, max_pixels: int) -> ImageHeader:
    return ImageRules(max_pixels=max_pixels).open(data, SIZE).header


def opened(data: bytes) -> OpenedImage:
    return RULES.open(data, SIZE)


def decoder_sees(data: bytes) -> bytes:
    return opened(data).scan.rewritten()


@pytest.mark.parametrize("kind", FORMATS)
def test_format_size_and_cost_are_known_without_pillow(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(noise(300, 200), kind)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    header = inspect(data, max_pixels=60_000)
    assert (header.format, header.width, header.height) == (kind, 300, 200)
    assert 1 <= header.work_pixels / 60_000 < 10
    assert 4 <= header.decoded_bytes / 60_000 < 60
    with pytest.raises(TooManyPixels, match="300 × 200"):
        inspect(data, max_pixels=59_999)


JUNK = bytes(range(256)) * 200
METADATA: dict[str, Callable[[], bytes]] = {
    "PNG of 65,000 EXIF tags": lambda: hostile.png_with(hostile.png_chunk(b"eXIf", hostile.exif(65_000))),
    "PNG of compressed texts": lambda: hostile.png_with(
        *(hostile.png_chunk(b"zTXt", b"key%d\0\0" % n + zlib.compress(bytes(10**6))) for n in range(100))
    ),
    "PNG of a colour profile": lambda: hostile.png_with(
        hostile.png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(10**7)))
    ),
    "JPEG of 30 MB of EXIF": lambda: hostile.jpeg_with(
        hostile.jpeg_segment(0xE1, b"Exif\0\0" + hostile.exif(1) + bytes(60_000)) * 500
    ),
    "JPEG of comments": lambda: hostile.jpeg_with(hostile.jpeg_segment(0xFE, JUNK) * 100),
    "JPEG of a colour profile": lambda: hostile.jpeg_with(hostile.jpeg_segment(0xE2, b"ICC_PROFILE\0\1\1" + JUNK)),
    "JPEG of bytes between segments": lambda: hostile.jpeg_with(b"\xff" * 10**6 + b"\0junk" * 1000),
    "TIFF of 900 odd tags": lambda: hostile.tiff(hostile.grey_tiff(64, 48), bytes(64 * 48), odd_tags=900),
    "GIF of comments": lambda: hostile.gif_with_comments(15_000),
    "WebP of EXIF and XMP": lambda: encoded(
        hostile.PICTURE, "WEBP", exif=hostile.exif(5_000), xmp=JUNK, icc_profile=JUNK
    ),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_does_not_reach_the_decoder(name: str) -> None:
    data = METADATA[name]()
    seen = opened(data).scan.rewritten()
    with_directory = len(data) + 200 if name.startswith("TIFF") else 10_000
    assert len(seen) < with_directory
    assert b"Exif" not in seen
    assert b"zTXt" not in seen
    with Image.open(io.BytesIO(seen)) as image:
        assert not set(image.info) & {"icc_profile", "comment", "xmp", "exif"}
        assert len(image.getexif()) == (9 if name.startswith("TIFF") else 0)
    opened(data).render()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (hostile.jpeg_with(hostile.jpeg_segment(0xE1, b"Exif\0\0II*\0") * 5_000), BadImage, "4,096 segments"),
        (hostile.jpeg_with(b"\xff\xd0" * 5_000), BadImage, "4,096 segments"),
        (hostile.jpeg_with(hostile.jpeg_segment(0xDB, b"\0" + bytes([1]) * 64) * 300), BadImage, "256 tables"),
        (hostile.jpeg_with(hostile.jpeg_segment(0xDB, (b"\0" + bytes([1]) * 64) * 600)), BadImage, "32,768 bytes"),
        (hostile.jpeg_of_scans(101), BadImage, "101 scans"),
        (hostile.png_with(hostile.png_chunk(b"tEXt", b"a\0b") * 21_000), BadImage, "20,000 chunks"),
        (hostile.png_with(hostile.png_chunk(b"PLTE", bytes(3_000))), BadImage, "PLTE chunk of 3,000 bytes"),
        (hostile.png_of_size(1, 50_000_000), TooManyPixels, "limit of a side is 65,535"),
        (hostile.tiff(hostile.grey_tiff(8, 8), bytes(64), odd_tags=4_080), BadImage, "tags; the limit is 1,000"),
        (hostile.tiff_of_tile(32_768), TooManyPixels, "tiles have 1,073,741,824 pixels"),
        (
            hostile.tiff(hostile.grey_tiff(1, 64, t278=(4, [1]), t273=(4, [8] * 1_000_000)), bytes(64)),
            BadImage,
            "1,000,000 values in TIFF tag 273",
        ),
        (
            hostile.tiff(hostile.grey_tiff(100, 40_000, t278=(4, [1]), t273=(4, [8] * 20_000)), bytes(64)),
            BadImage,
            "40,000 strips",
        ),
        (
            hostile.tiff(hostile.grey_tiff(64, 2, t278=(4, [1]), t273=(4, [8] * 10_000)), bytes(64)),
            BadImage,
            "10,000 strips, of which 2",
        ),
        (
            hostile.tiff(
                hostile.grey_tiff(64, 50, t259=(3, [8]), t278=(4, [1]), t273=(4, [8] * 50), t279=(4, [900] * 50)),
                bytes(1000),
            ),
            BadImage,
            "strips overlap",
        ),
        (hostile.tiff(hostile.grey_tiff(8, 8, t259=(3, [34712])), bytes(64)), UnsupportedImage, "compression .34712"),
        (hostile.gif_with_comments(25_000), BadImage, "20,000 blocks"),
        (hostile.gif_with_comments(5_000, comments=5), BadImage, "20,000 blocks"),
        (hostile.avif_of_extents(1_000, 65_535), BadImage, "4,000 pieces"),
        (hostile.bmp_of_runs(2_000, 1_100_000), UnsupportedImage, "run lengths"),
        (b"BM" + bytes(12) + struct.pack("<IIIHHI", 2**31, 8, 8, 1, 24, 0), BadImage, "a header of"),
    ],
    ids=lambda value: value[:12].hex() if isinstance(value, bytes) else None,
)
def test_a_file_that_costs_too_much_is_refused_before_it_is_decoded(
    data: bytes, error: type[ImageError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(error, match=message):
        opened(data)


def test_the_scans_of_a_jpeg_are_work_and_a_video_behind_it_is_not() -> None:
    once, often = (inspect(hostile.jpeg_of_scans(count), max_pixels=MAX_PIXELS) for count in (10, 100))
    assert (once.work_pixels, often.work_pixels) == (2 * 64 * 48, 11 * 64 * 48)
    video = np.random.default_rng(0).bytes(10_000_000)
    assert video.count(b"\xff\xda") > 100
    assert inspect(hostile.jpeg_of_scans(10) + video, max_pixels=MAX_PIXELS) == once
    hidden = hostile.jpeg_of_scans(10)[:-2] + hostile.jpeg_segment(0xFE, b"\xff\xd9")
    with pytest.raises(BadImage, match="scans"):
        opened(hidden + hostile.jpeg_of_scans(200)[2:])


def test_work_beyond_a_multiple_of_the_pixel_limit_is_refused() -> None:
    data = hostile.jpeg_of_scans(100, 400, 300)
    assert inspect(data, max_pixels=120_000).work_pixels == 11 * 120_000
    runs = hostile.bmp_of_runs(300, 50_000)
    with pytest.raises(TooManyPixels, match="takes too long"):
        inspect(runs, max_pixels=100_000)


def test_the_size_of_an_avif_is_that_of_its_bitstream_not_of_its_boxes() -> None:
    honest = encoded(noise(400, 300), "AVIF")
    lying = hostile.avif_that_claims(400, 300, 16)
    assert lying != honest
    assert inspect(lying, max_pixels=120_000).work_pixels >= 4 * 120_000
    with pytest.raises(TooManyPixels, match="400 × 300"):
        inspect(lying, max_pixels=119_999)


def test_every_frame_of_an_av1_bitstream_is_work() -> None:
    still = bytes([0b000_1_1_000, 0b00_0111_01, 0b11_111111, 0b11_111111, 0b11_000000])
    found = av1.scan(hostile.av1_units((2, b""), (1, still), *[(6, b"\0")] * 50, (3, b"")), 53)
    assert (found.units, found.frames, found.width > 0, found.height > 0) == (53, 51, True, True)
    with pytest.raises(BadImage, match="parts"):
        av1.scan(hostile.av1_units(*[(6, b"")] * 20_001), 20_000)


def test_a_text_is_unpacked_only_as_far_as_an_orientation_may_be() -> None:
    bomb = zlib.compress(b"x" * 300_000_000, 9)
    data = hostile.png_with(hostile.png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb))
    image = opened(data)
    tracemalloc.start()
    try:
        image.render()
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_orientation_is_found_wherever_pillow_finds_it(orientation: int) -> None:
    block = hostile.exif(20, orientation)
    xmp = b'<rdf:Description tiff:Orientation="%d"/>' % orientation
    profile = b"\nexif\n      %d\n" % len(block) + block.hex().encode()
    text = b"XML:com.adobe.xmp\0\1\0en\0\0" + zlib.compress(xmp)
    files = [
        hostile.jpeg_with(hostile.jpeg_segment(0xE1, b"Exif\0\0" + block)),
        hostile.jpeg_with(hostile.jpeg_segment(0xE1, b"Exif\0\0" + block.replace(b"II*\0", b"II*\0"))),
        hostile.jpeg_with(hostile.jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp)),
        hostile.png_with(hostile.png_chunk(b"eXIf", block)),
        hostile.png_with(hostile.png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile))),
        hostile.png_with(hostile.png_chunk(b"iTXt", text)),
        encoded(hostile.PICTURE, "WEBP", lossless=True, exif=block),
        encoded(hostile.PICTURE, "WEBP", lossless=True, xmp=xmp),
        encoded(hostile.PICTURE, "AVIF", exif=block),
        hostile.tiff(hostile.grey_tiff(64, 48, t274=(3, [orientation])), bytes(64 * 48)),
        hostile.tiff(hostile.grey_tiff(64, 48, t700=(1, xmp)), bytes(64 * 48)),
    ]
    for data in files:
        image = opened(data)
        turned = image.scan.orientation
        if turned is None:  # AVIF: the decoder reads it from the container.
            upright = encoded(hostile.PICTURE.transpose(Image.Transpose.ROTATE_270), "AVIF", quality=100)
            level = np.abs(image.render().astype(int) - opened(upright).render()).mean()
            assert (level < 10) == (orientation == 6)
        else:
            assert turned() == orientation, data[:4]


def test_libtiff_writes_nothing(tmp_path: Path) -> None:
    """Its text names tags and numbers of the file: 1.2 MB for a file of 49 kB."""
    noisy = np.random.default_rng(0).bytes(20_000)
    tags = hostile.grey_tiff(500, 2000, t258=(3, [1]), t259=(3, [3]), t279=(4, [len(noisy)]))
    (tmp_path / "fax.tif").write_bytes(hostile.tiff(tags, noisy))
    odd = hostile.tiff(hostile.grey_tiff(64, 48, t259=(3, [5])), bytes(64 * 48), odd_tags=900)
    (tmp_path / "odd.tif").write_bytes(odd)
    code = """
import sys
from service.errors import ImageError
from service.images import decode
from service.manifest import Preprocessing
size = Preprocessing(resize=32, crop=32, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
for name in sys.argv[1:]:
    try:
        decode(open(name, "rb").read(), size, max_pixels=10**7)
    except ImageError as error:
        print(type(error).__name__)
"""
    files = [str(tmp_path / name) for name in ("fax.tif", "odd.tif")]
    ended = subprocess.run([sys.executable, "-c", code, *files], cwd=ROOT, check=True, capture_output=True, text=True)
    assert ended.stderr == ""
    assert "BadImage" in ended.stdout


def test_decoding_takes_no_more_memory_than_predicted() -> None:
    code = """
import io
from PIL import Image
from service.images import ImageRules
from service.manifest import Preprocessing
size = Preprocessing(resize=64, crop=64, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
status = lambda name: next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
kinds = [
    ("JPEG", "RGB", {"exif": turned}), ("JPEG", "CMYK", {"progressive": True}),
    ("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "I;16", {}), ("GIF", "P", {}), ("BMP", "RGB", {}),
    ("WEBP", "RGBA", {"method": 0}), ("AVIF", "RGBA", {"speed": 10}),
    ("TIFF", "RGBA", {"compression": "tiff_lzw"}), ("TIFF", "F", {}),
]
for kind, mode, options in kinds:
    buffer = io.BytesIO()
    Image.new(mode, (2000, 1500)).save(buffer, kind, **options)
    image = ImageRules(max_pixels=10**7, exact=True).open(buffer.getvalue(), size)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    image.render()
    taken = status("VmHWM") - before
    print(kind, mode, image.header.decoded_bytes - taken)
""".replace("turned", repr(hostile.exif(0, 6)))
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    lines = ended.stdout.splitlines()
    assert len(lines) == 11
    # Buffers of the decoders themselves take a megabyte or two.
    assert [line for line in lines if int(line.split()[-1]) < -4_000_000] == []


def test_images_that_are_decoded_at_once_share_the_memory_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = MemoryBudget(300_000_000)
    rules = ImageRules(max_pixels=MAX_PIXELS, memory=budget)
    tile = hostile.tiff_of_tile(5_000)
    needed = rules.open(tile, SIZE).header.decoded_bytes
    assert 100_000_000 <= needed < 150_000_000
    at_once, go = [], threading.Event()

    def decode(_: OpenedImage) -> None:
        at_once.append(budget.taken_bytes)
        assert go.wait(400)

    monkeypatch.setattr(OpenedImage, "_decode", decode)
    threads = [threading.Thread(target=rules.open(tile, SIZE).render) for _ in range(32)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(at_once) + len(budget) == 32)
        assert len(at_once) == 300_000_000 // needed
    finally:
        go.set()
    for thread in threads:
        thread.join()
    assert len(at_once) == 32
    assert max(at_once) <= 300_000_000
    assert budget.taken_bytes == 0


def test_an_image_that_can_never_fit_is_refused_and_a_small_one_does_not_wait() -> None:
    budget = MemoryBudget(100_000_000)
    rules = ImageRules(max_pixels=MAX_PIXELS, memory=budget)
    with pytest.raises(TooManyPixels, match="MB of memory, and the limit is 100 MB"):
        rules.open(hostile.tiff_of_tile(5_500), SIZE)
    with budget.hold(100_000_000):
        rules.open(encoded(noise()), SIZE).render()
    with pytest.raises(ValueError, match="never free"), budget.hold(100_000_001):
        pass


@pytest.mark.parametrize("kind", FORMATS)
def test_a_format_can_be_switched_off(kind: str) -> None:
    rules = ImageRules(max_pixels=MAX_PIXELS, formats=[other for other in FORMATS if other != kind])
    with pytest.raises(UnsupportedImage, match=f"this is {kind}, which is switched off here: send"):
        rules.open(encoded(noise(), kind), SIZE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "this is HEIC, .*Instead, convert it to JPEG or PNG"),
        (b"\xff\x0a\xfa\x7f", "JPEG XL"),
        (b"%PDF-1.7\n", "PDF"),
        (b"\x1f\x8b\x08\0", "compressed with gzip"),
        (b'{"image": "/9j/4AAQ"}', "this is JSON"),
        (b"data:image/png;base64,iVBORw0KGgo=", "a data URL"),
        (b"https://example.com/a.jpg", "a URL.*fetches nothing"),
        (b"/9j/4AAQSkZJRgABAQAAAQ==", "base64"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"--X-BOUNDARY\r\nContent-Disposition: form-data", "a multipart form"),
        (b"\0\0\0\x20ftypisom", "a video"),
        (b"anything", "not an image of a format accepted here: JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF$"),
    ],
)
def test_what_is_not_an_image_is_named_with_what_to_send(data: bytes, message: str) -> None:
    with pytest.raises(UnsupportedImage, match=message):
        opened(data)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_image_of_an_accepted_format_is_not_called_one_of_another(kind: str) -> None:
    whole = encoded(noise(), kind)
    for keep in (16, 24, 40, len(whole) // 2):
        with pytest.raises((BadImage, TooManyPixels)):
            opened(whole[:keep]).render()


def test_sixteen_bit_grey_honours_its_transparent_value() -> None:
    grey = np.full((32, 32), 20_000, np.uint16)
    grey[:, 16:] = 20_001  # the same in eight bits
    whole = encoded(Image.fromarray(grey))
    data = whole[:33] + hostile.png_chunk(b"tRNS", struct.pack(">H", 20_001)) + whole[33:]
    pixels = opened(data).render()
    assert np.unique(pixels[:, :16]).tolist() == [20_000 >> 8]
    assert np.unique(pixels[:, 16:]).tolist() == [255]


def test_drafting_can_be_switched_off() -> None:
    data = encoded(noise(400, 400), "JPEG")
    exact = ImageRules(max_pixels=MAX_PIXELS, exact=True).open(data, SIZE)
    assert (opened(data).draft_scale, exact.draft_scale) == (4, 1)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(exact.render(), expected)


WHOLE: dict[str, bytes] = {kind: encoded(noise(24, 24), kind) for kind in FORMATS}
WHOLE["progressive"] = encoded(noise(24, 24), "JPEG", progressive=True, exif=hostile.exif(3, 6))
WHOLE["animation"] = encoded(noise(24, 24), "WEBP", save_all=True, append_images=[noise(24, 24, seed=1)])
WHOLE["tiles"] = hostile.tiff_of_tile(64)
WHOLE["film"] = encoded(noise(24, 24), "AVIF", save_all=True, append_images=[noise(24, 24, seed=1)])


@settings(max_examples=400, deadline=None)
@given(
    kind=st.sampled_from(sorted(WHOLE)),
    edits=st.lists(
        st.tuples(
            st.integers(0, 400),
            st.integers(0, 8),
            st.one_of(st.binary(max_size=8), st.sampled_from([b"\0", b"\xff" * 4, b"\x80\0\0\0", b"\0\0\0\x01"])),
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_mutated_headers_give_pixels_or_an_image_error(kind: str, edits: list[tuple[int, int, bytes]]) -> None:
    data = bytearray(WHOLE[kind])
    for at, cut, put in edits:
        start = at % len(data)
        data[start : start + cut] = put
    rules = ImageRules(max_pixels=1_000_000)
    try:
        assert rules.open(bytes(data), SIZE).render().shape == (32, 32, 3)
    except ImageError:
        return


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from(sorted(WHOLE)), tail=st.binary(max_size=300), keep=st.integers(0, 60))
def test_any_bytes_behind_a_magic_number_are_an_image_or_an_image_error(kind: str, tail: bytes, keep: int) -> None:
    try:
        inspect(WHOLE[kind][:keep] + tail, max_pixels=1_000_000)
    except ImageError:
        return
