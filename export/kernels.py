"""Whether CUDA and TensorRT have a kernel for every node of a graph, according to their documentation.

kernels.json holds the rows of the operators that our graphs may use, copied from ONNX Runtime's list of CUDA kernels
and TensorRT's operator support matrix, with their commits. A graph that would fall back to the CPU, or fail to load,
is found here without a GPU.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

_TABLE = Path(__file__).with_name("kernels.json")
_TENSORRT_NAMES = {"float": "FP32", "float16": "FP16"}


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One node, and the reason why each provider cannot run it; empty if it can."""

    op: str
    version: int
    """Version of the operator in the graph's opset."""
    types: tuple[str, ...]
    """Element types of the inputs."""
    cuda: str
    tensorrt: str


def kernels(graph: onnx.ModelProto) -> list[Kernel]:
    """Look up every node of `graph`, in order."""
    opset = graph.opset_import[0].version
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True, data_prop=True).graph
    values = {value.name: value.type.tensor_type for value in (*inferred.input, *inferred.value_info, *inferred.output)}
    types = {name: _name(tensor.elem_type) for name, tensor in values.items()}
    types |= {tensor.name: _name(tensor.data_type) for tensor in inferred.initializer}
    ranks = {name: len(tensor.shape.dim) for name, tensor in values.items()}
    constants = {tensor.name for tensor in inferred.initializer}
    found = []
    for node in graph.graph.node:
        schema = onnx.defs.get_schema(node.op_type, opset)
        found.append(
            Kernel(
                op=node.op_type,
                version=schema.since_version,
                types=tuple(types[name] for name in node.input if name),
                cuda="; ".join(_missing_on_cuda(node, schema, types)),
                tensorrt="; ".join(_missing_in_tensorrt(node, types, ranks, constants)),
            )
        )
    return found


def gaps(graph: onnx.ModelProto) -> list[str]:
    """What CUDA or TensorRT cannot run, one line per kind of node; empty for a graph that both can run."""
    lines = [
        f"{provider}: {kernel.op}-{kernel.version} ({', '.join(kernel.types)}): {reason}"
        for kernel in kernels(graph)
        for provider, reason in (("CUDA", kernel.cuda), ("TensorRT", kernel.tensorrt))
        if reason
    ]
    return list(dict.fromkeys(lines))


def sources() -> dict[str, str]:
    """URL of each table's origin."""
    return {provider: source["url"] for provider, source in _tables()["sources"].items()}


def _missing_on_cuda(node: onnx.NodeProto, schema: onnx.defs.OpSchema, types: dict[str, str]) -> Iterator[str]:
    rows = _tables()["cuda"].get(node.op_type, [])
    row = next((row for row in rows if _covers(row, schema.since_version)), None)
    if row is None:
        yield "no kernel for this version"
        return
    for index, name in enumerate(node.input):
        if not name:
            continue
        formal = schema.inputs[min(index, len(schema.inputs) - 1)].name
        constraint = row["inputs"].get(formal)
        allowed = row["types"].get(constraint, [str(constraint).removeprefix("tensor(").removesuffix(")")])
        if types[name] not in allowed:
            yield f"{formal} is {types[name]}, not one of {', '.join(allowed)}"


def _covers(row: dict[str, Any], version: int) -> bool:
    """ONNX Runtime uses a kernel without an upper version only for exactly the version at which it begins."""
    return bool(row["since"] == version or (row["until"] is not None and row["since"] <= version <= row["until"]))


def _missing_in_tensorrt(
    node: onnx.NodeProto, types: dict[str, str], ranks: dict[str, int], constants: set[str]
) -> Iterator[str]:
    row = _tables()["tensorrt"].get(node.op_type)
    if row is None:
        yield "not supported"
        return
    first = types[node.input[0]]
    first = _TENSORRT_NAMES.get(first, first.upper())
    if first not in row["types"]:
        yield f"{first} is not one of {', '.join(row['types'])}"
    match node.op_type:
        case "Attention":
            # Without mask, cache and further outputs, only the restriction on ranks applies.
            plain = len(node.input) == 3 and len(list(filter(None, node.output))) == 1
            plain &= all(ranks[name] == 4 for name in node.input)
            plain &= not {"softcap", "qk_matmul_output_mode"} & {attribute.name for attribute in node.attribute}
        case "LayerNormalization":
            plain = len(list(filter(None, node.output))) == 1
        case "ReduceMean" | "ReduceSum" | "Squeeze" | "Unsqueeze":
            plain = all(name in constants for name in node.input[1:])
        case _:
            plain = not row["restrictions"]
    if not plain:
        yield row["restrictions"]


def _name(element_type: int) -> str:
    """ONNX Runtime's name of an element type: float, float16, int64."""
    return str(TensorProto.DataType.Name(element_type)).lower()


@cache
def _tables() -> dict[str, Any]:
    tables: dict[str, Any] = json.loads(_TABLE.read_text(encoding="utf-8"))
    return tables
