"""From a source to a published bundle."""

import re
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import onnx

from export.graph import OPSET, ExportError, manifest_fields, serialise
from export.kernels import gaps
from export.parity import check_parity, predict_in_batches
from export.precision import MAX_ACCURACY_LOSS, TOLERANCES
from export.proof_images import draw_golden, parity_images
from export.quantize import CALIBRATION_BATCH, quantize, quantize_by_batch
from export.sources import EVALUATION_BATCH, ExportSource, measure_accuracy
from service.bundle import GOLDEN_FILE, publish, read_bundle, versions
from service.engine import Engine
from service.errors import BundleError
from service.host import available_cores
from service.manifest import NAME_PATTERN, Accuracy, Attention, Manifest, Precision, Source
from service.models.verify import check_golden


def export(
    source: ExportSource,
    repository: Path,
    *,
    family: str | None = None,
    name: str | None = None,
    precision: Precision = "fp32",
    opset: int = OPSET,
    accept_accuracy_loss: bool = False,
) -> Path:
    """Publish `source` as the next version of `<family>-<name>[-<precision>]` and return the bundle's folder.

    Precisions other than fp32 are evaluated on the full test split. Raises ExportError if the outputs differ from
    those of the original, if more than half a point of top-1 is lost and that is not accepted, if the graph is not
    plain ONNX, or if the name is that of a model of another architecture.
    """
    family = family or source.family
    full_name = f"{family}-{name or source.model}" + ("" if precision == "fp32" else f"-{precision}")
    for text in (family, full_name):
        if not re.fullmatch(NAME_PATTERN, text):
            raise ExportError(
                f"{text!r} cannot be a name: use lower-case letters, digits and single - _ . between them"
            )
    check_name(repository, full_name, source)
    tolerances = TOLERANCES[precision]
    graph = make_graph(source, precision, opset=opset)
    limits = [limit for limit in (source.max_batch, tolerances.max_batch) if limit]
    tolerances = replace(tolerances, max_batch=min(limits, default=None))
    serialised = serialise(graph)
    engine = Engine(serialised, threads=available_cores())
    parity = check_parity(source.predict, engine, parity_images(source), tolerances)
    accuracy = source.accuracy
    if precision != "fp32" and source.dataset:
        batch = tolerances.max_batch or EVALUATION_BATCH
        accuracy = measure_accuracy(source, source.dataset, partial(predict_in_batches, engine, batch=batch))
        if not accept_accuracy_loss:
            check_accuracy(source.accuracy, accuracy, precision)
    manifest = Manifest(
        name=full_name,
        family=family,
        architecture=source.architecture,
        attention=source.attention,
        params=source.params,
        macs=source.macs,
        precision=precision,
        max_batch=tolerances.max_batch,
        **manifest_fields(graph),
        preprocessing=source.preprocessing,
        random_weights=source.random,
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
    predict = source.predict if precision == "fp32" else engine.run
    golden = draw_golden(predict, source.preprocessing, tolerances.golden)
    check_golden(golden, manifest, engine, path=Path(GOLDEN_FILE))
    return publish(repository, manifest, model=serialised, labels=source.labels, golden=golden)


def check_name(repository: Path, name: str, source: ExportSource) -> None:
    """Raise ExportError if the newest readable version of `name` is a model of another architecture."""
    for number in reversed(versions(repository, name)):
        try:
            there = read_bundle(repository / name / str(number)).manifest
        except BundleError:
            continue
        side = there.preprocessing.crop
        found = (there.architecture, there.attention, side)
        same = found[1:] == (source.attention, source.preprocessing.crop)
        # Another exporter's graph has only its file's name as its architecture: its number of parameters says more.
        known = source.architecture == there.architecture if source.attention else source.params == there.params
        if same and known:
            return
        raise ExportError(
            f"{name} in {repository} is {_described(*found)}, not "
            f"{_described(source.architecture, source.attention, source.preprocessing.crop)}: choose another name for "
            "this one with --name"
        )


def _described(architecture: str, attention: Attention | None, side: int) -> str:
    kind = f" with {attention.variant}" + (f" of rank {attention.rank}" if attention.rank else "") if attention else ""
    return f"{architecture}{kind} at {side} px"


def make_graph(source: ExportSource, precision: Precision, *, opset: int = OPSET) -> onnx.ModelProto:
    """The graph of `source` in one precision.

    Raises ExportError if it is not plain ONNX, or if it is a Vision Transformer of ours for which a GPU lacks a kernel.
    """
    graph = source.graph(precision, opset=opset)
    if precision in ("int8", "int8-dynamic"):
        if precision == "int8" and not (source.dataset or source.random):
            raise ExportError("int8 needs images to calibrate with: name a data set with --data")
        if precision == "int8-dynamic":
            return quantize_by_batch(graph)
        batch, conv = source.max_batch or CALIBRATION_BATCH, source.attention is None
        return quantize(graph, source.calibration_images(), batch=batch, conv=conv)
    # A graph of another exporter is checked by ONNX Runtime itself, when it is loaded on a GPU.
    if source.attention and (missing := gaps(graph)):
        raise ExportError("no GPU kernel for " + "; ".join(missing))
    return graph


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
