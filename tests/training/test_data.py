"""Data sets of every layout, good and bad."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from training.augment import evaluation_batches, training_batches
from training.data import Dataset, Files, Images, Split, load_dataset, split_val
from training.readers import DataError
from training.recipes import Augment

CLASSES = ["apple", "bear"]


def png(shade: int, *, width: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 32), (shade, 0, 255)).save(buffer, format="PNG")
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


def class_folders(folder: Path) -> Path:
    for split, first, count in (("train", 0, 8), ("val", 200, 2)):
        for number in range(count):
            path = folder / split / CLASSES[number % 2] / f"{first + number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(first + number, width=32 + number))
    return folder


def shards(folder: Path) -> Path:
    for name, first, count in (("train-000000", 0, 4), ("train-000001", 4, 4), ("validation-000000", 200, 2)):
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for number in range(count):
                for suffix, data in (("png", png(first + number)), ("cls", str(number % 2).encode())):
                    entry = tarfile.TarInfo(f"{first + number:06d}.{suffix}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    return folder


def shades(images: Images) -> list[int]:
    return [images.read(row).getpixel((0, 0))[0] for row in range(len(images))]  # type: ignore[index]


def in_memory(images: Images) -> Split:
    assert isinstance(images, Split)
    return images


def on_disk(dataset: Dataset) -> Files:
    assert isinstance(dataset.train, Files)
    return dataset.train


def test_digits_have_a_fixed_split() -> None:
    digits, again = load_dataset("digits"), load_dataset("digits")
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert in_memory(digits.train).images.shape == (1437, 32, 32, 3)
    assert in_memory(digits.train).images.dtype == np.uint8
    assert digits.fingerprint == again.fingerprint
    counts = np.bincount(digits.test.labels)
    assert counts.min() >= 34
    assert counts.max() <= 38


def test_parquet_files_are_read_in_order(tmp_path: Path) -> None:
    cifar = load_dataset("cifar100", small_cifar(tmp_path))
    assert cifar.classes == tuple(CLASSES)
    assert in_memory(cifar.train).images[:, 0, 0, 0].tolist() == list(range(8))
    assert cifar.test.labels.tolist() == [0, 1]
    assert cifar.mean == pytest.approx((3.5 / 255, 0, 1), abs=1e-5)
    assert cifar.std == pytest.approx((np.arange(8).std() / 255, 0, 0), abs=1e-5)


@pytest.mark.parametrize(
    ("layout", "split", "classes"),
    [
        (small_cifar, "test", ("apple", "bear")),
        (class_folders, "val", ("apple", "bear")),
        (shards, "validation", ("0", "1")),
    ],
)
def test_every_layout_gives_the_same_images_and_labels(
    tmp_path: Path, layout: object, split: str, classes: tuple[str, ...]
) -> None:
    assert callable(layout)
    dataset = load_dataset("fruit", layout(tmp_path), in_memory=False)
    assert dataset.classes == classes
    assert dataset.test_split == split
    assert sorted(zip(shades(dataset.train), dataset.train.labels, strict=True)) == [(n, n % 2) for n in range(8)]
    assert sorted(zip(shades(dataset.test), dataset.test.labels, strict=True)) == [(200, 0), (201, 1)]


def test_hub_name_is_looked_up_on_the_hub() -> None:
    with pytest.raises(
        DataError, match=r"hub:uoft-cs/cifar100 cannot be loaded from the Hugging Face hub .*parquet files"
    ):
        load_dataset("cifar100", "hub:uoft-cs/cifar100")


def test_hub_dataset_is_read(tmp_path: Path) -> None:
    """`datasets` takes a folder for a repository's name: the same code, without the internet."""
    dataset = load_dataset("cifar100", f"hub:{small_cifar(tmp_path)}")
    assert in_memory(dataset.train).images[:, 0, 0, 0].tolist() == list(range(8))
    assert dataset.test_split == "test"


def test_parent_folder_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "cifar100").mkdir()
    small_cifar(tmp_path / "cifar100")
    assert len(load_dataset("cifar100", tmp_path).train) == 8


def test_missing_data_names_the_expected_layout(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train-\*\.parquet in .*uoft-cs/cifar100"):
        load_dataset("cifar100", tmp_path)
    with pytest.raises(DataError, match="--data"):
        load_dataset("cifar100")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"train is not laid out as CLASS/picture\.jpg"):
        load_dataset("imagenet", tmp_path)


def test_unreadable_image_is_named_by_file_and_row(tmp_path: Path) -> None:
    small_cifar(tmp_path)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [png(1), png(2)[:60]])
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet row 1"):
        load_dataset("cifar100", tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_is_named_by_its_path(tmp_path: Path, workers: int) -> None:
    class_folders(tmp_path)
    (tmp_path / "train" / "bear" / "3.png").write_bytes(png(3)[:60])
    train = on_disk(load_dataset("fruit", tmp_path, in_memory=False))
    with pytest.raises(DataError, match=r"^[^\n]*bear/3\.png: the image cannot be decoded[^\n]*$"):
        list(batches(train, workers=workers))


def test_damaged_file_is_named(tmp_path: Path) -> None:
    small_cifar(tmp_path)
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"test-00000-of-00001\.parquet cannot be read"):
        load_dataset("cifar100", tmp_path)


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "train-000001.tar").write_bytes(b"not a tar file")
    with pytest.raises(DataError, match=r"train-\*\.tar cannot be read as WebDataset shards"):
        load_dataset("fruit", tmp_path)


def test_images_of_several_sizes_are_refused_in_memory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2\.png is 34 × 32, but the first image 32 × 32: .*augment\.scale"):
        load_dataset("fruit", class_folders(tmp_path))


def batches(images: Images, *, workers: int = 0, seed: int = 0, epoch: int = 0) -> npt.NDArray[np.uint8]:
    augment = Augment(scale=(0.05, 1.0), hflip=0.5, rand_augment="rand-m10-n2")
    index = [np.array([5, 2, 7]), np.array([0, 1, 2])]
    made = training_batches(images, augment, index, img_size=16, seed=seed, epoch=epoch, workers=workers)
    return np.concatenate([pixels.numpy() for pixels, _ in made])


def test_augmentation_from_disk_depends_only_on_seed_epoch_and_sample(tmp_path: Path) -> None:
    files = on_disk(load_dataset("fruit", class_folders(tmp_path), in_memory=False))
    one = batches(files)
    assert one.shape == (6, 16, 16, 3)
    assert np.array_equal(one[1], one[5]), "the same sample in another batch"
    assert np.array_equal(one, batches(files, workers=2))
    assert not np.array_equal(one, batches(files, seed=1))
    assert not np.array_equal(one, batches(files, epoch=1))


def test_evaluation_images_are_resized_and_center_cropped(tmp_path: Path) -> None:
    path = tmp_path / "val" / "a" / "wide.png"
    for folder in (path.parent, tmp_path / "train" / "a"):
        folder.mkdir(parents=True)
        picture = np.zeros((20, 60, 3), dtype=np.uint8)
        picture[:, 20:40] = 255
        Image.fromarray(picture).save(folder / "wide.png")
    test = load_dataset("wide", tmp_path, in_memory=False).test
    ((images, labels),) = evaluation_batches(test, resize=10, crop=8, batch_size=4)
    assert images.shape == (1, 8, 8, 3)
    assert int(images.min()) > 200, "the white middle, without the black sides"
    assert labels.tolist() == [0]


def test_labels_beyond_the_classes_are_named(tmp_path: Path) -> None:
    small_cifar(tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps({"fine_label_names": ["apple"]}))
    with pytest.raises(
        DataError, match=r"train-00000-of-00002\.parquet row 1: label 1 of 1 classes \(4 such in train\)"
    ):
        load_dataset("cifar100", tmp_path)


def test_different_classes_of_train_and_test_are_named(tmp_path: Path) -> None:
    class_folders(tmp_path)
    (tmp_path / "val" / "bear").rename(tmp_path / "val" / "beer")
    with pytest.raises(DataError, match="train and val have different classes: bear, beer"):
        load_dataset("fruit", tmp_path, in_memory=False)


def test_label_column_of_text_is_refused(tmp_path: Path) -> None:
    rows = [{"bytes": png(1), "path": None}]
    pq.write_table(pa.table({"img": rows, "label": ["apple"]}), tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match=r"train-0\.parquet: column label holds string, not class indices"):
        load_dataset("fruit", tmp_path)


def test_class_names_of_another_column_are_refused(tmp_path: Path) -> None:
    small_cifar(tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps({"coarse_label_names": CLASSES}))
    with pytest.raises(DataError, match=r'classes\.json is not a JSON object with a list "fine_label_names"'):
        load_dataset("cifar100", tmp_path)


def test_empty_split_is_refused(tmp_path: Path) -> None:
    shards(tmp_path)
    with tarfile.open(tmp_path / "validation-000000.tar", "w"):
        pass
    with pytest.raises(DataError, match="validation"):
        load_dataset("fruit", tmp_path)


def test_sample_of_a_shard_is_named_by_its_key(tmp_path: Path) -> None:
    train = on_disk(load_dataset("fruit", shards(tmp_path), in_memory=False))
    assert train.reader.where(5).endswith("train-*.tar sample 000005")


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    for split in ("train", "val"):
        path = tmp_path / split / "a" / "turned.jpg"
        path.parent.mkdir(parents=True)
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees
        Image.new("RGB", (40, 20)).save(path, exif=exif)
    assert load_dataset("turned", tmp_path, in_memory=False).train.read(0).size == (20, 40)


def test_val_images_are_stratified_and_disjoint() -> None:
    train = load_dataset("digits").train
    fit, held = (in_memory(part) for part in split_val(train, 200))
    assert (len(fit), len(held)) == (1237, 200)
    assert np.bincount(held.labels).min() >= 19
    assert np.array_equal(np.sort(np.concatenate([fit.labels, held.labels])), np.sort(train.labels))
    total = in_memory(train).images.sum(dtype=np.int64)
    assert fit.images.sum(dtype=np.int64) + held.images.sum(dtype=np.int64) == total


def test_class_with_one_image_cannot_be_held_out() -> None:
    images = np.zeros((5, 8, 8, 3), dtype=np.uint8)
    with pytest.raises(DataError, match="needs 2 train images of each class, but one has only 1: set val_images=0"):
        split_val(Split(images=images, labels=np.array([0, 0, 0, 0, 1])), 2)


def test_real_cifar100_is_complete(data_dir: Path) -> None:
    cifar = load_dataset("cifar100", data_dir, in_memory=False)
    assert (len(cifar.train), len(cifar.test), len(cifar.classes)) == (50_000, 10_000, 100)
    assert set(np.bincount(cifar.train.labels)) == {500}


@pytest.mark.slow
def test_real_cifar100_has_its_known_mean_and_std(data_dir: Path) -> None:
    cifar = load_dataset("cifar100", data_dir)
    assert cifar.mean == (0.50708, 0.48655, 0.44092)
    assert cifar.std == (0.26733, 0.25644, 0.27615)
