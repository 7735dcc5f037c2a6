"""The exported graph: plain, dynamic in its batch, equal to torch, and silent about where it was made."""

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from export.graph import ExportError, check_standard, op_types, serialise, to_onnx
from service.engine import Engine
from training.models import Classifier, StrideViT, architecture

VARIANTS = ["mha", "lsra-r2", "lsra-r3", "csra-r2", "csra-r4"]


def classifier(variant: str) -> Classifier:
    model = StrideViT(architecture("vit-xs", variant, classes=10), seed=0)
    torch.manual_seed(0)
    assert isinstance(model.head, torch.nn.Linear)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return Classifier(model, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)).eval()


@pytest.fixture(scope="module", params=VARIANTS)
def exported(request: pytest.FixtureRequest) -> tuple[Classifier, onnx.ModelProto]:
    made = classifier(request.param)
    return made, to_onnx(made, image_size=32)


def test_graph_is_plain_and_silent(exported: tuple[Classifier, onnx.ModelProto]) -> None:
    _, graph = exported
    assert [entry.domain for entry in graph.opset_import] == [""]
    assert not graph.functions
    assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)
    data = serialise(graph)
    assert not any(trace in data for trace in (b".py", b"site-packages", b"/home", b"/tmp", b"Traceback"))
    assert op_types(graph)["Attention"] == 6
    assert not {"Shape", "Size", "NonZero"} & set(op_types(graph))


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 16])
def test_graph_gives_torch_s_answers_at_any_batch(exported: tuple[Classifier, onnx.ModelProto], batch: int) -> None:
    model, graph = exported
    images = np.random.default_rng(batch).integers(0, 256, size=(batch, 32, 32, 3), dtype=np.uint8)
    logits, probabilities = Engine(serialise(graph)).run(images)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images))
    np.testing.assert_allclose(logits, expected.numpy(), atol=2e-4)
    np.testing.assert_allclose(probabilities, expected.softmax(dim=-1).numpy(), atol=2e-4)


@pytest.mark.parametrize("variant", ["mha", "csra-r2", "lsra-r2"])
def test_graph_runs_in_the_reference_runtime(variant: str) -> None:
    model = classifier(variant)
    images = np.random.default_rng(0).integers(0, 256, size=(2, 32, 32, 3), dtype=np.uint8)
    outputs = ReferenceEvaluator(to_onnx(model, image_size=32)).run(["logits"], {"image": images})
    assert isinstance(outputs, list)
    with torch.inference_mode():
        np.testing.assert_allclose(outputs[0], model(torch.from_numpy(images)).numpy(), atol=2e-4)


def test_foreign_operators_and_fixed_batches_are_refused() -> None:
    graph = to_onnx(classifier("mha"), image_size=32)
    fixed = onnx.ModelProto.FromString(graph.SerializeToString())
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    with pytest.raises(ExportError, match="batch of 'image' is not dynamic"):
        check_standard(fixed)
    foreign = onnx.ModelProto.FromString(graph.SerializeToString())
    foreign.graph.node[0].domain = "com.microsoft"
    foreign.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(ExportError, match=r"com\.microsoft"):
        check_standard(foreign)
