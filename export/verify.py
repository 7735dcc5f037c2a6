"""Check a bundle from its own files: without checkpoint, data set or torch."""

from dataclasses import dataclass
from pathlib import Path

import onnx

from export.graph import ExportError, check_standard, op_types
from export.kernels import gaps
from service.bundle import LABELS_FILE, MANIFEST_FILE, MODEL_FILE, Bundle, read_bundle
from service.engine import Engine
from service.errors import BundleError
from service.host import available_cores
from service.models.verify import verify_golden


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check that passed, and its finding in words."""

    name: str
    found: str


def verify(folder: Path) -> list[Check]:
    """Check digests, manifest, graph, GPU kernels and golden outputs of one bundle, in that order.

    Raises BundleError, ExportError or EngineError naming the file that is wrong.
    """
    try:
        version = int(folder.name)
    except ValueError:
        raise BundleError(f"{folder} is not a bundle: name the folder of a version, such as models/x/1") from None
    bundle = read_bundle(folder)
    checks = [Check(name="digests", found=f"all files of {bundle.manifest.name}, version {version}")]
    checks.append(Check(name="labels", found=f"{len(bundle.labels)} in {LABELS_FILE}"))
    graph = read_graph(bundle)
    checks.append(Check(name="operators", found=_check_operators(bundle, graph)))
    checks.append(Check(name="shapes", found=_check_shapes(bundle, graph)))
    checks.append(Check(name="kernels", found=_check_kernels(bundle, graph)))
    verify_golden(bundle, Engine(bundle.model_path, threads=available_cores()))
    count = len(bundle.golden().images)
    checks.append(Check(name="golden", found=f"{count} images give the recorded outputs on this machine"))
    return checks


def read_graph(bundle: Bundle) -> onnx.ModelProto:
    """The graph of a bundle. Raises ExportError if it is not plain ONNX, BundleError if it cannot be read."""
    path = bundle.model_path
    try:
        graph = onnx.load(path, load_external_data=False)
        check_standard(graph)
    except ExportError as error:
        raise ExportError(f"{path}: {error}") from error
    except Exception as error:  # onnx raises classes of protobuf and of its own, which share only Exception.
        raise BundleError(f"{path}: not a valid ONNX file ({error})") from error
    return graph


def _check_operators(bundle: Bundle, graph: onnx.ModelProto) -> str:
    manifest = bundle.manifest
    found = op_types(graph)
    if found != manifest.op_types:
        wrong = sorted(name for name in found | manifest.op_types if found.get(name) != manifest.op_types.get(name))
        raise BundleError(f"{bundle.folder / MANIFEST_FILE}: counts of {', '.join(wrong)} differ from {MODEL_FILE}")
    opset = next(entry.version for entry in graph.opset_import)
    if opset != manifest.opset:
        raise BundleError(f"{bundle.folder / MANIFEST_FILE}: says opset {manifest.opset}, but {MODEL_FILE} has {opset}")
    return f"{sum(found.values())} nodes of {len(found)} types, all ai.onnx opset {opset}"


def _check_kernels(bundle: Bundle, graph: onnx.ModelProto) -> str:
    if bundle.manifest.devices == ("cpu",):
        return "not checked: this bundle is for the CPU"
    if missing := gaps(graph):
        raise ExportError(f"{bundle.model_path}: no GPU kernel for {'; '.join(missing)}")
    return "CUDA and TensorRT have one for every node, according to their documentation"


def _check_shapes(bundle: Bundle, graph: onnx.ModelProto) -> str:
    manifest = bundle.manifest
    declared = {tensor.name: tensor.shape for tensor in (manifest.input, *manifest.outputs)}
    found = {
        value.name: tuple(-1 if dim.dim_param else dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.graph.input, *graph.graph.output)
    }
    if found != declared:
        raise BundleError(f"{bundle.folder / MANIFEST_FILE}: declares {declared}, but {MODEL_FILE} has {found}")
    return ", ".join(f"{name} {list(shape)}" for name, shape in found.items())
