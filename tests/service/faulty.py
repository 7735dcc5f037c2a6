"""Identity models with a fault that one kind of image brings out: every other image gets its right answer."""

import io
from typing import Any, Literal

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from tests.service.identity import CLASSES, SIDE

Fault = Literal["nan", "fewer rows", "exception", "hang", "memory"]

MEMORY_BYTES = 600 * 1024 * 1024
"""What a model with the fault `memory` allocates for a guilty image."""


def guilty_pixels(number: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """As `identity.picture`, and with the colour in its last pixel that brings the fault out."""
    pixels = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    pixels[0, 0] = number & 255, number >> 8 & 255, number >> 16 & 255
    pixels[-1, -1, -1] = 255
    return pixels


def guilty_picture(number: int) -> bytes:
    """`guilty_pixels` as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(guilty_pixels(number)).save(buffer, "PNG")
    return buffer.getvalue()


def faulty_graph(fault: Fault) -> bytes:
    """logits = the pixels as they came, flattened, unless an image of the batch is guilty."""
    node = helper.make_node
    nodes = [
        node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        node("Flatten", ["float"], ["flat"]),
        node("Gather", ["flat", "last"], ["mark"], axis=1),  # (n, 1)
        node("Equal", ["mark", "guilty_mark"], ["guilty"]),  # (n, 1)
        node("Cast", ["guilty"], ["guilty_int"], to=TensorProto.INT64),
        node("ReduceMax", ["guilty_int"], ["any"], keepdims=0),  # 1 if any is guilty
    ]
    values: dict[str, np.ndarray[Any, Any]] = {
        "last": np.array([CLASSES - 1], np.int64),
        "guilty_mark": np.array(255, np.float32),
        "nan": np.array(np.nan, np.float32),
        "all": np.array([-1], np.int64),
        "one": np.array([1], np.int64),
        "many": np.array(1_000_000 if fault == "exception" else 10**15, np.int64),
        "floats": np.array([MEMORY_BYTES // 4], np.int64),
        "true": np.array(True),
        "zero": np.array(0, np.float32),
    }
    if fault == "nan":
        nodes.append(node("Where", ["guilty", "nan", "flat"], ["logits"]))
    elif fault == "fewer rows":
        nodes.append(node("Not", ["guilty"], ["good"]))
        nodes.append(node("Reshape", ["good", "all"], ["kept"]))
        nodes.append(node("Compress", ["flat", "kept"], ["logits"], axis=0))
    elif fault == "exception":
        nodes.append(node("Mul", ["any", "many"], ["index"]))
        nodes.append(node("Gather", ["flat", "index"], ["nothing"], axis=0))  # out of range
        nodes.append(node("Mul", ["nothing", "zero"], ["no"]))
        nodes.append(node("Add", ["flat", "no"], ["logits"]))
    elif fault == "hang":
        body = helper.make_graph(
            [node("Identity", ["go"], ["go_on"]), node("Add", ["x", "step"], ["y"])],
            "body",
            [
                helper.make_tensor_value_info("turn", TensorProto.INT64, []),
                helper.make_tensor_value_info("go", TensorProto.BOOL, []),
                helper.make_tensor_value_info("x", TensorProto.FLOAT, []),
            ],
            [
                helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
                helper.make_tensor_value_info("y", TensorProto.FLOAT, []),
            ],
            [numpy_helper.from_array(np.array(0, np.float32), "step")],
        )
        nodes.append(node("Mul", ["any", "many"], ["turns"]))
        nodes.append(node("Loop", ["turns", "true", "zero"], ["nothing"], body=body))
        nodes.append(node("Add", ["flat", "nothing"], ["logits"]))
    else:
        nodes.append(node("Mul", ["any", "floats"], ["count"]))
        nodes.append(node("Add", ["count", "one"], ["shape"]))
        nodes.append(node("ConstantOfShape", ["shape"], ["large"]))
        nodes.append(node("ReduceSum", ["large"], ["nothing"], keepdims=0))
        nodes.append(node("Add", ["flat", "nothing"], ["logits"]))
    nodes.append(node("Softmax", ["logits"], ["probabilities"], axis=1))
    used = {name for one in nodes for name in one.input}
    graph = helper.make_graph(
        nodes,
        fault,
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("logits", "probabilities")],
        [numpy_helper.from_array(value, name) for name, value in values.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())
