"""Check a bundle from its own files: without checkpoint, data set or torch."""

from pathlib import Path

import onnx

from export.graph import ExportError, check_standard, manifest_fields
from export.kernels import gaps
from service.bundle import LABELS_FILE, MANIFEST_FILE, MODEL_FILE, Bundle, is_version, read_bundle
from service.engine import Engine
from service.errors import BundleError
from service.host import available_cores
from service.models.verify import verify_golden


def verify(folder: Path) -> dict[str, str]:
    """Check digests, labels, graph, GPU kernels and golden outputs of one bundle; returns the finding of each check.

    Raises BundleError, ExportError or EngineError naming the file that is wrong.
    """
    if not is_version(folder.name):
        raise BundleError(f"{folder} is not a bundle: name the folder of a version, such as models/x/1")
    bundle = read_bundle(folder)
    graph = read_graph(bundle)
    _check_manifest(bundle, graph)
    verify_golden(bundle, Engine(bundle.model_path, threads=available_cores()))
    manifest = bundle.manifest
    return {
        "digests": f"all files of {manifest.name}, version {bundle.version}",
        "labels": f"{len(bundle.labels)} in {LABELS_FILE}",
        "operators": f"{len(graph.graph.node)} nodes of {len(manifest.op_types)} types, ai.onnx opset {manifest.opset}",
        "shapes": ", ".join(f"{tensor.name} {list(tensor.shape)}" for tensor in (manifest.input, *manifest.outputs)),
        "kernels": _check_kernels(bundle, graph),
        "golden": f"{len(bundle.golden().images)} images give the recorded outputs on this machine",
    }


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


def _check_manifest(bundle: Bundle, graph: onnx.ModelProto) -> None:
    for name, found in manifest_fields(graph).items():
        stated = getattr(bundle.manifest, name)
        if stated != found:
            path = bundle.folder / MANIFEST_FILE
            raise BundleError(f"{path}: states {name} {stated!r}, but {MODEL_FILE} has {found!r}")


def _check_kernels(bundle: Bundle, graph: onnx.ModelProto) -> str:
    if bundle.manifest.devices == ("cpu",):
        return "not checked: this bundle is for the CPU"
    if bundle.manifest.attention is None:
        return "not checked: no graph of ours; ONNX Runtime checks it when it is loaded on a GPU"
    if missing := gaps(graph):
        raise ExportError(f"{bundle.model_path}: no GPU kernel for {'; '.join(missing)}")
    return "CUDA and TensorRT have one for every node, according to their documentation"
