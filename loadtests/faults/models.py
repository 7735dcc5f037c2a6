"""The models that the faults are tried on: each answers with the colour of the image, some fail for a guilty one.

A graph has one input `image`, uint8 [batch, SIDE, SIDE, 3]. `logits` are the three bytes of the first pixel, and 0;
`probabilities` are the bytes divided by `SCALE`, and the rest to 1. The nodes that make a guilty image fail add zeros
for every other one.
"""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from loadtests.faults.numbers import GUILTY, LABELS, SCALE, SIDE, picture
from service.bundle import Golden, publish
from service.manifest import Manifest, Parity, Preprocessing, Source, Tensor, Tolerance

Kind = Literal[
    "numbered",
    "numbered-other",
    "numbered-large",
    "numbered-raises",
    "numbered-hangs",
    "numbered-nan",
    "numbered-short",
]
"""Names of the models.

For a guilty image, the first three answer; with the others the engine fails, computes for weeks, gives NaN, or gives a
row less. The large one has the size and the cost of ViT-S/16 at 224 pixels.
"""

_OPSET, _IR_VERSION = 18, 10
_GOLDEN = (1, 70_000)
_TOKENS, _WIDTH, _BLOCKS = 196, 384, 12
"""Sizes of ViT-S/16."""
_WEEKS = 10**14
"""Iterations of a loop that does not end while anyone waits."""


def make_models(repository: Path) -> None:
    """Publish version 1 of all models in a folder that holds nothing else afterwards."""
    shutil.rmtree(repository, ignore_errors=True)
    for kind in get_args(Kind):
        # The large one is published only where it is used.
        if kind != "numbered-large":
            publish_numbered(repository, kind)


def publish_numbered(repository: Path, kind: Kind) -> Path:
    """Publish the next version of a model; returns its folder."""
    model = make_graph(kind)
    shape = (-1, SIDE, SIDE, 3)
    manifest = Manifest(
        name=kind,
        family=kind,
        architecture="the colour of the image",
        params=1,
        precision="fp32",
        opset=_OPSET,
        op_types=dict(Counter(node.op_type for node in model.graph.node)),
        preprocessing=Preprocessing(resize=SIDE, crop=SIDE, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1)),
        input=Tensor(name="image", datatype="UINT8", shape=shape),
        outputs=tuple(Tensor(name=name, datatype="FP32", shape=(-1, len(LABELS))) for name in _OUTPUTS),
        num_classes=len(LABELS),
        random_weights=True,
        accuracy=None,
        parity=Parity(
            images=1, batch_sizes=(1,), max_abs_logit=0, max_abs_probability=0, max_abs_by_batch=0, top1_flips=0
        ),
        tolerance=Tolerance(max_abs_logit=1e-3, max_abs_probability=1e-6),
        devices=("cpu",),
        source=Source(checkpoint_sha256="0" * 64, git_commit=None, exporter={}),
    )
    logits, probabilities = expected_outputs(np.array(_GOLDEN))
    golden = Golden(images=tuple(map(picture, _GOLDEN)), logits=logits, probabilities=probabilities)
    return publish(repository, manifest, model=model.SerializeToString(), labels=LABELS, golden=golden)


def expected_outputs(numbers: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Logits and probabilities of the pictures of innocent numbers, (n, 4)."""
    colours = np.stack([numbers >> 8 * place & 255 for place in range(3)], axis=1).astype(np.float32)
    rest = 1 - colours.sum(axis=1, keepdims=True) / SCALE
    logits = np.concatenate([colours, np.zeros_like(rest)], axis=1)
    return logits, np.concatenate([colours / SCALE, rest], axis=1).astype(np.float32)


_OUTPUTS = ("logits", "probabilities")
_FLOAT, _INT64, _BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def make_graph(kind: Kind) -> ModelProto:
    """The graph of a model."""
    node = helper.make_node
    nodes = [
        node("Slice", ["image", "from", "to", "sides"], ["pixel"]),
        node("Cast", ["pixel"], ["pixel_float"], to=_FLOAT),
        node("Flatten", ["pixel_float"], ["colour"]),  # (batch, 3)
        node("Slice", ["colour", "two", "three", "one"], ["blue"]),  # (batch, 1)
        node("GreaterOrEqual", ["blue", "guilty_blue"], ["guilty"]),
        *_fault_of(kind),  # -> extra, broadcast to (batch, 1)
        node("Add", ["colour", "extra"], ["honest"]),
        node("Mul", ["blue", "zero"], ["nothing"]),
        node("Concat", ["honest", "nothing"], ["all_logits"], axis=1),
        node("Div", ["honest", "scale"], ["parts"]),
        node("ReduceSum", ["parts", "one"], ["sum"], keepdims=1),
        node("Sub", ["whole", "sum"], ["rest"]),
        node("Concat", ["parts", "rest"], ["all_probabilities"], axis=1),
    ]
    if kind == "numbered-short":
        # Rows of guilty images are left out.
        nodes += [node("Not", ["guilty"], ["innocent"]), node("Reshape", ["innocent", "flat"], ["kept"])]
        nodes += [node("Compress", [f"all_{name}", "kept"], [name], axis=0) for name in _OUTPUTS]
    else:
        nodes += [node("Identity", [f"all_{name}"], [name]) for name in _OUTPUTS]
    constants: dict[str, npt.NDArray[Any] | np.float32] = {
        "from": np.array([0, 0]),
        "to": np.array([1, 1]),
        "sides": np.array([1, 2]),
        "one": np.array([1]),
        "two": np.array([2]),
        "three": np.array([3]),
        "flat": np.array([-1]),
        "guilty_blue": np.float32(GUILTY >> 16),
        "zero": np.float32(0),
        "whole": np.float32(1),
        "scale": np.float32(SCALE),
        "nan": np.float32(np.nan),
        "table": np.zeros(1, np.float32),
        "weeks": np.array(_WEEKS),
        "go_on": np.array(True),
        "tokens": np.array([1, _TOKENS, _WIDTH]),
        "all_but_batch": np.array([1, 2]),
    }
    if kind == "numbered-large":
        constants |= _large_weights()
    used = {name for each in nodes for name in each.input}
    graph = helper.make_graph(
        nodes,
        kind,
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info(name, _FLOAT, ["batch", len(LABELS)]) for name in _OUTPUTS],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in used],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)


def _fault_of(kind: Kind) -> list[NodeProto]:
    """Nodes that give `extra`: 0 for an innocent batch."""
    node = helper.make_node
    if kind == "numbered-raises":
        # The index 1 is beyond the end of a table of one zero.
        return [node("Cast", ["guilty"], ["place"], to=_INT64), node("Gather", ["table", "place"], ["extra"])]
    if kind == "numbered-nan":
        return [node("Where", ["guilty", "nan", "zero"], ["extra"])]
    if kind == "numbered-hangs":
        return [
            node("Cast", ["guilty"], ["guilty_int"], to=_INT64),
            node("ReduceMax", ["guilty_int"], ["any_guilty"], keepdims=0),
            node("Mul", ["any_guilty", "weeks"], ["trips"]),
            node("Loop", ["trips", "go_on", "zero"], ["extra"], body=_loop_body()),
        ]
    if kind == "numbered-large":
        return _large_stack()
    return [node("Identity", ["zero"], ["extra"])]


def _large_stack() -> list[NodeProto]:
    """The matrix products of ViT-S/16, on zeros for every image."""
    node = helper.make_node
    nodes = [
        node("Mul", ["blue", "zero"], ["zeros"]),  # (batch, 1)
        node("Unsqueeze", ["zeros", "one"], ["zeros_3d"]),
        node("Expand", ["zeros_3d", "tokens"], ["x0"]),  # (batch, _TOKENS, _WIDTH)
    ]
    for block in range(_BLOCKS):
        names = [f"x{block}", *(f"{part}_{block}" for part in ("mixed", "joined", "upped")), f"x{block + 1}"]
        weights = [f"{part}{block}" for part in ("mix", "join", "up", "down")]
        nodes += [
            node("MatMul", [given, weight], [found])
            for given, weight, found in zip(names, weights, names[1:], strict=False)
        ]
    nodes.append(node("ReduceSum", [f"x{_BLOCKS}", "all_but_batch"], ["sums"], keepdims=0))
    return [*nodes, node("Unsqueeze", ["sums", "one"], ["extra"])]


def _large_weights() -> dict[str, npt.NDArray[np.float32]]:
    shapes = {"mix": (1, 2), "join": (2, 1), "up": (1, 4), "down": (4, 1)}
    return {
        f"{part}{block}": np.full((rows * _WIDTH, columns * _WIDTH), 1e-3, np.float32)
        for part, (rows, columns) in shapes.items()
        for block in range(_BLOCKS)
    }


def _loop_body() -> GraphProto:
    """Adds 0 to the state."""
    info = helper.make_tensor_value_info
    return helper.make_graph(
        [
            helper.make_node("Identity", ["condition"], ["condition_after"]),
            helper.make_node("Add", ["state", "none"], ["state_after"]),
        ],
        "again",
        [info("trip", _INT64, []), info("condition", _BOOL, []), info("state", _FLOAT, [])],
        [info("condition_after", _BOOL, []), info("state_after", _FLOAT, [])],
        [numpy_helper.from_array(np.asarray(np.float32(0)), "none")],
    )
