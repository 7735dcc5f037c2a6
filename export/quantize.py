"""int8 for CPUs: products with weights in 8 bits, everything else in float32, as standard ONNX operators.

Chosen on held-out train images (table in docs/results.md): the inputs of a product are quantised, its output is not;
weights have one scale per column; activation ranges are the smallest and largest values seen in calibration.
The product that makes the latents of L-SRA and C-SRA stays in float32: it is about a hundredth of the work, and
OpenVINO's CPU plugin (2026.4) cannot compile its quantised form, because it mistakes the tokens for channels when it
moves the scales past the reshape.

Activations are unsigned and weights signed, the pair that processors with VNNI multiply in one instruction. Without
VNNI, ONNX Runtime's kernels may saturate: then the golden outputs reject the model when it is loaded.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from export.graph import plain
from service.engine import INPUT

CALIBRATION_BATCH = 32
_PRODUCTS = ["MatMul", "Gemm"]
_LATENT_WEIGHT = "attention.latents.product.weight"
_ONLY_WITH_WEIGHTS: dict[str, object] = {"MatMulConstBOnly": True}


def quantize(
    graph: onnx.ModelProto, calibration: npt.NDArray[np.uint8], *, batch: int = CALIBRATION_BATCH, conv: bool = False
) -> onnx.ModelProto:
    """`graph` with fixed ranges from `calibration` images (n,H,W,3): an output depends on its own image alone.

    `batch` images are run at a time. With `conv`, convolutions are quantised too.
    """
    convert = partial(
        quantize_static,
        calibration_data_reader=_Batches(calibration, batch),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
    )
    types = [*_PRODUCTS, *(["Conv"] if conv else [])]
    return _converted(graph, convert, {**_ONLY_WITH_WEIGHTS, "OpTypesToExcludeOutputQuantization": types}, types)


def quantize_by_batch(graph: onnx.ModelProto) -> onnx.ModelProto:
    """`graph` with ranges computed per batch: no calibration, but an output depends on the whole batch."""
    return _converted(graph, quantize_dynamic, _ONLY_WITH_WEIGHTS, _PRODUCTS)


def _converted(
    graph: onnx.ModelProto, convert: Callable[..., None], extra: dict[str, object], types: list[str]
) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        # Through a file: given a graph in memory, static quantisation would move its weights to external data.
        source, written = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        onnx.save(graph, source)
        convert(
            source,
            written,
            op_types_to_quantize=types,
            nodes_to_exclude=_latents(graph),
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options=extra,
        )
        converted = onnx.load(written)
    # Quantisation infers shapes, including those with a batch size that a foreign graph hardcodes.
    for value, declared in zip(converted.graph.output, graph.graph.output, strict=True):
        value.CopyFrom(declared)
    return plain(converted)


def _latents(graph: onnx.ModelProto) -> list[str]:
    """Names of the products that project tokens to latents."""
    return [
        node.name
        for node in graph.graph.node
        if node.op_type in _PRODUCTS and any(name.endswith(_LATENT_WEIGHT) for name in node.input)
    ]


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: npt.NDArray[np.uint8], size: int) -> None:
        self._batches = iter(np.array_split(images, -(-len(images) // size)))

    def get_next(self) -> dict[str, npt.NDArray[np.uint8]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch}
