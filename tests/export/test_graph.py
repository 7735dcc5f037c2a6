"""The exported graph: plain, dynamic in its batch, equal to torch in every runtime, without traces of its origin."""

from collections import Counter

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import onnx
import openvino
import pytest
import torch
from hypothesis import example, given, settings
from onnx.reference import ReferenceEvaluator

from export.graph import AVOIDED, OPSET, OPSETS, ExportError, check_standard, op_types, serialise, to_onnx
from export.kernels import gaps, kernels
from export.precision import TOLERANCES
from export.quantize import quantize, quantize_by_batch
from service.engine import Engine
from service.manifest import Precision
from tests.processor import needs_exact_bytes
from training.models import ImageSize, NormalizedModel, Pool, Positions, StrideViT, architecture

slow = pytest.mark.slow
VARIANTS = ["mha", "lsra-r3", "csra-r2", pytest.param("lsra-r2", marks=slow), pytest.param("csra-r4", marks=slow)]
COMMON = {"Cast": 1, "ReduceMean": 1}
HISTOGRAMS = {
    ("mha", 23): COMMON
    | {"Add": 5, "Attention": 2, "Gelu": 4, "Gemm": 13, "LayerNormalization": 5, "MatMul": 1}
    | {"Reshape": 12, "Softmax": 1, "Split": 2, "Transpose": 9},
    ("lsra-r2", 23): COMMON
    | {"Add": 7, "Attention": 2, "Expand": 2, "Gelu": 4, "Gemm": 15, "LayerNormalization": 7, "MatMul": 3}
    | {"Reshape": 10, "Softmax": 3, "Split": 2, "Squeeze": 2, "Transpose": 3, "Unsqueeze": 2},
    ("lsra-r3", 23): COMMON
    | {"Add": 9, "Attention": 2, "Concat": 2, "Expand": 2, "Gelu": 4, "Gemm": 15, "LayerNormalization": 7, "MatMul": 5}
    | {"Reshape": 14, "Softmax": 5, "Split": 6, "Squeeze": 4, "Transpose": 5, "Unsqueeze": 2},
    ("csra-r2", 23): COMMON
    | {"Add": 5, "Attention": 2, "Conv": 2, "Expand": 2, "Gelu": 4, "Gemm": 15, "LayerNormalization": 7, "MatMul": 1}
    | {"Reshape": 14, "Softmax": 1, "Transpose": 5, "Unsqueeze": 2},
}
"""Operators of vit-xs with 2 blocks, the MLP in two parts. Per block, without the opset's Attention there are 2 MatMul
and 1 Softmax instead, and for latents no Expand but a Transpose; without its Gelu, 1 Div, 1 Erf, 1 Add and 2 Mul per
part."""
KEYS_AND_VALUES = {"Expand": -1, "Gemm": 1, "Reshape": 3, "Split": 1, "Transpose": 4, "Unsqueeze": -1}
"""How many more operators a block has where the latents are projected to keys and values."""
HISTOGRAMS[("csra-r4", 23)] = HISTOGRAMS[("csra-r2", 23)]


def expected_histogram(variant: str, opset: int) -> dict[str, int]:
    """The histogram of `variant` at an opset that may lack Attention and Gelu."""
    counts = dict(HISTOGRAMS[(variant, 23)])
    if opset < 23:
        blocks = counts.pop("Attention")
        counts["MatMul"] += 2 * blocks
        counts["Softmax"] += blocks
        if counts.pop("Expand", 0):
            counts["Transpose"] += blocks
    if opset < 20:
        parts = counts.pop("Gelu")
        counts |= {"Div": parts, "Erf": parts, "Add": counts["Add"] + parts, "Mul": 2 * parts}
    return counts


def classifier(
    variant: str,
    *,
    preset: str = "vit-xs",
    img_size: ImageSize | None = None,
    depth: int = 2,
    rank: int | None = None,
    positions: Positions = "sincos",
    pool: Pool = "avg",
) -> NormalizedModel:
    """Every parameter is random, also those that training starts at zero: the gate, the biases, the head."""
    spec = architecture(preset, variant, num_classes=10, img_size=img_size, rank=rank, positions=positions, pool=pool)
    spec = spec.model_copy(update={"depth": depth})
    model = StrideViT(spec, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "gate" in name or name.startswith("head"):
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return NormalizedModel(model, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)).eval()


def noise(batch: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, 256, (batch, *(shape or (32, 32)), 3), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module", params=VARIANTS)
def exported(request: pytest.FixtureRequest) -> tuple[str, NormalizedModel, onnx.ModelProto]:
    made = classifier(request.param)
    return request.param, made, to_onnx(made)


def assert_equal_to_torch(graph: onnx.ModelProto, model: NormalizedModel, images: torch.Tensor) -> None:
    logits, probabilities = Engine(serialise(graph)).run(images.numpy())
    with torch.inference_mode():
        expected = model(images)
    np.testing.assert_allclose(logits, expected.numpy(), atol=2e-4)
    np.testing.assert_allclose(probabilities, expected.softmax(dim=-1).numpy(), atol=2e-4)


def by_openvino(graph: onnx.ModelProto, images: torch.Tensor) -> npt.NDArray[np.float32]:
    """Logits."""
    core = openvino.Core()
    # Its CPU plugin may choose bf16 by itself.
    core.set_property("CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    compiled = core.compile_model(core.read_model(serialise(graph)), "CPU")
    return np.asarray(compiled({"image": images.numpy()})["logits"])


Exported = tuple[str, NormalizedModel, onnx.ModelProto]


@pytest.mark.parametrize("opset", [18, OPSET])
@pytest.mark.parametrize("variant", ["mha", "csra-r2", "lsra-r3"])
@pytest.mark.parametrize("rank", [None, 64])
def test_a_class_token_and_learned_positions_are_exported(variant: str, opset: int, rank: int | None) -> None:
    model = classifier(variant, rank=rank, positions="learned", pool="token")
    with torch.no_grad():
        torch.nn.init.normal_(model.model.get_parameter("cls_token"), generator=torch.Generator().manual_seed(3))
    graph = to_onnx(model, opset=opset)
    assert not gaps(graph)
    for batch in (1, 3):
        assert_equal_to_torch(graph, model, noise(batch))


def test_graph_is_plain_and_without_traces_of_its_origin(exported: Exported) -> None:
    _, _, graph = exported
    assert [entry.domain for entry in graph.opset_import] == [""]
    assert not graph.functions
    assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)
    assert not any(tensor.external_data for tensor in graph.graph.initializer)
    data = serialise(graph)
    assert not any(trace in data for trace in (b".py", b"site-packages", b"/home", b"/tmp", b"Traceback"))


def test_graph_has_exactly_these_operators(exported: Exported) -> None:
    variant, _, graph = exported
    assert op_types(graph) == expected_histogram(variant, 23)


@pytest.mark.parametrize(
    ("variant", "opset"),
    [("lsra-r3", 18), *(pytest.param(*case, marks=slow) for case in [("mha", 18), ("csra-r2", 18), ("mha", 20)])],
)
def test_older_opsets_give_the_same_outputs_from_exactly_these_operators(variant: str, opset: int) -> None:
    model = classifier(variant)
    graph = to_onnx(model, opset=opset)
    assert graph.opset_import[0].version == opset
    assert op_types(graph) == expected_histogram(variant, opset)
    assert not AVOIDED & op_types(graph).keys()
    assert gaps(graph) == []
    assert_equal_to_torch(graph, model, noise(3))


def test_an_opset_that_cannot_be_exported_is_named() -> None:
    for opset in (OPSETS[0] - 1, OPSETS[-1] + 1):
        with pytest.raises(ExportError, match=f"opset {opset} cannot be exported"):
            to_onnx(classifier("mha"), opset=opset)


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 64])
def test_graph_gives_torch_s_outputs_at_any_batch(exported: Exported, batch: int) -> None:
    _, model, graph = exported
    assert_equal_to_torch(graph, model, noise(batch))


@pytest.mark.parametrize("variant", ["csra-r2", pytest.param("lsra-r3", marks=slow)])
def test_latents_are_projected_to_keys_and_values_where_that_is_less_work(variant: str) -> None:
    # Two heads of 64 columns: up to rank 63, attending to the latents is surely less work.
    model = classifier(variant, rank=64)
    graph = to_onnx(model)
    expected = Counter(expected_histogram(variant, 23))
    expected.update({name: 2 * more for name, more in KEYS_AND_VALUES.items()})
    assert op_types(graph) == +expected
    assert gaps(graph) == []
    assert_equal_to_torch(graph, model, noise(3))
    assert op_types(to_onnx(classifier(variant, rank=63))) == expected_histogram(variant, 23)


def check_export(variant: str, size: tuple[int, int], rank: int | None = None) -> None:
    model = classifier(variant, img_size=size, depth=1, rank=rank)
    graph = to_onnx(model)
    assert gaps(graph) == []
    assert_equal_to_torch(graph, model, noise(2, *size))


def test_a_grid_that_is_not_square_is_exported_equal() -> None:
    check_export("csra-r2", (12, 20))


@slow
@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(["mha", "lsra", "csra"]),
    reduction=st.integers(1, 9),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    rank=st.integers(1, 96),
)
@example(kind="lsra", reduction=4, grid=(3, 5), rank=7)
@example(kind="lsra", reduction=4, grid=(3, 5), rank=80)
@example(kind="csra", reduction=3, grid=(2, 5), rank=7)
def test_any_reduction_grid_and_rank_is_exported_equal(
    kind: str, reduction: int, grid: tuple[int, int], rank: int
) -> None:
    check_export(kind if kind == "mha" else f"{kind}-r{reduction}", (4 * grid[0], 4 * grid[1]), rank)


def test_graph_runs_in_the_reference_runtime_and_in_openvino(exported: Exported) -> None:
    _, model, graph = exported
    images = noise(2)
    with torch.inference_mode():
        expected = model(images).numpy()
    outputs = ReferenceEvaluator(graph).run(["logits"], {"image": images.numpy()})
    assert isinstance(outputs, list)
    np.testing.assert_allclose(outputs[0], expected, atol=2e-4)
    np.testing.assert_allclose(by_openvino(graph, images), expected, atol=1e-3)


@pytest.mark.parametrize(
    "precision", ["fp32", "fp16", *(pytest.param(p, marks=needs_exact_bytes) for p in ("int8", "int8-dynamic"))]
)
@pytest.mark.parametrize("variant", ["csra-r2", *(pytest.param(v, marks=slow) for v in ("mha", "lsra-r2", "csra-r4"))])
def test_openvino_runs_every_precision_at_the_size_of_a_product(variant: str, precision: Precision) -> None:
    # At 32 px it compiles what it cannot compile here: 196 tokens, 384 wide.
    model = classifier(variant, preset="vit-s16", depth=1)
    graph = to_onnx(model, half=precision == "fp16")
    if precision == "int8":
        graph = quantize(graph, noise(8, 224, 224).numpy())
    elif precision == "int8-dynamic":
        graph = quantize_by_batch(graph)
    images = noise(1, 224, 224)
    logits, _ = Engine(serialise(graph)).run(images.numpy())
    np.testing.assert_allclose(by_openvino(graph, images), logits, atol=TOLERANCES[precision].golden.max_abs_logit)


@pytest.mark.parametrize("variant", ["lsra-r2", *(pytest.param(variant, marks=slow) for variant in ("mha", "csra-r2"))])
def test_half_precision_keeps_its_input_and_outputs_and_is_close(variant: str) -> None:
    model = classifier(variant)
    graph = to_onnx(model, half=True)
    assert gaps(graph) == []
    matrices = [tensor for tensor in graph.graph.initializer if len(tensor.dims) == 2]
    full = {tensor.name for tensor in matrices if tensor.data_type != onnx.TensorProto.FLOAT16}
    assert full == {"embedding", "positions_ND"}
    images = noise(4)
    logits, probabilities = Engine(serialise(graph)).run(images.numpy())
    assert logits.dtype == probabilities.dtype == np.dtype(np.float32)
    with torch.inference_mode():
        np.testing.assert_allclose(logits, model(images).numpy(), atol=0.05)
    # The exported classifier is unchanged.
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.fixture(scope="module")
def mha() -> onnx.ModelProto:
    return to_onnx(classifier("mha", depth=1))


def test_kernel_tables_find_what_a_gpu_lacks(mha: onnx.ModelProto) -> None:
    assert gaps(mha) == []
    unshaped = gaps(to_onnx(classifier("lsra-r3", depth=1), shaped=False))
    assert any(line.startswith("CUDA: Pad-23 (float, int64): no kernel for this version") for line in unshaped)
    assert any(line.startswith("TensorRT: Transpose-23 (uint8): UINT8 is not one of") for line in unshaped)
    copy = onnx.ModelProto.FromString(mha.SerializeToString())
    gelu = next(node for node in copy.graph.node if node.op_type == "Gelu")
    gelu.op_type = "Mish"
    lines = gaps(copy)
    assert [line.partition(":")[0] for line in lines] == ["CUDA", "TensorRT"]
    assert len(kernels(mha)) == len(mha.graph.node)


def test_foreign_operators_and_fixed_batches_are_refused(mha: onnx.ModelProto) -> None:
    fixed = onnx.ModelProto.FromString(mha.SerializeToString())
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    with pytest.raises(ExportError, match="batch of 'image' is not dynamic"):
        check_standard(fixed)
    foreign = onnx.ModelProto.FromString(mha.SerializeToString())
    foreign.graph.node[0].domain = "com.microsoft"
    foreign.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(ExportError, match=r"com\.microsoft"):
        check_standard(foreign)
