"""From a finished run, or from random weights, to a published bundle."""

from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch

from export.golden import draw_golden
from export.graph import OPSET, ExportError, op_types, serialise, to_onnx
from export.kernels import gaps
from export.parity import check_parity, run_all
from export.precision import MAX_ACCURACY_LOSS, PROMISES
from export.quantize import quantize, quantize_by_batch
from export.served import MLP_PARTS
from export.subjects import Pixels, Subject
from service.bundle import GOLDEN_FILE, publish
from service.engine import INPUT, OUTPUTS, Engine
from service.host import available_cores
from service.manifest import Accuracy, Attention, Manifest, Precision, Source, Tensor
from service.models.verify import check_golden
from training.describe import count_macs
from training.models import NormalizedModel, count_parameters
from training.variants import parse_variant

ACCURACY_BATCH = 32


def export(
    subject: Subject,
    repository: Path,
    *,
    family: str | None = None,
    precision: Precision = "fp32",
    opset: int = OPSET,
    accept_accuracy_loss: bool = False,
) -> Path:
    """Publish `subject` as the next version of `<family>-<variant>[-<precision>]` and return the bundle's folder.

    Other precisions than fp32 are evaluated on the full test split. Raises ExportError if the answers do not agree with
    torch's, if more than half a point of top-1 is lost and that is not accepted, or if the graph is not plain.
    """
    spec, classifier = subject.spec, subject.classifier
    side, other = spec.image_shape
    if side != other:
        raise ExportError(f"the model takes images of {other} × {side}: the service prepares square ones only")
    variant, promise = parse_variant(spec.variant), PROMISES[precision]
    graph = make_graph(subject, precision, opset=opset)
    serialised = serialise(graph)
    engine = Engine(serialised, threads=available_cores())
    parity = check_parity(classifier, engine, subject.parity_images(), promise)
    accuracy = subject.accuracy
    if precision != "fp32" and subject.dataset:
        accuracy = _measure(subject, engine, batch=promise.max_batch or ACCURACY_BATCH)
        if not accept_accuracy_loss:
            _check_accuracy(subject.accuracy, accuracy, precision)
    family = family or subject.family
    manifest = Manifest(
        name=f"{family}-{spec.variant}" + ("" if precision == "fp32" else f"-{precision}"),
        family=family,
        architecture=spec.preset,
        attention=Attention(
            variant=spec.variant,
            tokens=spec.grid[0] * spec.grid[1],
            kv_tokens=spec.kv_tokens,
            stride=variant.stride,
            block_size=variant.block_size,
            rank=None if variant.kind == "mha" else spec.rank,
        ),
        params=count_parameters(classifier.model),
        macs=sum(count_macs(spec).values()),
        precision=precision,
        max_batch=promise.max_batch,
        opset=opset,
        op_types=op_types(graph),
        preprocessing=subject.preprocessing,
        input=Tensor(name=INPUT, datatype="UINT8", shape=(-1, side, side, 3)),
        outputs=tuple(Tensor(name=name, datatype="FP32", shape=(-1, spec.num_classes)) for name in OUTPUTS),
        num_classes=spec.num_classes,
        random_weights=subject.weights == "random",
        accuracy=accuracy,
        parity=parity,
        tolerance=promise.golden,
        devices=promise.devices,
        source=Source(
            checkpoint_sha256=subject.weights_sha256,
            git_commit=subject.git_commit,
            exporter={name: version(name) for name in ("torch", "timm", "onnx", "onnxscript", "onnxruntime")},
        ),
    )
    answer = partial(_by_torch, classifier) if precision == "fp32" else engine.run
    golden = draw_golden(answer, subject.preprocessing, promise.golden)
    check_golden(golden, manifest, engine, path=Path(GOLDEN_FILE))
    return publish(repository, manifest, model=serialised, labels=subject.labels, golden=golden)


def make_graph(subject: Subject, precision: Precision, *, opset: int = OPSET) -> onnx.ModelProto:
    """The graph of `subject` in one precision. Raises ExportError if it is not plain, or a GPU lacks a kernel for it.

    int8 is for the CPU, and so is not held against the GPUs' kernels.
    """
    parts = MLP_PARTS if precision == "fp32" else 1
    graph = to_onnx(subject.classifier, opset=opset, half=precision == "fp16", mlp_parts=parts)
    if precision == "int8":
        return quantize(graph, subject.calibration_images())
    if precision == "int8-dynamic":
        return quantize_by_batch(graph)
    if missing := gaps(graph):
        raise ExportError("no GPU kernel for " + "; ".join(missing))
    return graph


def _by_torch(classifier: NormalizedModel, images: Pixels) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    with torch.inference_mode():
        logits = classifier(torch.tensor(images))
    return logits.numpy(), logits.softmax(dim=-1).numpy()


def _measure(subject: Subject, engine: Engine, *, batch: int) -> Accuracy:
    """Accuracy of the graph itself on the full test split."""
    dataset = subject.dataset
    if dataset is None:
        raise ExportError("random weights have no accuracy")
    all_hits, all_labels = [], []
    for images, labels in subject.batches(dataset.test, ACCURACY_BATCH):
        logits, _ = run_all(engine, images.numpy(), batch=batch)
        all_hits.append(torch.from_numpy(logits).topk(min(5, logits.shape[1])).indices == labels.unsqueeze(1))
        all_labels.append(labels)
    hits = torch.cat(all_hits)
    return Accuracy.from_correct(
        hits[:, 0].numpy(),
        torch.cat(all_labels).numpy(),
        top5=int(hits.sum()) / len(hits),
        dataset=dataset.name,
        split=dataset.test_split,
    )


def _check_accuracy(checkpoint: Accuracy | None, measured: Accuracy, precision: Precision) -> None:
    if checkpoint is None:
        raise ExportError(
            f"the run has no test accuracy to compare {precision} with, which has top-1 {measured.top1:.2%}: "
            "publish it anyway with --accept-accuracy-loss"
        )
    lost = checkpoint.top1 - measured.top1
    # Rounded, so that half a point is half a point.
    if round(lost, 6) > MAX_ACCURACY_LOSS:
        raise ExportError(
            f"{precision} loses {lost * 100:.2f} points of top-1 ({checkpoint.top1:.2%} to {measured.top1:.2%} of "
            f"{measured.n}), more than {MAX_ACCURACY_LOSS * 100:g}: publish it anyway with --accept-accuracy-loss"
        )
