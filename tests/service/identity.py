"""Bundles whose answer to an image is the image itself, so that an answer to another image is noticed."""

import io
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from service.bundle import Golden, publish
from service.engine import OUTPUTS, Engine
from service.manifest import Accuracy, Manifest, Parity, Preprocessing, Source, Tensor, Tolerance

SIDE = 2
CLASSES = SIDE * SIDE * 3
LABELS = tuple(f"class {index}" for index in range(CLASSES))
_WIDTH = 512


def picture(number: int) -> bytes:
    """A PNG that carries a number below 2**24."""
    pixels = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    pixels[0, 0] = number & 255, number >> 8 & 255, number >> 16 & 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def number_in(logits: npt.NDArray[np.float32]) -> int:
    """What `picture` put into an image, read from the answer to it."""
    low, middle, high = (int(value) for value in logits[:3])
    return low | middle << 8 | high << 16


def identity_graph(work: int = 0) -> bytes:
    """logits = the pixels as they came, flattened; `work` products of 512 × 512 take time and add nothing."""
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["flat"]),
    ]
    weights = {
        "into": np.full((CLASSES, _WIDTH), 1e-3, np.float32),
        "square": np.full((_WIDTH, _WIDTH), 1e-3, np.float32),
        "out": np.zeros((_WIDTH, CLASSES), np.float32),
    }
    if work:
        nodes.append(helper.make_node("MatMul", ["flat", "into"], ["h0"]))
        nodes += [helper.make_node("MatMul", [f"h{step}", "square"], [f"h{step + 1}"]) for step in range(work)]
        nodes.append(helper.make_node("MatMul", [f"h{work}", "out"], ["nothing"]))
        nodes.append(helper.make_node("Add", ["flat", "nothing"], ["logits"]))
    else:
        nodes.append(helper.make_node("Identity", ["flat"], ["logits"]))
    nodes.append(helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1))
    graph = helper.make_graph(
        nodes,
        "identity",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", CLASSES])
            for name in ("logits", "probabilities")
        ],
        [numpy_helper.from_array(array, name) for name, array in weights.items() if work],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def publish_identity(
    repository: Path,
    name: str = "identity-a",
    *,
    top1: float | None = 0.5,
    work: int = 0,
    family: str = "identity",
    labels: tuple[str, ...] = LABELS,
    graph: bytes | None = None,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
) -> Path:
    """Publish one more version of an identity model; None as `top1` stands for random weights.

    `graph`: another one, which gives the same outputs for the golden pictures.
    """
    model = identity_graph(work) if graph is None else graph
    images = tuple(picture(number) for number in (1, 70_000))
    engine = Engine(model)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image))) for image in images])
    logits, probabilities = engine.run(pixels)
    manifest = Manifest(
        name=name,
        family=family,
        architecture="identity",
        params=1,
        precision="fp32",
        opset=18,
        op_types={"Identity": 1},
        preprocessing=Preprocessing(resize=SIDE, crop=SIDE, interpolation=interpolation, mean=(0, 0, 0), std=(1, 1, 1)),
        input=Tensor(name="image", datatype="UINT8", shape=(-1, SIDE, SIDE, 3)),
        outputs=tuple(Tensor(name=name, datatype="FP32", shape=(-1, CLASSES)) for name in OUTPUTS),
        num_classes=CLASSES,
        random_weights=top1 is None,
        accuracy=None if top1 is None else Accuracy(dataset="none", split="test", n=1, top1=top1, top5=top1),
        parity=Parity(
            images=1,
            batch_sizes=(1,),
            max_abs_logit=0,
            max_abs_probability=0,
            max_abs_by_batch=0,
            top1_flips=0,
        ),
        tolerance=Tolerance(max_abs_logit=1e-3, max_abs_probability=1e-4),
        devices=("cpu",),
        source=Source(checkpoint_sha256="0" * 64, git_commit=None, exporter={}),
    )
    golden = Golden(images=images, logits=logits, probabilities=probabilities)
    return publish(repository, manifest, model=model, labels=labels, golden=golden)
