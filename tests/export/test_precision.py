"""Precisions: their tolerances, the accuracy they may lose, and where they may run."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import cast, get_args

import numpy as np
import onnx
import pytest
from fastapi.testclient import TestClient

from export.graph import ExportError, op_types, serialise
from export.parity import check_parity
from export.precision import TOLERANCES
from export.publish import check_accuracy, export
from export.quantize import quantize_by_batch
from export.sources import ExportSource, finished_run
from export.verify import verify
from service.app import create_app
from service.bundle import SUMS_FILE, Bundle, read_bundle
from service.engine import Engine, Tuning
from service.errors import BundleError
from service.manifest import Precision, labels_sha256
from service.models.loading import Loader
from service.models.proof import EngineOptions
from service.models.verify import check_golden
from service.scheduling.cost import Load
from service.scheduling.scheduler import Scheduler
from service.settings import Settings
from tests.processor import needs_exact_bytes
from tests.service.conftest import PNG

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def digits(digits_run: Path) -> ExportSource:
    """Trained for two epochs only: int8 may cost it more than half a point."""
    return finished_run(digits_run, None)


@pytest.fixture(scope="module")
def int8(digits: ExportSource, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """digits-csra-r2-int8."""
    return read_bundle(export(digits, tmp_path_factory.mktemp("models"), precision="int8", accept_accuracy_loss=True))


@pytest.fixture(scope="module")
def models(int8: Bundle, digits: ExportSource) -> Path:
    """A repository of digits-csra-r2 in every precision but fp32."""
    repository = int8.folder.parents[1]
    for precision in ("int8-dynamic", "fp16"):
        export(digits, repository, precision=precision, accept_accuracy_loss=True)
    return repository


INTENDED: dict[Precision, dict[str, object]] = {
    "fp32": {"golden": (1e-3, 1e-3), "from_torch": 1e-3, "by_batch": 1e-4, "max_batch": None},
    "fp16": {"golden": (5e-2, 1e-2), "from_torch": None, "by_batch": 1e-2, "max_batch": None},
    "int8": {"golden": (2e-1, 5e-2), "from_torch": None, "by_batch": 1e-1, "max_batch": None},
    "int8-dynamic": {"golden": (2e-1, 5e-2), "from_torch": None, "by_batch": None, "max_batch": 1},
}
"""The tolerances of docs/export.md: in a logit and in a probability for golden outputs."""


def test_tolerances_are_the_intended_ones() -> None:
    assert set(TOLERANCES) == set(get_args(Precision))
    for precision, tolerances in TOLERANCES.items():
        golden = tolerances.golden
        assert INTENDED[precision] == {
            "golden": (golden.max_abs_logit, golden.max_abs_probability),
            "from_torch": tolerances.from_torch,
            "by_batch": tolerances.by_batch,
            "max_batch": tolerances.max_batch,
        }
        assert tolerances.devices == (("cpu",) if "int8" in precision else ("cpu", "cuda", "tensorrt"))


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize(("factor", "refused"), [(0.8, False), (1.2, True)])
def test_a_graph_beyond_the_golden_tolerance_of_its_precision_is_refused(
    repository: Path, precision: Precision, factor: float, refused: bool
) -> None:
    bundle = read_bundle(repository / "digits-csra-r2" / "1")
    manifest = bundle.manifest.model_copy(update={"tolerance": TOLERANCES[precision].golden})
    logit, probability = cast(tuple[float, float], INTENDED[precision]["golden"])
    graph = onnx.load(bundle.model_path)
    bias = next(tensor for tensor in graph.graph.initializer if tensor.name.endswith("head.bias"))
    # The same shift of all logits changes neither top-1 nor probabilities.
    shifted = onnx.numpy_helper.to_array(bias) + np.float32(factor * logit)
    bias.CopyFrom(onnx.numpy_helper.from_array(shifted, bias.name))
    golden, intact = bundle.golden(), Engine(bundle.model_path)
    other = dataclasses.replace(golden, probabilities=golden.probabilities + np.float32(factor * probability))
    for recorded, engine in ((golden, Engine(serialise(graph))), (other, intact)):
        with pytest.raises(BundleError, match="differ from the golden ones") if refused else nullcontext():
            check_golden(recorded, manifest, engine, path=Path("golden.npz"))


@slow
def test_manifests_state_precision_devices_and_tolerances(models: Path) -> None:
    stated = {
        folder.name: (manifest.precision, manifest.family, manifest.devices, manifest.max_batch, manifest.tolerance)
        for folder in models.iterdir()
        for manifest in [read_bundle(folder / "1").manifest]
    }
    assert stated == {
        f"digits-csra-r2-{precision}": (precision, "digits", rule.devices, rule.max_batch, rule.golden)
        for precision, rule in TOLERANCES.items()
        if precision != "fp32"
    }


def check_accuracy_of_graph(bundle: Bundle, digits: ExportSource) -> None:
    assert digits.dataset
    images, labels = next(iter(digits.batches(digits.dataset.test, 360)))
    engine = Engine(bundle.model_path)
    outputs = np.concatenate([engine.run(image[np.newaxis])[0] for image in images.numpy()])
    assert bundle.manifest.accuracy
    assert bundle.manifest.accuracy.n == 360
    correct = outputs.argmax(axis=1) == labels.numpy()
    assert bundle.manifest.accuracy.top1 == pytest.approx(correct.mean(), abs=1e-9)
    np.testing.assert_array_equal(bundle.manifest.accuracy.correct_top1(), correct)
    assert bundle.manifest.accuracy.correct
    assert bundle.manifest.accuracy.correct.labels_sha256 == labels_sha256(labels.numpy())
    assert verify(bundle.folder).keys() >= {"kernels", "golden"}


def test_accuracy_is_that_of_the_graph_itself_on_all_test_images(int8: Bundle, digits: ExportSource) -> None:
    check_accuracy_of_graph(int8, digits)


@slow
@pytest.mark.parametrize("precision", ["int8-dynamic", "fp16"])
def test_accuracy_is_that_of_the_graph_in_other_precisions(precision: str, models: Path, digits: ExportSource) -> None:
    check_accuracy_of_graph(read_bundle(models / f"digits-csra-r2-{precision}" / "1"), digits)


def test_int8_is_standard_onnx_with_matrices_of_bytes(int8: Bundle) -> None:
    graph = onnx.load(int8.model_path)
    assert {entry.domain for entry in graph.opset_import} == {""}
    matrices = [tensor for tensor in graph.graph.initializer if len(tensor.dims) == 2]
    latents = {f"trunk.{block}.attention.latents.product.weight" for block in range(6)}
    assert {tensor.name for tensor in matrices if tensor.data_type != onnx.TensorProto.INT8} == {
        "positions_ND",
        *latents,
    }
    counts = op_types(graph)
    assert (counts["Gemm"], counts["MatMul"], counts["Attention"]) == (31, 1, 6)
    # Only inputs are quantised, and an input of several products only once.
    assert counts["QuantizeLinear"] == 26


def test_an_int8_output_is_the_same_alone_and_in_any_batch(int8: Bundle, digits: ExportSource) -> None:
    engine = Engine(int8.model_path)
    images = digits.test_images(24)
    alone = np.concatenate([engine.run(image[np.newaxis])[0] for image in images])
    for rotated in (0, 5):
        together = np.roll(engine.run(np.roll(images, rotated, axis=0))[0], -rotated, axis=0)
        np.testing.assert_allclose(together, alone, atol=TOLERANCES["int8"].by_batch or 0)


def test_a_graph_whose_outputs_depend_on_the_batch_is_refused(digits: ExportSource, repository: Path) -> None:
    fp32 = onnx.load(repository / "digits-csra-r2" / "1" / "model.onnx")
    engine = Engine(serialise(quantize_by_batch(fp32)))
    strict = dataclasses.replace(TOLERANCES["int8"], by_batch=1e-4)
    with pytest.raises(ExportError, match="an output depends on the batch"):
        check_parity(digits.predict, engine, digits.test_images(64), strict)


def test_more_than_half_a_point_lost_is_refused(digits: ExportSource) -> None:
    assert digits.accuracy
    measured = digits.accuracy.model_copy(update={"top1": 0.9, "n": 1000})
    check_accuracy(measured.model_copy(update={"top1": 0.905}), measured, "int8")
    with pytest.raises(ExportError, match=r"int8 loses 0\.60 points of top-1 \(90\.60% to .*--accept-accuracy-loss"):
        check_accuracy(measured.model_copy(update={"top1": 0.906}), measured, "int8")
    with pytest.raises(ExportError, match=r"no test accuracy to compare int8 with.*--accept-accuracy-loss"):
        check_accuracy(None, measured, "int8")


@slow
def test_nothing_is_published_when_more_than_half_a_point_is_lost(digits: ExportSource, tmp_path: Path) -> None:
    assert digits.accuracy
    better = dataclasses.replace(digits, accuracy=digits.accuracy.model_copy(update={"top1": 1.0}))
    with pytest.raises(ExportError, match=r"int8 loses .* points of top-1 \(100.00% to .*--accept-accuracy-loss"):
        export(better, tmp_path, precision="int8")
    assert not list(tmp_path.iterdir())


@slow
def test_two_int8_exports_give_the_same_bytes(int8: Bundle, digits: ExportSource, tmp_path: Path) -> None:
    again = export(digits, tmp_path, precision="int8", accept_accuracy_loss=True)
    assert (again / SUMS_FILE).read_bytes() == (int8.folder / SUMS_FILE).read_bytes()


@needs_exact_bytes
def test_golden_outputs_hold_where_integers_are_computed_differently(int8: Bundle) -> None:
    """As on another processor: in float32, node by node, without ONNX Runtime's integer kernels."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(int8.model_path, options, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).integers(0, 256, size=(64, 32, 32, 3), dtype=np.uint8)
    one, other = session.run(["logits"], {"image": images})[0], Engine(int8.model_path).run(images)[0]
    assert np.abs(one - other).max() <= int8.manifest.tolerance.max_abs_logit


@slow
def test_the_service_serves_them_and_a_batch_of_one_stays_one(models: Path, digits: ExportSource) -> None:
    with TestClient(create_app(Settings(repository=models, threads=1))) as client:
        listed = {model["name"]: model for model in client.get("/v1/models").json()["models"]}
        assert {model["state"] for model in listed.values()} == {"ready"}
        assert listed["digits-csra-r2-int8"]["precision"] == "int8"
        answers = [
            client.post(f"/v1/classify?model={name}", content=PNG).json()["results"][0]["predictions"][0]["index"]
            for name in listed
        ]
        assert len(set(answers)) == 1
    options = EngineOptions.of("cpu", threads=1, max_batch=Settings().max_batch, tuning=Tuning())
    loader = Loader(Scheduler(load := Load()), load, options)
    try:
        limits = {folder.name: loader.load(folder / "1").queue.cost.limit for folder in models.iterdir()}
    finally:
        loader.rest()
    assert limits["digits-csra-r2-int8-dynamic"] == 1
