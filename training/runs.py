"""A run's folder: the artefacts of training and the interface to export.

    runs/<name>/run.json          resolved recipe, variant, git commit, library versions, data fingerprint
                metrics.csv       one row per epoch, without times: equal runs write equal files
                tensorboard/      the same plus the throughput, for TensorBoard
                last.pt           the state to resume from; previous.pt is the one before
                final/model.safetensors + model.json: the finished model; export and evaluate read nothing else

Files are replaced atomically: a killed run leaves the old file or the new one, never half of one.
"""

import csv
import hashlib
import io
import json
import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError, model_validator
from safetensors.torch import load_file, save
from torch import nn

from training.models import Architecture, NormalizedModel, Record, StrideViT, resized_positions

RUN_FILE = "run.json"
METRICS_FILE = "metrics.csv"
WEIGHTS_FILE = "final/model.safetensors"
CARD_FILE = "final/model.json"

SCHEMA_VERSION: Literal[2] = 2
"""Version of run.json and model.json. A model.json of version 1 is converted when read; such a run.json is refused."""

_VERSION_1_NAMES = {"image_size": "img_size", "width": "embed_dim", "heads": "num_heads", "classes": "num_classes"}


class Preprocessing(Record):
    """How an image becomes the model's input, before normalisation.

    The shorter side is resized to `resize`, then the centre `crop` × `crop` is taken. `mean` and `std` are per
    channel, in units of the 0..1 range.
    """

    resize: PositiveInt
    crop: PositiveInt
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Correct(Record):
    """Which images of a split the model classifies correctly, so that two models can be compared image by image."""

    top1: str
    """One bit per image, in the order of the split: base64 of numpy.packbits."""
    labels_sha256: str
    """sha256 over the true class indices in the order of the split, as little-endian int64."""


class Accuracy(Record):
    """Fractions of the `n` images of a split whose label is the first, or among the first five, predicted classes."""

    dataset: str
    split: str
    n: PositiveInt
    top1: float
    top5: float
    correct: Correct | None = None
    """None if it was not recorded."""


class ModelCard(Record):
    """`final/model.json`: what the weights next to it are and how to use them."""

    schema_version: Literal[2] = SCHEMA_VERSION
    name: str
    architecture: Architecture
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    accuracy: Accuracy | None
    dataset: str
    recipe: str
    seed: NonNegativeInt
    epochs: NonNegativeInt | NonNegativeFloat
    git_commit: str | None
    weights_sha256: str

    @model_validator(mode="before")
    @classmethod
    def _converted_from_version_1(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("schema_version") != 1:
            return values
        sizes = {_VERSION_1_NAMES.get(name, name): value for name, value in values["architecture"].items()}
        return {**values, "schema_version": SCHEMA_VERSION, "architecture": sizes}


class RunError(Exception):
    """The folder of a run cannot be used; the message says why and what to do."""


def write_atomically(path: Path, data: bytes | memoryview, *, keep_old_as: Path | None = None) -> None:
    """Replace `path` with a file of `data`, synced to disk; the old file may be kept under another name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if keep_old_as and path.exists():
            path.replace(keep_old_as)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def write_metrics(path: Path, rows: list[dict[str, float | int]]) -> None:
    """Write one row per epoch as CSV, atomically."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, fieldnames=list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv."""
    with path.open(newline="", encoding="utf-8") as stream:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]


def save_final(folder: Path, model: nn.Module, card: Callable[..., ModelCard]) -> None:
    """Write `final/`: the weights, then the card that `card(weights_sha256=...)` returns."""
    weights = folder / WEIGHTS_FILE
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(weights, save(state))
    write_json(folder / CARD_FILE, card(weights_sha256=sha256_file(weights)).model_dump(mode="json"))


def save_accuracy(folder: Path, accuracy: Accuracy) -> None:
    """Write the accuracy of a finished model into its card. Raises RunError if another one is there already."""
    card = read_card(folder)
    known = card.accuracy or accuracy
    if known.model_dump(exclude={"correct"}) != accuracy.model_dump(exclude={"correct"}):
        raise RunError(
            f"{folder} has top-1 {known.top1} and top-5 {known.top5} of {known.n} images in its {CARD_FILE}, but this "
            f"evaluation gives {accuracy.top1} and {accuracy.top5} of {accuracy.n}: nothing was recorded; evaluate "
            f"with the data, device and library versions that {RUN_FILE} names"
        )
    write_json(folder / CARD_FILE, card.model_copy(update={"accuracy": accuracy}).model_dump(mode="json"))


def load_final(folder: Path, *, img_size: int | None = None) -> tuple[NormalizedModel, ModelCard]:
    """The finished model of a run, in evaluation mode, and its card. Raises RunError.

    With `img_size` the model takes images of another size, and the card has the preprocessing for it.
    """
    card = read_card(folder)
    weights = folder / WEIGHTS_FILE
    if (digest := sha256_file(weights)) != card.weights_sha256:
        raise RunError(f"{weights} has sha256 {digest}, but its card says {card.weights_sha256}")
    if img_size is not None:
        card = _at_size(card, img_size)
    model = StrideViT(card.architecture)
    state = load_file(weights)
    if img_size is not None and "pos_embed" in state:
        class_token = card.architecture.class_tokens > 0
        state["pos_embed"] = resized_positions(state["pos_embed"], card.architecture, class_token=class_token)
    model.load_state_dict(state)
    classifier = NormalizedModel(model, mean=card.preprocessing.mean, std=card.preprocessing.std)
    return classifier.eval(), card


def read_card(folder: Path) -> ModelCard:
    """The card of a run's finished model. Raises RunError."""
    path = folder / CARD_FILE
    if not path.is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise RunError(f"{path.parent} has no finished model: train it to the end first (stridevit train)")
    try:
        return ModelCard.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise RunError(f"{path}: {'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}") from None


def _at_size(card: ModelCard, img_size: int) -> ModelCard:
    """The card for another image size: the ratio of resize to crop stays, the accuracy is unknown."""
    before = card.preprocessing
    resize = round(img_size * before.resize / before.crop)
    return card.model_copy(
        update={
            "architecture": Architecture.model_validate({**card.architecture.model_dump(), "img_size": img_size}),
            "preprocessing": before.model_copy(update={"crop": img_size, "resize": resize}),
            "accuracy": None,
        }
    )


def read_record(folder: Path) -> dict[str, Any]:
    """A run's run.json. Raises RunError."""
    path = folder / RUN_FILE
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}): restore it, or start the run again elsewhere") from error
    if record.get("schema_version") != SCHEMA_VERSION:
        raise RunError(
            f"{path} was written by an earlier version of training, whose runs cannot be continued or compared "
            "(evaluate and export still read its final/): train it again with another --out"
        )
    return record


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def git_commit() -> str | None:
    """The commit of this code, with `-dirty` if files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        described = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def environment() -> dict[str, Any]:
    """Library versions and the machine, for run.json."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **{name: version(name) for name in ("torch", "torchvision", "timm", "numpy", "pillow")},
    }
