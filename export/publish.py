"""From a finished run, or random weights, to a published bundle."""

from functools import partial
from importlib.metadata import version
from pathlib import Path

import onnx
import torch

from export.graph import OPSET, ExportError, manifest_fields, serialise, to_onnx
from export.inference_model import MLP_PARTS
from export.kernels import gaps
from export.parity import check_parity, predict_by_torch, predict_in_batches
from export.precision import MAX_ACCURACY_LOSS, TOLERANCES
from export.proof_images import draw_golden, parity_images
from export.quantize import quantize, quantize_by_batch
from export.sources import ExportSource
from service.bundle import GOLDEN_FILE, publish
from service.engine import Engine
from service.host import available_cores
from service.manifest import Accuracy, Attention, Manifest, Precision, Source
from service.models.verify import check_golden
from training.data import Dataset
from training.describe import count_macs
from training.models import Architecture, count_parameters
from training.variants import parse_variant

ACCURACY_BATCH = 32


def export(
    source: ExportSource,
    repository: Path,
    *,
    family: str | None = None,
    precision: Precision = "fp32",
    opset: int = OPSET,
    accept_accuracy_loss: bool = False,
) -> Path:
    """Publish `source` as the next version of `<family>-<variant>[-<precision>]` and return the bundle's folder.

    Precisions other than fp32 are evaluated on the full test split. Raises ExportError if the outputs differ from
    torch's, if more than half a point of top-1 is lost and that is not accepted, or if the graph is not plain ONNX.
    """
    spec, classifier = source.spec, source.classifier
    height, width = spec.image_shape
    if height != width:
        raise ExportError(f"the model takes images of {width} × {height}, but the service prepares square ones only")
    tolerances = TOLERANCES[precision]
    graph = make_graph(source, precision, opset=opset)
    serialised = serialise(graph)
    engine = Engine(serialised, threads=available_cores())
    parity = check_parity(classifier, engine, parity_images(source), tolerances)
    accuracy = source.accuracy
    if precision != "fp32" and source.dataset:
        accuracy = _evaluate(source, source.dataset, engine, batch=tolerances.max_batch or ACCURACY_BATCH)
        if not accept_accuracy_loss:
            check_accuracy(source.accuracy, accuracy, precision)
    family = family or source.family
    manifest = Manifest(
        name=f"{family}-{spec.variant}" + ("" if precision == "fp32" else f"-{precision}"),
        family=family,
        architecture=spec.preset,
        attention=attention(spec),
        params=count_parameters(classifier.model),
        macs=sum(count_macs(spec).values()),
        precision=precision,
        max_batch=tolerances.max_batch,
        **manifest_fields(graph),
        preprocessing=source.preprocessing,
        random_weights=source.dataset is None,
        accuracy=accuracy,
        parity=parity,
        tolerance=tolerances.golden,
        devices=tolerances.devices,
        source=Source(
            checkpoint_sha256=source.weights_sha256,
            git_commit=source.git_commit,
            exporter={name: version(name) for name in ("torch", "timm", "onnx", "onnxscript", "onnxruntime")},
        ),
    )
    predict = partial(predict_by_torch, classifier) if precision == "fp32" else engine.run
    golden = draw_golden(predict, source.preprocessing, tolerances.golden)
    check_golden(golden, manifest, engine, path=Path(GOLDEN_FILE))
    return publish(repository, manifest, model=serialised, labels=source.labels, golden=golden)


def make_graph(source: ExportSource, precision: Precision, *, opset: int = OPSET) -> onnx.ModelProto:
    """The graph of `source` in one precision.

    Raises ExportError if it is not plain ONNX, or if it is for GPUs and one lacks a kernel for it.
    """
    parts = MLP_PARTS if precision == "fp32" else 1
    graph = to_onnx(source.classifier, opset=opset, half=precision == "fp16", mlp_parts=parts)
    if precision == "int8":
        return quantize(graph, source.calibration_images())
    if precision == "int8-dynamic":
        return quantize_by_batch(graph)
    if missing := gaps(graph):
        raise ExportError("no GPU kernel for " + "; ".join(missing))
    return graph


def attention(spec: Architecture) -> Attention:
    """The attention of `spec` as a manifest records it."""
    variant = parse_variant(spec.variant)
    return Attention(
        variant=spec.variant,
        tokens=spec.grid[0] * spec.grid[1],
        kv_tokens=spec.kv_tokens,
        stride=variant.stride,
        block_size=variant.block_size,
        rank=None if variant.kind == "mha" else spec.rank,
    )


def _evaluate(source: ExportSource, dataset: Dataset, engine: Engine, *, batch: int) -> Accuracy:
    """Accuracy of the graph on the full test split."""
    hits, labels = [], []
    for images, label_B in source.batches(dataset.test, ACCURACY_BATCH):
        logits, _ = predict_in_batches(engine, images.numpy(), batch=batch)
        hits.append(torch.from_numpy(logits).topk(min(5, logits.shape[1])).indices == label_B.unsqueeze(1))
        labels.append(label_B)
    hit_N5 = torch.cat(hits).numpy()
    return Accuracy.from_correct(
        hit_N5[:, 0],
        torch.cat(labels).numpy(),
        top5=int(hit_N5.sum()) / len(hit_N5),
        dataset=dataset.name,
        split=dataset.test_split,
    )


def check_accuracy(checkpoint: Accuracy | None, measured: Accuracy, precision: Precision) -> None:
    """Raise ExportError if `measured` loses more than half a point of top-1, or there is nothing to compare with."""
    lost = checkpoint.top1 - measured.top1 if checkpoint else 0
    if checkpoint is None:
        reason = f"the run has no test accuracy to compare {precision} with, which has top-1 {measured.top1:.2%}"
    # Rounded, so that a loss of exactly half a point passes.
    elif round(lost, 6) > MAX_ACCURACY_LOSS:
        reason = (
            f"{precision} loses {lost * 100:.2f} points of top-1 ({checkpoint.top1:.2%} to {measured.top1:.2%} of "
            f"{measured.n}), more than {MAX_ACCURACY_LOSS * 100:g}"
        )
    else:
        return
    raise ExportError(f"{reason}: publish it anyway with --accept-accuracy-loss")
