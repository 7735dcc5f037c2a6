"""Other precisions than fp32: what they keep, what they may lose, and where they may run."""

import dataclasses
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
from fastapi.testclient import TestClient

from export.bundles import export, make_graph
from export.graph import ExportError, op_types, serialise
from export.parity import check_parity
from export.precision import TOLERANCES
from export.sources import ExportSource, finished_run
from export.verify import verify
from service.app import create_app
from service.bundle import SUMS_FILE, read_bundle
from service.engine import Engine, Tuning
from service.manifest import Precision, labels_sha256
from service.models.loading import Loader
from service.scheduling.cost import Load
from service.scheduling.scheduler import Scheduler
from service.settings import Settings
from tests.service.conftest import PNG


@pytest.fixture(scope="module")
def digits(digits_run: Path) -> ExportSource:
    """Trained for two epochs only: int8 may cost it more than half a point."""
    return finished_run(digits_run, None)


@pytest.fixture(scope="module")
def models(digits: ExportSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of digits-csra-r2 in every precision but fp32."""
    repository = tmp_path_factory.mktemp("models")
    for precision in ("int8", "int8-dynamic", "fp16"):
        export(digits, repository, precision=precision, accept_accuracy_loss=True)
    return repository


def test_manifests_say_what_each_precision_promises(models: Path) -> None:
    said = {
        folder.name: (manifest.precision, manifest.family, manifest.devices, manifest.max_batch)
        for folder in models.iterdir()
        for manifest in [read_bundle(folder / "1").manifest]
    }
    assert said == {
        "digits-csra-r2-int8": ("int8", "digits", ("cpu",), None),
        "digits-csra-r2-int8-dynamic": ("int8-dynamic", "digits", ("cpu",), 1),
        "digits-csra-r2-fp16": ("fp16", "digits", ("cpu", "cuda", "tensorrt"), None),
    }


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "fp16"])
def test_accuracy_is_that_of_the_graph_itself_on_all_test_images(
    precision: str, models: Path, digits: ExportSource
) -> None:
    bundle = read_bundle(models / f"digits-csra-r2-{precision}" / "1")
    assert digits.dataset
    images, labels = next(iter(digits.batches(digits.dataset.test, 360)))
    engine = Engine(bundle.model_path)
    answers = np.concatenate([engine.run(image[np.newaxis])[0] for image in images.numpy()])
    assert bundle.manifest.accuracy
    assert bundle.manifest.accuracy.n == 360
    correct = answers.argmax(axis=1) == labels.numpy()
    assert bundle.manifest.accuracy.top1 == pytest.approx(correct.mean(), abs=1e-9)
    np.testing.assert_array_equal(bundle.manifest.accuracy.correct_top1(), correct)
    assert bundle.manifest.accuracy.correct
    assert bundle.manifest.accuracy.correct.labels_sha256 == labels_sha256(labels.numpy())
    assert {check.name for check in verify(bundle.folder)} >= {"kernels", "golden"}


def test_int8_is_standard_onnx_with_matrices_of_bytes(models: Path) -> None:
    graph = onnx.load(models / "digits-csra-r2-int8" / "1" / "model.onnx")
    assert {entry.domain for entry in graph.opset_import} == {""}
    matrices = [tensor for tensor in graph.graph.initializer if len(tensor.dims) == 2]
    assert {tensor.name for tensor in matrices if tensor.data_type != onnx.TensorProto.INT8} == {"positions_ND"}
    counts = op_types(graph)
    assert (counts["Gemm"], counts["MatMul"], counts["Attention"]) == (37, 1, 6)
    # Only inputs are quantised, and an input that several products share once.
    assert counts["QuantizeLinear"] <= 38


def test_an_int8_answer_is_its_own_alone_or_in_any_batch(models: Path, digits: ExportSource) -> None:
    engine = Engine(models / "digits-csra-r2-int8" / "1" / "model.onnx")
    images = digits.test_images(24)
    alone = np.concatenate([engine.run(image[np.newaxis])[0] for image in images])
    for turned in (0, 5):
        together = np.roll(engine.run(np.roll(images, turned, axis=0))[0], -turned, axis=0)
        np.testing.assert_allclose(together, alone, atol=TOLERANCES["int8"].by_batch or 0)


def test_a_graph_whose_answers_depend_on_the_batch_is_refused(digits: ExportSource) -> None:
    engine = Engine(serialise(make_graph(digits, "int8-dynamic")))
    strict = dataclasses.replace(TOLERANCES["int8"], by_batch=1e-4)
    with pytest.raises(ExportError, match="an output depends on the batch"):
        check_parity(digits.classifier, engine, digits.test_images(64), strict)


def test_more_than_half_a_point_lost_is_refused_and_nothing_is_published(digits: ExportSource, tmp_path: Path) -> None:
    assert digits.accuracy
    better = dataclasses.replace(digits, accuracy=digits.accuracy.model_copy(update={"top1": 1.0}))
    with pytest.raises(ExportError, match=r"int8 loses .* points of top-1 \(100.00% to .*--accept-accuracy-loss"):
        export(better, tmp_path, precision="int8")
    unknown = dataclasses.replace(digits, accuracy=None)
    with pytest.raises(ExportError, match=r"no test accuracy to compare int8 with.*--accept-accuracy-loss"):
        export(unknown, tmp_path, precision="int8")
    assert not list(tmp_path.iterdir())


def test_two_int8_exports_give_the_same_bytes(models: Path, digits: ExportSource, tmp_path: Path) -> None:
    again = export(digits, tmp_path, precision="int8", accept_accuracy_loss=True)
    assert (again / SUMS_FILE).read_bytes() == (models / "digits-csra-r2-int8" / "1" / SUMS_FILE).read_bytes()


def test_golden_outputs_hold_where_integers_are_computed_in_another_way(models: Path) -> None:
    """As on another processor: here in float32, node by node, without ONNX Runtime's integer kernels."""
    import onnxruntime

    bundle = read_bundle(models / "digits-csra-r2-int8" / "1")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(bundle.model_path, options, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).integers(0, 256, size=(64, 32, 32, 3), dtype=np.uint8)
    one, other = session.run(["logits"], {"image": images})[0], Engine(bundle.model_path).run(images)[0]
    assert np.abs(one - other).max() <= bundle.manifest.tolerance.max_abs_logit


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
    scheduler = Scheduler(load := Load())
    loader = Loader(
        scheduler, load, device="cpu", threads=1, intra_op_threads=0, max_batch=Settings().max_batch, tuning=Tuning()
    )
    limits = {folder.name: loader.load(folder / "1").queue.cost.limit for folder in models.iterdir()}
    assert limits["digits-csra-r2-int8-dynamic"] == 1
    assert limits["digits-csra-r2-int8"] > 1


def test_every_precision_has_a_promise() -> None:
    assert set(TOLERANCES) == set(get_args(Precision))
