"""A trained classifier as one plain ONNX graph: standard operators, dynamic batch, no metadata of its origin."""

from collections import Counter
from typing import Any, cast

import onnx
import torch
from torch import Tensor, nn

from export.inference_model import MLP_PARTS, InferenceModel
from service import manifest
from service.engine import INPUT, OUTPUTS
from training.models import NormalizedModel, StrideViT

OPSET = 23
"""The first opset with a standard `Attention` operator, which takes less memory than its decomposition."""
OPSETS = range(18, OPSET + 1)
"""Older opsets lack operators that every variant needs; ONNX Runtime's CUDA kernels do not cover newer ones."""
AVOIDED = frozenset({"Shape", "Size", "NonZero"})
"""Operators on shapes, which runtimes compute on the CPU, in between nodes that run on a GPU."""


class ExportError(Exception):
    """The model cannot be exported; the message names the rule that it breaks."""


class _Unshaped(nn.Module):
    """The model as torch's exporter writes it without our rewriting, for comparison."""

    def __init__(self, classifier: NormalizedModel) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.classifier(image)
        return logits, logits.softmax(dim=-1)


def to_onnx(
    model: NormalizedModel,
    *,
    opset: int = OPSET,
    half: bool = False,
    mlp_parts: int = MLP_PARTS,
    shaped: bool = True,
    side: int | None = None,
) -> onnx.ModelProto:
    """The graph of `model`, checked and stripped: uint8 images in, float32 logits and probabilities out.

    With `half` it computes in float16; `mlp_parts` splits the MLP. `shaped=False` skips our rewriting, for comparison
    and for models other than a StrideViT, whose images have `side` pixels. Raises ExportError.
    """
    if opset not in OPSETS:
        raise ExportError(f"opset {opset} cannot be exported: choose one from {OPSETS[0]} to {OPSETS[-1]}")
    trained = model.model
    module: nn.Module = _Unshaped(model)
    if shaped:
        if not isinstance(trained, StrideViT):
            raise ExportError(f"this is a {type(trained).__name__}, not a StrideViT")
        module = InferenceModel(model, operator=opset >= OPSET, half=half, mlp_parts=mlp_parts)
    shape = trained.spec.image_shape if isinstance(trained, StrideViT) else (side or 0, side or 0)
    example = torch.zeros(2, *shape, 3, dtype=torch.uint8)
    program = torch.onnx.export(
        module.eval(),
        (example,),
        dynamo=True,
        verbose=False,
        opset_version=opset,
        input_names=[INPUT],
        output_names=list(OUTPUTS),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        optimize=True,
    )
    if program is None:
        raise ExportError("torch.onnx.export gave no program")
    graph = plain(program.model_proto)
    if shaped and (found := AVOIDED & op_types(graph).keys()):
        raise ExportError(f"the graph computes on shapes: {', '.join(sorted(found))}")
    return graph


def plain(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Strip `graph` of metadata and check it. Raises ExportError if the rest is not plain ONNX."""
    _strip(graph)
    check_standard(graph)
    return graph


def op_types(model: onnx.ModelProto) -> dict[str, int]:
    """Operator histogram, by name."""
    return dict(sorted(Counter(node.op_type for node in model.graph.node).items()))


def manifest_fields(model: onnx.ModelProto) -> dict[str, Any]:
    """The fields of a manifest that follow from the graph."""
    _, num_classes = _tensor(model.graph.output[0]).shape
    return {
        "opset": model.opset_import[0].version,
        "op_types": op_types(model),
        "input": _tensor(model.graph.input[0]),
        "outputs": tuple(map(_tensor, model.graph.output)),
        "num_classes": num_classes,
    }


def _tensor(value: onnx.ValueInfoProto) -> manifest.Tensor:
    found = value.type.tensor_type
    datatype = onnx.TensorProto.DataType.Name(found.elem_type).replace("FLOAT", "FP32")
    shape = tuple(-1 if dim.dim_param else dim.dim_value for dim in found.shape.dim)
    return manifest.Tensor(name=value.name, datatype=datatype, shape=shape)


def serialise(model: onnx.ModelProto) -> bytes:
    """Deterministic bytes of the model."""
    return cast(bytes, model.SerializeToString(deterministic=True))


def check_standard(model: onnx.ModelProto) -> None:
    """Raise ExportError unless the graph is plain: standard domain, no functions, valid, expected names and batch."""
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
    """Remove what depends on where and how the graph was made: stack traces, source paths, scope names."""
    graph = model.graph
    # Inner shapes are only informative, and stale ones break tools that edit the graph.
    del graph.value_info[:]
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    model.producer_name, model.producer_version = "stridevit", ""
    graph.name = "stridevit"
