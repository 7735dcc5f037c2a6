"""What is sent: real files in a seeded order, or generated JPEGs of a stated size."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from loadtests.payloads import PayloadError, write_payloads


def sent(data: Path | None, folder: Path) -> tuple[list[bytes], str]:
    folder.mkdir()
    what = write_payloads(data, folder)
    return [file.read_bytes() for file in sorted(folder.iterdir())], what


def test_a_folder_s_images_are_all_sent_in_the_same_order_every_time(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(12):
        (data / f"{number}.jpg").write_bytes(bytes([number]) * 1000)
    (data / "labels.csv").write_text("not an image")
    first, what = sent(data, tmp_path / "first")
    second, _ = sent(data, tmp_path / "second")
    assert first == second
    assert sorted(first) == sorted(bytes([number]) * 1000 for number in range(12))
    assert first != sorted(first)
    assert "12 files of data/" in what
    assert "median 1.0 kB" in what


@pytest.mark.parametrize("column", ["img", "image"])
def test_parquet_rows_are_sent_the_test_split_first(column: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        rows = [{"bytes": f"{split}{number}".encode(), "path": None} for number in range(3)]
        pq.write_table(pa.table({column: rows}), data / f"{split}-0.parquet")
    images, what = sent(data, tmp_path / "out")
    assert sorted(images) == [b"test0", b"test1", b"test2"]
    assert "rows of test-0.parquet" in what


def test_without_data_jpegs_of_about_100_kb_are_generated(tmp_path: Path) -> None:
    images, what = sent(None, tmp_path / "out")
    assert "64 generated JPEGs" in what
    assert len(set(images)) == 64
    assert all(60_000 < len(image) < 160_000 for image in images)
    assert Image.open(io.BytesIO(images[0])).size == (640, 480)


def test_data_that_holds_nothing_to_send_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PayloadError, match="is not a folder"):
        write_payloads(tmp_path / "nowhere", tmp_path)
    with pytest.raises(PayloadError, match="neither image files"):
        write_payloads(tmp_path, tmp_path)
    pq.write_table(pa.table({"pixels": [1]}), tmp_path / "x.parquet")
    with pytest.raises(PayloadError, match="no column img or image: it has pixels"):
        write_payloads(tmp_path, tmp_path)
