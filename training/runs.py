"""A run's folder: the artefacts of training and the seam to export.

    runs/<name>/run.json          resolved recipe, variant, git commit, library versions, data fingerprint
                metrics.csv       a row an epoch, without times: equal runs write equal files; the same and
                                  the throughput in TensorBoard's format under tensorboard/
                last.pt           all state to resume, previous.pt the one before; read with weights_only=True
                final/model.safetensors + model.json: the finished model, all that export and evaluate read

Files are replaced in one step, so that a killed run leaves the old or the new file, never half of one.
"""

import csv
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError, model_validator
from safetensors.torch import load_file, save
from torch import nn

from training.models import Architecture, NormalizedModel, StrideViT

RUN_FILE = "run.json"
METRICS_FILE = "metrics.csv"
FINAL_FOLDER = "final"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "model.json"

SCHEMA_VERSION: Literal[2] = 2
"""Of run.json and model.json. Version 1 had other names than timm: a card of it is converted, a record is not."""

_VERSION_1_NAMES = {"image_size": "img_size", "width": "embed_dim", "heads": "num_heads", "classes": "num_classes"}


class Preprocessing(BaseModel):
    """How an image becomes the model's input, before normalisation.

    The shorter side is resized to `resize`, then the centre `crop` × `crop` is taken. `mean` and `std` are per
    channel, in units of the 0..1 range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    resize: PositiveInt
    crop: PositiveInt
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Correct(BaseModel):
    """Which images of a split the model classifies correctly, so that two models can be compared image by image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    top1: str
    """One bit per image, in the order of the split: base64 of numpy.packbits."""
    labels_sha256: str
    """sha256 over the true class indices in the order of the split, as little-endian int64."""


class Accuracy(BaseModel):
    """Fractions of `n` images of a split whose label is the first, or among the first five, of the model's answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    split: str
    n: PositiveInt
    top1: float
    top5: float
    correct: Correct | None = None
    """None where it was not recorded."""


class ModelCard(BaseModel):
    """`final/model.json`: what the weights beside it are and how to use them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[2] = SCHEMA_VERSION
    name: str
    architecture: Architecture
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    accuracy: Accuracy | None
    dataset: str
    recipe: str
    seed: NonNegativeInt
    epochs: PositiveInt
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
    """A run's folder cannot be used; the message says why and what to do."""


@contextmanager
def durably(path: Path, write: Callable[[Path], object]) -> Iterator[Path]:
    """Let `write` fill a temporary file beside `path` and make it durable; the caller puts it where it belongs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, make it durable, then put it in place of `path`."""
    with durably(path, write) as partial:
        partial.replace(path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` as indented JSON, atomically."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda partial: partial.write_bytes(text.encode()))


def write_metrics(path: Path, rows: list[dict[str, float | int]]) -> None:
    """Write the rows of all epochs so far as CSV, atomically."""

    def write(partial: Path) -> None:
        with partial.open("w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, fieldnames=list(rows[0]))
            table.writeheader()
            table.writerows(rows)

    write_atomically(path, write)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv."""
    with path.open(newline="", encoding="utf-8") as stream:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]


def save_final(folder: Path, model: nn.Module, card: Callable[[str], ModelCard]) -> None:
    """Write `final/`: the weights, then the card that `card` makes from their sha256."""
    weights = folder / FINAL_FOLDER / WEIGHTS_FILE
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(weights, lambda partial: partial.write_bytes(save(state)))
    write_json(folder / FINAL_FOLDER / CARD_FILE, card(sha256_file(weights)).model_dump(mode="json"))


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
    write_json(
        folder / FINAL_FOLDER / CARD_FILE, card.model_copy(update={"accuracy": accuracy}).model_dump(mode="json")
    )


def load_final(folder: Path, *, img_size: int | None = None) -> tuple[NormalizedModel, ModelCard]:
    """The finished model of a run, in evaluation mode, and its card. Raises RunError.

    With `img_size` the same weights see images of another size; the card says how they are to be prepared then.
    """
    card = read_card(folder)
    weights = folder / FINAL_FOLDER / WEIGHTS_FILE
    if (digest := sha256_file(weights)) != card.weights_sha256:
        raise RunError(f"{weights} has sha256 {digest}, but its card says {card.weights_sha256}")
    if img_size is not None:
        card = _at_size(card, img_size)
    model = StrideViT(card.architecture)
    model.load_state_dict(load_file(weights))
    classifier = NormalizedModel(model, mean=card.preprocessing.mean, std=card.preprocessing.std)
    return classifier.eval(), card


def read_card(folder: Path) -> ModelCard:
    """The card of a run's finished model. Raises RunError."""
    final = folder / FINAL_FOLDER
    path = final / CARD_FILE
    if not path.is_file() or not (final / WEIGHTS_FILE).is_file():
        raise RunError(f"{final} has no finished model: train it to the end first (python -m training train)")
    try:
        return ModelCard.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise RunError(f"{path}: {'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}") from None


def _at_size(card: ModelCard, img_size: int) -> ModelCard:
    """The card for other images than the model was trained on; resize keeps its ratio to the crop, and no accuracy."""
    architecture, before = card.architecture, card.preprocessing
    return card.model_copy(
        update={
            "architecture": Architecture.model_validate({**architecture.model_dump(), "img_size": img_size}),
            "preprocessing": before.model_copy(
                update={"crop": img_size, "resize": round(img_size * before.resize / before.crop)}
            ),
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


def read_started(folder: Path) -> datetime:
    """When the run was first started, from its run.json. Raises RunError."""
    return datetime.fromisoformat(read_record(folder)["started"])


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def git_commit() -> str | None:
    """The commit this code runs from, with `-dirty` where files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="],  # noqa: S607
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
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
