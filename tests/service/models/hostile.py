"""Bundles with right digests that cannot be served, and the process that finds that out."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
from onnx import NodeProto, TensorProto, helper, numpy_helper

from service.bundle import GOLDEN_FILE, MODEL_FILE, read_bundle
from tests.service.conftest import resum
from tests.service.identity import CLASSES, SIDE, publish_identity


def publish_endless(repository: Path, name: str = "identity-a") -> Path:
    """Publish a version whose graph loops for ever when it is run."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["on_out"]), helper.make_node("Add", ["v", "v"], ["v_out"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, ["batch", CLASSES]),
        ],
        [
            helper.make_tensor_value_info("on_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v_out", TensorProto.FLOAT, ["batch", CLASSES]),
        ],
    )
    loop = helper.make_node("Loop", ["rounds", "true", "flat"], ["logits"], body=body)
    return _publish(repository, name, [loop], {"rounds": np.int64(2**62), "true": np.bool_(True)})


def publish_greedy(repository: Path, name: str = "identity-a", *, mebibytes: int) -> Path:
    """Publish a version whose graph takes so much memory when it is loaded or run."""
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["large"]),
        helper.make_node("ReduceSum", ["large"], ["nothing"], keepdims=0),
        helper.make_node("Add", ["flat", "nothing"], ["logits"]),
    ]
    return _publish(repository, name, nodes, {"shape": np.array([mebibytes, 1 << 18], np.int64)})


def publish_wrong(repository: Path, name: str = "identity-a", *, work: int = 0) -> Path:
    """Publish a version that does not give its golden outputs."""
    folder = publish_identity(_beside(repository), name, work=work)
    golden = read_bundle(folder).golden()
    arrays = {f"image_{number}": np.frombuffer(image, np.uint8) for number, image in enumerate(golden.images)}
    np.savez(
        folder / GOLDEN_FILE, allow_pickle=False, logits=golden.logits + 1, probabilities=golden.probabilities, **arrays
    )
    resum(folder)
    return _moved(folder, repository / name)


def trials() -> list[psutil.Process]:
    """The processes that prove bundles for this one."""
    return trials_of(psutil.Process())


def trials_of(process: psutil.Process) -> list[psutil.Process]:
    """The processes that prove bundles for another one."""
    found = []
    for child in process.children():
        try:
            if "service.models.trial" in child.cmdline():
                found.append(child)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def _publish(
    repository: Path, name: str, nodes: Sequence[NodeProto], constants: dict[str, np.generic | np.ndarray]
) -> Path:
    flat = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["flat"]),
    ]
    graph = helper.make_graph(
        [*flat, *nodes, helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1)],
        "hostile",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])],
        [
            helper.make_tensor_value_info(out, TensorProto.FLOAT, ["batch", CLASSES])
            for out in ("logits", "probabilities")
        ],
        [numpy_helper.from_array(np.asarray(value), constant) for constant, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    folder = publish_identity(_beside(repository), name)
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())
    resum(folder)
    return _moved(folder, repository / name)


def _beside(repository: Path) -> Path:
    """A folder of its own on the same file system."""
    return Path(tempfile.mkdtemp(dir=repository.parent))


def _moved(folder: Path, model: Path) -> Path:
    """The bundle as the next version of `model`. It appears atomically: a service may scan at any time."""
    model.mkdir(parents=True, exist_ok=True)
    newest = max((int(version.name) for version in model.iterdir() if version.name.isdecimal()), default=0)
    return folder.rename(model / str(newest + 1))
