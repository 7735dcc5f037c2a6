"""A trained classifier as one plain ONNX graph: standard operators, dynamic batch, no trace of where it was made."""

from collections import Counter
from typing import cast

import onnx
import torch
from torch import Tensor, nn

from service.engine import INPUT, OUTPUTS
from training.models import Classifier

OPSET = 23
"""The first opset with a standard `Attention` operator, which needs less memory than its parts."""


class ExportError(Exception):
    """The model cannot be exported; the message says which rule it breaks."""


class _Served(nn.Module):
    """What is served: uint8 images (B,H,W,3) -> logits and probabilities, float32 (B, classes)."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.classifier(image)
        return logits, logits.softmax(dim=-1)


def to_onnx(classifier: Classifier, *, image_size: int) -> onnx.ModelProto:
    """The graph of `classifier`, checked and stripped. Raises ExportError."""
    example = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)
    program = torch.onnx.export(
        _Served(classifier).eval(),
        (example,),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=list(OUTPUTS),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        optimize=True,
    )
    if program is None:
        raise ExportError("torch.onnx.export gave no program")
    model = program.model_proto
    _strip(model)
    check_standard(model)
    return model


def op_types(model: onnx.ModelProto) -> dict[str, int]:
    """Operator histogram, by name."""
    return dict(sorted(Counter(node.op_type for node in model.graph.node).items()))


def serialise(model: onnx.ModelProto) -> bytes:
    """Bytes that depend on the model alone."""
    return cast(bytes, model.SerializeToString(deterministic=True))


def check_standard(model: onnx.ModelProto) -> None:
    """Raise ExportError unless the graph is plain: standard domain, no functions, valid, agreed names and shapes."""
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in model.graph.node if node.domain})
    domains = sorted({entry.domain for entry in model.opset_import if entry.domain})
    if foreign or domains or model.functions:
        raise ExportError(
            f"the graph is not plain ONNX: operators {foreign}, domains {domains}, {len(model.functions)} functions"
        )
    onnx.checker.check_model(model, full_check=True)
    inputs = [value.name for value in model.graph.input]
    outputs = tuple(value.name for value in model.graph.output)
    if inputs != [INPUT] or outputs != OUTPUTS:
        raise ExportError(f"the graph has inputs {inputs} and outputs {outputs}")
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise ExportError(f"the batch of {value.name!r} is not dynamic")


def _strip(model: onnx.ModelProto) -> None:
    """Remove all that tells where and how the graph was made: stack traces, source paths, names of scopes."""
    model.doc_string = ""
    model.producer_name, model.producer_version = "stridevit", ""
    del model.metadata_props[:]
    graph = model.graph
    graph.name, graph.doc_string = "stridevit", ""
    del graph.metadata_props[:]
    # Inner shapes are for readers only, and stale ones break tools that edit the graph.
    del graph.value_info[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*graph.input, *graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
