"""From a run to a published bundle, and what stops one from being published."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import numpy_helper
from typer.testing import CliRunner, Result

from export.__main__ import app
from export.graph import ExportError, serialise
from export.parity import check_parity
from export.precision import TOLERANCES
from export.sources import Predict, random_weights
from service.bundle import CONTENT_FILES, SUMS_FILE, read_bundle
from service.engine import Engine
from service.manifest import Attention
from training.data import Split, load_dataset
from training.models import NormalizedModel, architecture
from training.runs import load_final

ROOT = Path(__file__).parents[2]


def test_manifest_states_what_the_model_is(repository: Path) -> None:
    bundle = read_bundle(repository / "digits-csra-r2" / "1")
    manifest = bundle.manifest
    assert (manifest.name, manifest.family, manifest.architecture) == ("digits-csra-r2", "digits", "vit-xs")
    assert manifest.attention == Attention(variant="csra-r2", tokens=64, kv_tokens=16, stride=2, rank=32)
    assert bundle.labels == tuple("0123456789")
    assert manifest.accuracy
    assert (manifest.accuracy.split, manifest.accuracy.n) == ("test", 360)
    correct = manifest.accuracy.correct_top1()
    assert correct is not None
    assert correct.mean() == pytest.approx(manifest.accuracy.top1)
    assert manifest.parity.images == 256 + 3
    assert manifest.parity.max_abs_logit < 1e-3
    assert manifest.parity.top1_flips == 0
    assert (manifest.precision, manifest.max_batch, manifest.devices) == ("fp32", None, ("cpu", "cuda", "tensorrt"))
    golden = bundle.golden()
    assert len(golden.images) == 8
    np.testing.assert_allclose(golden.probabilities.sum(axis=1), 1, atol=1e-5)


def test_an_export_from_another_folder_gives_the_same_bytes(digits_run: Path, repository: Path, tmp_path: Path) -> None:
    here = tmp_path / "a-second-and-much-longer-folder"
    here.mkdir()
    shutil.copytree(digits_run, here / "run")
    # Another process and working directory, with the code imported from another place.
    for package in ("training", "export", "service"):
        shutil.copytree(ROOT / package, here / package, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(here), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "export", "run", "run", "--repository", "models"]
    subprocess.run(command, cwd=here, check=True, env=environment)
    for file in (*CONTENT_FILES, SUMS_FILE):
        first, second = (
            (folder / "digits-csra-r2" / "1" / file).read_bytes() for folder in (repository, here / "models")
        )
        assert first == second, f"{file} differs"
        assert str(tmp_path).encode() not in second
        assert str(ROOT).encode() not in first


def first_images(count: int) -> npt.NDArray[np.uint8]:
    test = load_dataset("digits").test
    assert isinstance(test, Split)
    return test.images[:count]


def by_torch(classifier: NormalizedModel) -> Predict:
    def predict(images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        with torch.inference_mode():
            logits = classifier(torch.tensor(images))
        return logits.numpy(), logits.softmax(dim=-1).numpy()

    return predict


def changed(repository: Path, **changes: npt.NDArray[np.float32]) -> Engine:
    """The engine of digits-csra-r2 with `head_bias` or `head_weight` replaced."""
    graph = onnx.load(repository / "digits-csra-r2" / "1" / "model.onnx")
    for name, values in changes.items():
        tensor = next(t for t in graph.graph.initializer if t.name.endswith(name.replace("_", ".")))
        tensor.CopyFrom(numpy_helper.from_array(values.reshape(tuple(tensor.dims)), tensor.name))
    return Engine(serialise(graph))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([0, 0, 0, 0.5], "disagree: 0.5 in a logit"),
        # Alike in all logits: the probabilities are equal.
        ([2e-3] * 10, r"disagree: 0\.002 in a logit \(allowed 0\.001\), .* 0 top-1 flips"),
        ([float("nan")], "not finite"),
    ],
)
def test_a_graph_that_disagrees_with_torch_is_refused(
    digits_run: Path, repository: Path, change: list[float], message: str
) -> None:
    classifier, _ = load_final(digits_run)
    bias = classifier.model.get_parameter("head.bias").detach().numpy() + np.array(
        change + [0.0] * (10 - len(change)), dtype=np.float32
    )
    with pytest.raises(ExportError, match=message):
        check_parity(by_torch(classifier), changed(repository, head_bias=bias), first_images(16), TOLERANCES["fp32"])


def test_a_top1_flip_is_refused_however_small(digits_run: Path, repository: Path) -> None:
    classifier, _ = load_final(digits_run)
    # Classes 0 and 1 differ by much less than the tolerance, in ONNX with the other sign.
    head = classifier.model.head
    assert isinstance(head, torch.nn.Linear)
    with torch.no_grad():
        head.weight[1] = head.weight[0]
        head.bias[1] = head.bias[0] + 1e-4
        head.bias[:2] += 50
    bias = head.bias.detach().numpy().copy()
    bias[0] += 2e-4
    engine = changed(repository, head_bias=bias, head_weight=head.weight.detach().numpy())
    with pytest.raises(ExportError, match="top-1 flips"):
        check_parity(by_torch(classifier), engine, first_images(8), TOLERANCES["fp32"])


def test_random_weights_are_exported_as_such_under_the_next_version_of_a_family(tmp_path: Path) -> None:
    arguments = ["run", "--random-weights", "--preset", "vit-xs", "--variant", "mha", "--img-size", "16"]
    for version in ("1", "2"):
        result = CliRunner().invoke(app, [*arguments, "--family", "numbers", "--repository", str(tmp_path)])
        assert result.exit_code == 0, result.stderr
        assert f"numbers-mha/{version}: mha, 16 of 16 K/V tokens" in result.stdout.replace("\n", "")
    one, again = (tmp_path / "numbers-mha" / version for version in ("1", "2"))
    assert sorted(entry.name for entry in one.parent.iterdir()) == ["1", "2"]
    manifest = read_bundle(one).manifest
    assert manifest.attention == Attention(variant="mha", tokens=16, kv_tokens=16)
    assert (manifest.family, manifest.random_weights, manifest.accuracy) == ("numbers", True, None)
    assert (one / SUMS_FILE).read_bytes() == (again / SUMS_FILE).read_bytes()
    golden = read_bundle(one).golden()
    assert np.ptp(golden.logits, axis=0).max() > 1e-3, "every image has the same outputs"


def test_random_weights_have_a_family_of_their_own() -> None:
    source = random_weights(architecture("vit-xs", "mha", img_size=48))
    assert (source.family, source.dataset, source.accuracy) == ("vit-xs-48-random", None, None)


def test_a_run_or_random_weights_must_be_named(tmp_path: Path) -> None:
    for arguments in (["run"], ["run", str(tmp_path), "--random-weights"]):
        result = CliRunner().invoke(app, [*arguments, "--repository", str(tmp_path)])
        assert result.exit_code == 2
        assert "--random-weights" in result.stderr


def test_an_unfinished_run_is_refused_with_the_fix(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", str(tmp_path), "--repository", str(tmp_path / "models")])
    assert result.exit_code == 1
    assert "train it to the end first" in result.stderr
    assert not (tmp_path / "models").exists()


def test_onnx_file_is_valid_on_its_own(repository: Path) -> None:
    onnx.checker.check_model(repository / "digits-csra-r2" / "1" / "model.onnx", full_check=True)


def test_a_name_keeps_its_architecture(tmp_path: Path) -> None:
    def export_random(preset: str, *more: str) -> Result:
        options = ["--random-weights", "--preset", preset, "--variant", "mha", "--img-size", "16", "--family", "mine"]
        return CliRunner().invoke(app, ["run", *options, "--repository", str(tmp_path), *more])

    assert export_random("vit-xs").exit_code == 0
    refused = export_random("vit-cifar")
    assert refused.exit_code == 1
    assert "mine-mha in" in refused.stderr
    assert "is vit-xs with mha at 16 px, not vit-cifar with mha at 16 px" in refused.stderr
    assert "choose another name for this one with --name" in refused.stderr
    assert sorted(path.name for path in (tmp_path / "mine-mha").iterdir()) == ["1"]
    named = export_random("vit-cifar", "--name", "large")
    assert named.exit_code == 0, named.stderr
    assert read_bundle(tmp_path / "mine-large" / "1").manifest.family == "mine"
    assert export_random("vit-xs").exit_code == 0, "the next version of the same"
    # A version that cannot be read says nothing about the name.
    (tmp_path / "mine-mha" / "2" / "manifest.json").write_text("{}")
    assert export_random("vit-cifar").exit_code == 1
