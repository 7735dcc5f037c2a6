"""From a finished run to a published bundle."""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt

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
from training.models import StrideViT, count_macs, count_parameters
from training.runs import ModelCard, load_final
from training.variants import parse_variant

PARITY_IMAGES = 256


def export_run(run: Path, repository: Path, *, data: str | Path | None = None, family: str | None = None) -> Path:
    """Export `run` as the next version of `<family>-<variant>` in `repository` and return the bundle's folder.

    The family defaults to the data set, whose test images prove the export against torch. Raises ExportError if they
    do not agree or the graph is not plain, RunError or DataError if the run or the data cannot be read.
    """
    classifier, card = load_final(run)
    model = classifier.model
    if not isinstance(model, StrideViT):
        raise ExportError(f"{run} holds a {type(model).__name__}, not a StrideViT")
    spec = card.architecture
    variant = parse_variant(spec.variant)
    side, other = spec.image_shape
    if side != other:
        raise ExportError(f"{run} takes images of {other} × {side}: the service prepares square ones only")
    images = _real_images(card, data)

    macs = count_macs(model)
    graph = to_onnx(classifier, image_size=side)
    serialised = serialise(graph)
    engine = Engine(serialised, threads=available_cores())
    parity = check_parity(classifier, engine, images)
    preprocessing = Preprocessing.model_validate(card.preprocessing.model_dump())
    tolerance = Tolerance(max_abs_logit=MAX_ABS_LOGIT, max_abs_probability=MAX_ABS_PROBABILITY)
    classes = spec.classes
    manifest = Manifest(
        name=f"{family or card.dataset}-{spec.variant}",
        family=family or card.dataset,
        variant=spec.variant,
        stride=variant.stride,
        block_size=variant.block_size,
        rank=None if variant.kind == "mha" else spec.rank,
        tokens=spec.grid[0] * spec.grid[1],
        kv_tokens=spec.kv_tokens,
        preset=spec.preset,
        parameters=count_parameters(model),
        macs=macs,
        precision="fp32",
        opset=OPSET,
        op_types=op_types(graph),
        preprocessing=preprocessing,
        input=Tensor(name=INPUT, datatype="UINT8", shape=(-1, side, side, 3)),
        outputs=tuple(Tensor(name=name, datatype="FP32", shape=(-1, classes)) for name in OUTPUTS),
        classes=classes,
        accuracy=Accuracy.model_validate(card.accuracy.model_dump()) if card.accuracy else None,
        parity=parity,
        tolerance=tolerance,
        devices=("cpu", "cuda", "tensorrt"),
        source=Source(
            checkpoint_sha256=card.weights_sha256,
            git_commit=card.git_commit,
            exporter={name: version(name) for name in ("torch", "timm", "onnx", "onnxscript")},
        ),
    )
    golden = draw_golden(classifier, preprocessing, tolerance)
    check_golden(golden, manifest, engine, path=Path(GOLDEN_FILE))
    return publish(repository, manifest, model=serialised, labels=card.labels, golden=golden)


def _real_images(card: ModelCard, data: str | Path | None) -> npt.NDArray[np.uint8]:
    """The first test images as the model takes them, uint8 (n,H,W,3)."""
    test = load_dataset(card.dataset, data, in_memory=False).test
    first = test.take(np.arange(min(PARITY_IMAGES, len(test))))
    prepared = card.preprocessing
    batches = evaluation_batches(first, resize=prepared.resize, crop=prepared.crop, batch_size=len(first))
    images: npt.NDArray[np.uint8] = next(iter(batches))[0].numpy()
    return images
