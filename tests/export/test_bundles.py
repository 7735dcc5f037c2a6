"""From a run to a published bundle, and what stops one from being published."""

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
from typer.testing import CliRunner

from export.__main__ import app
from export.graph import ExportError, serialise, to_onnx
from export.parity import check_parity
from export.precision import TOLERANCES
from service.bundle import CONTENT_FILES, SUMS_FILE, read_bundle
from service.engine import Engine
from service.manifest import Attention
from training.data import Split, load_dataset
from training.runs import load_final

ROOT = Path(__file__).parents[2]


def test_bundle_says_what_the_model_is(repository: Path) -> None:
    bundle = read_bundle(repository / "digits-csra-r2" / "1")
    manifest = bundle.manifest
    assert (manifest.name, manifest.family, manifest.architecture) == ("digits-csra-r2", "digits", "vit-xs")
    assert manifest.attention == Attention(variant="csra-r2", tokens=64, kv_tokens=16, stride=2, rank=32)
    assert bundle.labels == tuple("0123456789")
    assert manifest.accuracy
    assert (manifest.accuracy.split, manifest.accuracy.n) == ("test", 360)
    assert manifest.parity.images == 256 + 3
    assert manifest.parity.max_abs_logit < 1e-3
    assert manifest.parity.top1_flips == 0
    assert (manifest.precision, manifest.max_batch, manifest.devices) == ("fp32", None, ("cpu", "cuda", "tensorrt"))
    golden = bundle.golden()
    assert len(golden.images) == 8
    np.testing.assert_allclose(golden.probabilities.sum(axis=1), 1, atol=1e-5)


def test_two_exports_from_two_folders_give_the_same_bytes(digits_run: Path, tmp_path: Path) -> None:
    folders = []
    for name in ("first", "a-second-and-much-longer"):
        here = tmp_path / name
        here.mkdir()
        shutil.copytree(digits_run, here / "run")
        # Another process and another working directory, with the code imported from another place too.
        for package in ("training", "export", "service"):
            shutil.copytree(ROOT / package, here / package, ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run([sys.executable, "-m", "export", "run", "run", "--repository", "models"], cwd=here, check=True)
        folders.append(here / "models" / "digits-csra-r2" / "1")
    for file in (*CONTENT_FILES, SUMS_FILE):
        first, second = ((folder / file).read_bytes() for folder in folders)
        assert first == second, f"{file} differs"
        assert str(tmp_path).encode() not in first
        assert str(ROOT).encode() not in first


def test_the_next_free_version_is_published(digits_run: Path, repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "models"
    shutil.copytree(repository, copy)
    result = CliRunner().invoke(app, ["run", str(digits_run), "--repository", str(copy)])
    assert result.exit_code == 0, result.stderr
    assert "digits-csra-r2/2" in result.stdout.replace("\n", "")
    assert sorted(entry.name for entry in (copy / "digits-csra-r2").iterdir()) == ["1", "2"]


def test_a_family_can_be_named(digits_run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", str(digits_run), "--repository", str(tmp_path), "--family", "numbers"])
    assert result.exit_code == 0, result.stderr
    assert read_bundle(tmp_path / "numbers-csra-r2" / "1").manifest.family == "numbers"


def first_images(count: int) -> npt.NDArray[np.uint8]:
    test = load_dataset("digits").test
    assert isinstance(test, Split)
    return test.images[:count]


@pytest.mark.parametrize("change", [0.5, float("nan")])
def test_a_graph_that_disagrees_with_torch_is_refused(digits_run: Path, change: float) -> None:
    classifier, _ = load_final(digits_run)
    graph = to_onnx(classifier)
    head = next(tensor for tensor in graph.graph.initializer if tensor.name.endswith("head.bias"))
    values = numpy_helper.to_array(head).copy()
    values[3] += change
    head.CopyFrom(numpy_helper.from_array(values, head.name))
    images = first_images(16)
    with pytest.raises(ExportError, match=r"disagree|not finite"):
        check_parity(classifier, Engine(serialise(graph)), images, TOLERANCES["fp32"])


def test_a_top1_flip_is_refused_however_small(digits_run: Path) -> None:
    classifier, _ = load_final(digits_run)
    # Two classes with the same answer, apart from a difference far below the tolerance and of the other sign in ONNX.
    head = classifier.model.head
    assert isinstance(head, torch.nn.Linear)
    with torch.no_grad():
        head.weight[1] = head.weight[0]
        head.bias[1] = head.bias[0] + 1e-4
        head.bias[:2] += 50
    graph = to_onnx(classifier)
    tensor = next(tensor for tensor in graph.graph.initializer if tensor.name.endswith("head.bias"))
    values = numpy_helper.to_array(tensor).copy()
    values[0] += 2e-4
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(ExportError, match="top-1 flips"):
        check_parity(classifier, Engine(serialise(graph)), first_images(8), TOLERANCES["fp32"])


def test_random_weights_are_exported_and_said_to_be_random(tmp_path: Path) -> None:
    arguments = ["run", "--random-weights", "--preset", "vit-xs", "--variant", "lsra-r3", "--img-size", "48"]
    for repository in ("a", "b"):
        result = CliRunner().invoke(app, [*arguments, "--repository", str(tmp_path / repository)])
        assert result.exit_code == 0, result.stderr
    one, again = (tmp_path / repository / "vit-xs-48-random-lsra-r3" / "1" for repository in ("a", "b"))
    manifest = read_bundle(one).manifest
    assert manifest.attention
    assert (manifest.random_weights, manifest.accuracy, manifest.attention.kv_tokens) == (True, None, 48)
    assert (one / SUMS_FILE).read_bytes() == (again / SUMS_FILE).read_bytes()
    golden = read_bundle(one).golden()
    assert np.ptp(golden.logits, axis=0).max() > 1e-3, "every image has the same answer"


def test_a_run_or_random_weights_must_be_named(tmp_path: Path) -> None:
    for arguments in (["run"], ["run", str(tmp_path), "--random-weights"]):
        result = CliRunner().invoke(app, [*arguments, "--repository", str(tmp_path)])
        assert result.exit_code == 2
        assert "--random-weights" in result.stderr


def test_an_unfinished_run_says_to_train_it_first(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", str(tmp_path), "--repository", str(tmp_path / "models")])
    assert result.exit_code == 1
    assert "train it to the end first" in result.stderr
    assert not (tmp_path / "models").exists()


def test_onnx_file_is_valid_on_its_own(repository: Path) -> None:
    onnx.checker.check_model(repository / "digits-csra-r2" / "1" / "model.onnx", full_check=True)
