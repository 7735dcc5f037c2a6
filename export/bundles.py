"""From a finished run, or from random weights, to a published bundle."""

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save

from export.golden import draw_golden
from export.graph import OPSET, ExportError, op_types, serialise, to_onnx
from export.parity import MAX_ABS_LOGIT, MAX_ABS_PROBABILITY, check_parity
from service.bundle import (
    GOLDEN_FILE,
    Accuracy,
    Manifest,
    Preprocessing,
    Source,
    Tensor,
    Tolerance,
    publish,
)
from service.cores import available_cores
from service.engine import INPUT, OUTPUTS, Engine
from service.golden import check_golden
from training.augment import evaluation_batches
from training.data import load_dataset
from training.describe import count_macs
from training.models import Architecture, Classifier, StrideViT, count_parameters
from training.runs import ModelCard, git_commit, load_final
from training.variants import parse_variant

PARITY_IMAGES, RANDOM_IMAGES = 256, 16


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What is exported, whether it was trained or not. `images` uint8 (n,H,W,3) prove the export."""

    classifier: Classifier
    spec: Architecture
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    weights: Literal["trained", "random"]
    weights_sha256: str
    accuracy: Accuracy | None
    git_commit: str | None
    images: npt.NDArray[np.uint8]


def export_run(run: Path, repository: Path, *, data: str | Path | None = None, family: str | None = None) -> Path:
    """Export `run` as the next version of `<family>-<variant>` in `repository` and return the bundle's folder.

    The family defaults to the data set, whose test images prove the export against torch. Raises ExportError if they
    do not agree or the graph is not plain, RunError or DataError if the run or the data cannot be read.
    """
    classifier, card = load_final(run)
    subject = _Subject(
        classifier=classifier,
        spec=card.architecture,
        preprocessing=Preprocessing.model_validate(card.preprocessing.model_dump()),
        labels=card.labels,
        weights="trained",
        weights_sha256=card.weights_sha256,
        accuracy=Accuracy.model_validate(card.accuracy.model_dump()) if card.accuracy else None,
        git_commit=card.git_commit,
        images=_real_images(card, data),
    )
    return _export(subject, repository, family or card.dataset)


def export_random(spec: Architecture, repository: Path, *, seed: int = 0) -> Path:
    """Export `spec` with random weights, to measure speed and memory, as `<preset>-<size>-random-<variant>`.

    Noise proves the export. Raises ExportError.
    """
    model = StrideViT(spec, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    # A head of zeros, as training starts with, would give every image the same answer.
    torch.nn.init.normal_(model.get_parameter("head.weight"), std=0.05, generator=generator)
    half = (0.5, 0.5, 0.5)
    side = spec.image_shape[0]
    noise = torch.randint(0, 256, (RANDOM_IMAGES, *spec.image_shape, 3), dtype=torch.uint8, generator=generator)
    subject = _Subject(
        classifier=Classifier(model, mean=half, std=half).eval(),
        spec=spec,
        preprocessing=Preprocessing(resize=side, crop=side, interpolation="bicubic", mean=half, std=half),
        labels=tuple(f"class {number}" for number in range(spec.classes)),
        weights="random",
        weights_sha256=hashlib.sha256(save(model.state_dict())).hexdigest(),
        accuracy=None,
        git_commit=git_commit(),
        images=noise.numpy(),
    )
    return _export(subject, repository, f"{spec.preset}-{side}-random")


def _export(subject: _Subject, repository: Path, family: str) -> Path:
    spec, classifier = subject.spec, subject.classifier
    model = classifier.model
    if not isinstance(model, StrideViT):
        raise ExportError(f"this is a {type(model).__name__}, not a StrideViT")
    side, other = spec.image_shape
    if side != other:
        raise ExportError(f"the model takes images of {other} × {side}: the service prepares square ones only")
    variant = parse_variant(spec.variant)
    graph = to_onnx(classifier, image_size=side)
    serialised = serialise(graph)
    engine = Engine(serialised, threads=available_cores())
    parity = check_parity(classifier, engine, subject.images)
    tolerance = Tolerance(max_abs_logit=MAX_ABS_LOGIT, max_abs_probability=MAX_ABS_PROBABILITY)
    manifest = Manifest(
        name=f"{family}-{spec.variant}",
        family=family,
        variant=spec.variant,
        stride=variant.stride,
        block_size=variant.block_size,
        rank=None if variant.kind == "mha" else spec.rank,
        tokens=spec.grid[0] * spec.grid[1],
        kv_tokens=spec.kv_tokens,
        preset=spec.preset,
        parameters=count_parameters(model),
        macs=sum(count_macs(spec).values()),
        precision="fp32",
        opset=OPSET,
        op_types=op_types(graph),
        preprocessing=subject.preprocessing,
        input=Tensor(name=INPUT, datatype="UINT8", shape=(-1, side, side, 3)),
        outputs=tuple(Tensor(name=name, datatype="FP32", shape=(-1, spec.classes)) for name in OUTPUTS),
        classes=spec.classes,
        weights=subject.weights,
        accuracy=subject.accuracy,
        parity=parity,
        tolerance=tolerance,
        devices=("cpu", "cuda", "tensorrt"),
        source=Source(
            checkpoint_sha256=subject.weights_sha256,
            git_commit=subject.git_commit,
            exporter={name: version(name) for name in ("torch", "timm", "onnx", "onnxscript")},
        ),
    )
    golden = draw_golden(classifier, subject.preprocessing, tolerance)
    check_golden(golden, manifest, engine, path=Path(GOLDEN_FILE))
    return publish(repository, manifest, model=serialised, labels=subject.labels, golden=golden)


def _real_images(card: ModelCard, data: str | Path | None) -> npt.NDArray[np.uint8]:
    """The first test images as the model takes them, uint8 (n,H,W,3)."""
    test = load_dataset(card.dataset, data, in_memory=False).test
    first = test.take(np.arange(min(PARITY_IMAGES, len(test))))
    prepared = card.preprocessing
    batches = evaluation_batches(first, resize=prepared.resize, crop=prepared.crop, batch_size=len(first))
    images: npt.NDArray[np.uint8] = next(iter(batches))[0].numpy()
    return images
