"""Data sets: digits, and parquet files good and bad."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from training.data import DataError, load_dataset, split_holdout

CLASSES = ["apple", "bear"]


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (shade, 0, 255)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_parquet(path: Path, images: list[bytes]) -> None:
    rows = [{"bytes": image, "path": None} for image in images]
    labels = [number % 2 for number in range(len(images))]
    pq.write_table(pa.table({"img": rows, "fine_label": labels}), path)


def small_cifar(folder: Path) -> Path:
    write_parquet(folder / "train-00000-of-00002.parquet", [png(shade) for shade in range(4)])
    write_parquet(folder / "train-00001-of-00002.parquet", [png(shade) for shade in range(4, 8)])
    write_parquet(folder / "test-00000-of-00001.parquet", [png(200), png(201)])
    (folder / "classes.json").write_text(json.dumps({"fine_label_names": CLASSES}))
    return folder


def test_digits_are_split_once_and_for_all() -> None:
    digits, again = load_dataset("digits"), load_dataset("digits")
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.train.images.shape == (1437, 32, 32, 3)
    assert digits.train.images.dtype == np.uint8
    assert digits.fingerprint() == again.fingerprint()
    counts = np.bincount(digits.test.labels)
    assert counts.min() >= 34
    assert counts.max() <= 38


def test_parquet_files_are_read_in_order(tmp_path: Path) -> None:
    cifar = load_dataset("cifar100", small_cifar(tmp_path))
    assert cifar.classes == tuple(CLASSES)
    assert cifar.train.images[:, 0, 0, 0].tolist() == list(range(8))
    assert cifar.test.labels.tolist() == [0, 1]
    assert cifar.mean == pytest.approx((3.5 / 255, 0, 1), abs=1e-5)
    assert cifar.std == pytest.approx((np.arange(8).std() / 255, 0, 0), abs=1e-5)


def test_the_folder_above_will_do(tmp_path: Path) -> None:
    (tmp_path / "cifar100").mkdir()
    small_cifar(tmp_path / "cifar100")
    assert len(load_dataset("cifar100", tmp_path).train) == 8


def test_missing_data_says_what_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train-\*\.parquet in .*uoft-cs/cifar100"):
        load_dataset("cifar100", tmp_path)
    with pytest.raises(DataError, match="--data"):
        load_dataset("cifar100")


def test_an_unknown_data_set_names_those_there_are() -> None:
    with pytest.raises(DataError, match="unknown data set 'imagenet': one of cifar100, digits"):
        load_dataset("imagenet")


def test_an_unreadable_image_is_named_by_file_and_row(tmp_path: Path) -> None:
    small_cifar(tmp_path)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [png(1), png(2)[:60]])
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet row 1"):
        load_dataset("cifar100", tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    small_cifar(tmp_path)
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"test-00000-of-00001\.parquet cannot be read"):
        load_dataset("cifar100", tmp_path)


def test_holdout_is_stratified_and_disjoint() -> None:
    train = load_dataset("digits").train
    fit, held = split_holdout(train, 200)
    assert (len(fit), len(held)) == (1237, 200)
    assert np.bincount(held.labels).min() >= 19
    assert np.array_equal(np.sort(np.concatenate([fit.labels, held.labels])), np.sort(train.labels))
    assert fit.images.sum(dtype=np.int64) + held.images.sum(dtype=np.int64) == train.images.sum(dtype=np.int64)


def test_the_real_cifar100_has_its_known_figures(data_dir: Path) -> None:
    cifar = load_dataset("cifar100", data_dir)
    assert (len(cifar.train), len(cifar.test), len(cifar.classes)) == (50_000, 10_000, 100)
    assert set(np.bincount(cifar.train.labels)) == {500}
    assert cifar.mean == (0.50708, 0.48655, 0.44092)
    assert cifar.std == (0.26733, 0.25644, 0.27615)
