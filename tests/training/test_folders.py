"""Pictures of one's own, in class folders without splits."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from training.__main__ import app
from training.data import Files, Split, into_memory, load_dataset, split_val
from training.folder_recipe import dataset_name, folder_recipe
from training.folders import held_out
from training.models import architecture
from training.readers import DataError
from training.runs import load_final


def pictures(folder: Path, counts: dict[str, int], *, size: tuple[int, int] = (32, 32)) -> Path:
    """Class folders with so many pictures, each class of its own colour."""
    draw = np.random.default_rng(0)
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for row in range(count):
            pixels = draw.integers(0, 60, size=(size[1], size[0], 3), dtype=np.uint8)
            pixels[..., number % 3] += 150
            Image.fromarray(pixels).save(folder / name / f"{row:03d}.png")
    return folder


def rows_by_class(images: Files | Split) -> list[int]:
    return [int(count) for count in np.bincount(images.labels)]


def test_a_tenth_of_each_class_is_held_out_and_at_least_one(tmp_path: Path) -> None:
    dataset = load_dataset("mine", pictures(tmp_path / "mine", {"cat": 40, "dog": 3, "owl": 25}), in_memory=False)
    assert dataset.classes == ("cat", "dog", "owl")
    assert rows_by_class(dataset.test) == [4, 1, 2]
    assert rows_by_class(dataset.train) == [36, 2, 23]
    fit, val = split_val(dataset.train, len(held_out(dataset.train.labels)))
    assert rows_by_class(val) == [4, 1, 2]
    assert rows_by_class(fit) == [32, 1, 21]
    again = load_dataset("mine", tmp_path / "mine", in_memory=False)
    assert isinstance(again.test, Files)
    assert isinstance(dataset.test, Files)
    assert [again.test.reader.where(row) for row in range(7)] == [dataset.test.reader.where(row) for row in range(7)]


def test_what_is_left_out_is_named_and_counted(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "mine", {"cat": 12, "dog": 12})
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("hello")
    (folder / "cat" / "Thumbs.db").write_text("x")
    (folder / "cat" / ".thumbs").mkdir()
    (folder / "cat" / ".thumbs" / "small.png").write_bytes((folder / "cat" / "000.png").read_bytes())
    (folder / "dog" / "000.png").write_bytes((folder / "dog" / "001.png").read_bytes()[:60])
    (folder / "dog" / "nothing.jpg").write_bytes(b"")
    dataset = load_dataset("mine", folder, in_memory=False)
    broken, strays, empty = dataset.notes
    assert "left out pictures that cannot be decoded (2)" in broken
    assert "000.png" in broken
    assert "nothing.jpg" in broken
    assert "left out files that are no pictures (2)" in strays
    assert "notes.txt" in strays
    assert "left out classes without a picture (1): empty" in empty
    assert dataset.classes == ("cat", "dog")
    assert len(dataset.train) + len(dataset.test) == 23


@pytest.mark.parametrize(
    ("counts", "broken", "message"),
    [
        ({"cat": 12}, 0, "holds pictures of fewer than two classes"),
        ({"cat": 12, "dog": 2}, 0, r"class 'dog' .* has 2 usable pictures, but needs 3"),
        ({"cat": 12, "dog": 12}, 4, r"4 of 24 pictures .* cannot be decoded: .* and 1 more: fetch them again"),
    ],
)
def test_a_folder_that_cannot_be_used_stops_with_the_reason(
    tmp_path: Path, counts: dict[str, int], broken: int, message: str
) -> None:
    folder = pictures(tmp_path / "mine", counts)
    for row in range(broken):
        (folder / "cat" / f"{row:03d}.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=message):
        load_dataset("mine", folder)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "vehicles", {"bus": 5, "train": 5})
    assert load_dataset("vehicles", folder).classes == ("bus", "train")


def test_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    counts = {"cat": 4, "dog": 4}
    folder = tmp_path / "split"
    pictures(folder / "train", counts)
    pictures(folder / "val", counts)
    pictures(folder, {"train": 1})  # a stray picture beside the classes
    assert load_dataset("split", folder).classes == ("cat", "dog")
    with pytest.raises(DataError, match="holds pictures right in train and val"):
        load_dataset("flat", pictures(tmp_path / "flat", {"train": 5, "val": 5}))


def test_a_folder_with_splits_is_the_data_set_and_other_names_do_not_matter(tmp_path: Path) -> None:
    assert load_dataset("cat", pictures(tmp_path / "cat", {"cat": 5, "dog": 5})).classes == ("cat", "dog")
    beside = pictures(tmp_path / "data", {"odd": 5, "photos": 5})
    pictures(beside / "pets" / "train", {"bird": 4, "fish": 4})
    pictures(beside / "pets" / "val", {"bird": 1, "fish": 1})
    assert load_dataset("pets", beside).classes == ("bird", "fish")
    digits = pictures(tmp_path / "digits", {"one": 5, "two": 5})
    assert load_dataset(dataset_name(str(digits)), digits).classes == ("one", "two")


def test_a_preset_decides_the_size(tmp_path: Path) -> None:
    small = load_dataset("mine", pictures(tmp_path / "small", {"cat": 5, "dog": 5}), in_memory=False)
    recipe = folder_recipe(small, preset="vit-ti16")
    assert (recipe.preset, recipe.img_size, recipe.augment.in_memory) == ("vit-ti16", 224, False)
    photos = load_dataset("mine", pictures(tmp_path / "p", {"a": 5, "b": 5}, size=(300, 200)), in_memory=False)
    assert folder_recipe(photos, preset="vit-xs").img_size == 60
    with pytest.raises(ValueError, match="unknown preset"):
        folder_recipe(small, preset="vit-xl")


def test_small_pictures_of_one_size_are_trained_in_memory(tmp_path: Path) -> None:
    dataset = load_dataset("mine", pictures(tmp_path / "mine", {"cat": 50, "dog": 70}), in_memory=False)
    recipe = folder_recipe(dataset)
    assert recipe.precision == "bf16"
    assert folder_recipe(dataset, bf16=False).precision == "fp32"
    assert (recipe.preset, recipe.img_size, recipe.dataset) == ("vit-xs", 32, "mine")
    assert recipe.augment.in_memory
    assert recipe.val_images == len(held_out(dataset.train.labels))
    assert recipe.schedule.batch_size <= (len(dataset.train) - recipe.val_images) // 4
    assert recipe.schedule.epochs == 100
    assert isinstance(into_memory(dataset).train, Split)


def test_photos_are_read_from_disk_at_a_size_that_they_have(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "mine", {"cat": 5, "dog": 5}, size=(200, 150))
    pictures(folder, {"owl": 5}, size=(120, 170))
    recipe = folder_recipe(load_dataset("mine", folder, in_memory=False))
    assert (recipe.preset, recipe.img_size) == ("vit-ti16", 144)
    assert not recipe.augment.in_memory


def test_a_model_to_begin_with_decides_size_and_a_lower_rate(tmp_path: Path) -> None:
    dataset = load_dataset("mine", pictures(tmp_path / "mine", {"cat": 50, "dog": 70}), in_memory=False)
    spec = architecture("vit-s16", "mha", num_classes=10)
    recipe = folder_recipe(dataset, spec, trained=True)
    assert (recipe.preset, recipe.img_size, recipe.augment.in_memory) == ("vit-s16", 224, False)
    assert recipe.optim.lr < folder_recipe(dataset).optim.lr / 5


@pytest.mark.parametrize(
    ("path", "name"), [("photos/", "photos"), ("My Photos (2)", "my-photos-2"), ("hub:me/Cats_Dogs", "cats-dogs")]
)
def test_the_data_set_is_called_as_its_folder(path: str, name: str) -> None:
    assert dataset_name(path) == name


def test_one_command_trains_and_the_same_data_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path / "Photos", {"red": 12, "green": 12, "blue": 12})
    (tmp_path / "Photos" / "readme.txt").write_text("hello")
    monkeypatch.chdir(tmp_path)
    command = ["train", "--data", "Photos", "--variant", "csra-r2", "--epochs", "12", "--device", "cpu"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    assert "left out files that are no pictures (1)" in result.stderr
    _, card = load_final(Path("runs/photos-csra-r2"))
    assert (card.dataset, card.labels, card.recipe) == ("photos", ("blue", "green", "red"), "folder")
    assert card.accuracy is not None
    assert card.accuracy.n == 3
    assert card.accuracy.top1 == 1.0
    evaluated = CliRunner().invoke(app, ["evaluate", "runs/photos-csra-r2", "--data", "Photos"])
    assert "top-1 100.00%" in evaluated.stdout, evaluated.stderr
    shutil.rmtree(tmp_path / "Photos" / "red")
    changed = CliRunner().invoke(app, ["evaluate", "runs/photos-csra-r2", "--data", "Photos"])
    assert "trained on other classes" in changed.stderr


def test_data_that_a_recipe_would_not_use_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["train", "--recipe", "digits", "--variant", "mha", "--out", str(tmp_path / "x"), "--epochs", "0"]
    result = CliRunner().invoke(app, [*command, "--data", str(tmp_path)])
    assert result.exit_code == 1
    assert "would not use --data" in result.stderr
    # The variable of the environment is for all recipes, and this one needs none.
    monkeypatch.setenv("STRIDEVIT_DATA", str(tmp_path))
    result = CliRunner().invoke(app, command)
    assert "would not use" not in result.stderr
    assert "nothing to train" in result.stderr


def test_without_data_the_command_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STRIDEVIT_DATA", raising=False)
    result = CliRunner().invoke(app, ["train", "--variant", "mha"])
    assert result.exit_code == 1
    assert "--data DIR with a folder per class" in result.stderr
