"""The images that are sent: the same files in the same order to every model."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
MAX_IMAGES = 1000


class PayloadError(Exception):
    """The images to send cannot be had; the message says what was expected where."""


def write_payloads(data: Path | None, folder: Path, *, seed: int = 0) -> str:
    """Fill `folder` with up to 1,000 images in the order in which they will be sent, and say in words what they are.

    `data` is a folder of image files, or of parquet files with a column `img` or `image` of encoded bytes (the test
    split if there is one); without it, 64 JPEGs of about 100 kB are generated.
    """
    if data is None:
        images, what = list(_generated(64, seed)), "generated JPEGs"
    elif not data.is_dir():
        raise PayloadError(f"{data} is not a folder: --data names a folder of image files or parquet files")
    else:
        images, what = _from_folder(data)
    order = np.random.default_rng(seed).permutation(len(images))[:MAX_IMAGES]
    for position, index in enumerate(order):
        (folder / f"{position:05d}").write_bytes(images[index])
    kilobytes = sorted(len(images[index]) / 1000 for index in order)
    return (
        f"{len(order)} {what}, {kilobytes[0]:.1f} to {kilobytes[-1]:.1f} kB, "
        f"median {kilobytes[len(kilobytes) // 2]:.1f} kB"
    )


def _from_folder(data: Path) -> tuple[list[bytes], str]:
    files = sorted(file for file in data.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if files:
        return [file.read_bytes() for file in files], f"files of {data.name}/"
    tables = sorted(data.glob("test-*.parquet")) or sorted(data.glob("*.parquet"))
    if not tables:
        raise PayloadError(f"{data} holds neither image files ({', '.join(IMAGE_SUFFIXES)}) nor parquet files")
    schema = pq.read_schema(tables[0])
    column = next((name for name in ("img", "image") if name in schema.names), None)
    if column is None:
        raise PayloadError(f"{tables[0]} has no column img or image: it has {', '.join(schema.names)}")
    rows = pq.read_table(tables[0], columns=[column]).column(column).combine_chunks()
    return rows.field("bytes").to_pylist(), f"rows of {tables[0].name}"


def _generated(count: int, seed: int) -> Iterator[bytes]:
    """Blurred noise with grain, 640 × 480: JPEGs that cost about what a photo costs to decode."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        coarse = generator.integers(0, 256, size=(12, 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC), np.int16)
        grain = generator.normal(0, 9, size=smooth.shape)
        pixels = (smooth + grain).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=90)
        yield buffer.getvalue()
