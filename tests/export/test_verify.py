"""Bundles are checked from their files alone, and described."""

import shutil
from pathlib import Path

import onnx
import pytest
from typer.testing import CliRunner

from export.__main__ import app
from export.profile import bundle_arm
from service.bundle import CONTENT_FILES, MANIFEST_FILE, MODEL_FILE, SUMS_FILE
from service.manifest import Manifest
from tests.service.conftest import resum

runner = CliRunner()


@pytest.fixture
def bundle(repository: Path, tmp_path: Path) -> Path:
    """A copy of digits-csra-r2, version 1, to damage."""
    shutil.copytree(repository, tmp_path / "models")
    return tmp_path / "models" / "digits-csra-r2" / "1"


def test_a_whole_bundle_passes_every_check(bundle: Path) -> None:
    result = runner.invoke(app, ["verify", str(bundle)])
    assert result.exit_code == 0, result.stderr
    lines = [line.split()[:2] for line in result.stdout.splitlines()]
    assert lines == [["ok", name] for name in ("digests", "labels", "operators", "shapes", "kernels", "golden")]


@pytest.mark.parametrize("file", [*CONTENT_FILES, SUMS_FILE])
@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_one_flipped_bit_is_found_and_named(bundle: Path, file: str, place: float) -> None:
    data = bytearray((bundle / file).read_bytes())
    data[int(place * len(data))] ^= 1
    (bundle / file).write_bytes(data)
    result = runner.invoke(app, ["verify", str(bundle)])
    assert result.exit_code == 1
    assert file in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("sums", ["", "not a line\n", "0" * 64 + "  ../model.onnx\n"])
def test_a_malformed_sums_file_is_an_error(bundle: Path, sums: str) -> None:
    (bundle / SUMS_FILE).write_text(sums)
    result = runner.invoke(app, ["verify", str(bundle)])
    assert result.exit_code == 1
    assert SUMS_FILE in result.stderr


def test_a_manifest_that_contradicts_the_graph_is_refused(bundle: Path) -> None:
    manifest = Manifest.model_validate_json((bundle / MANIFEST_FILE).read_text())
    wrong = manifest.model_copy(update={"op_types": {**manifest.op_types, "Gemm": 1}})
    (bundle / MANIFEST_FILE).write_text(wrong.model_dump_json())
    resum(bundle)
    result = runner.invoke(app, ["verify", str(bundle)])
    assert result.exit_code == 1
    assert "states op_types" in result.stderr


@pytest.mark.parametrize("what", ["weights", "operator", "rubbish"])
def test_a_changed_graph_with_new_digests_is_refused(bundle: Path, what: str) -> None:
    path = bundle / MODEL_FILE
    graph = onnx.load(path)
    if what == "weights":
        bias = next(tensor for tensor in graph.graph.initializer if tensor.name.endswith("head.bias"))
        values = onnx.numpy_helper.to_array(bias) + 1
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    if what == "operator":
        graph.graph.node[3].domain = "com.example"
        graph.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    path.write_bytes(b"rubbish" if what == "rubbish" else graph.SerializeToString())
    resum(bundle)
    result = runner.invoke(app, ["verify", str(bundle)])
    assert result.exit_code == 1
    expected = {"weights": "differ from the golden ones", "operator": "com.example", "rubbish": "not a valid ONNX file"}
    assert expected[what] in result.stderr
    assert "Traceback" not in result.stderr


def test_a_folder_that_is_not_a_version_is_refused_with_the_fix(bundle: Path) -> None:
    result = runner.invoke(app, ["verify", str(bundle.parent)])
    assert result.exit_code == 1
    assert "name the folder of a version" in result.stderr


def test_list_shows_every_version_and_what_is_broken(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    shutil.copytree(bundle, bundle.parent / "2")
    (bundle.parent / "2" / MODEL_FILE).write_bytes(b"")
    result = runner.invoke(app, ["list", "--repository", str(bundle.parents[1])])
    assert result.exit_code == 0, result.stderr
    first, second = (line for line in result.stdout.splitlines() if "digits-csra-r2" in line)
    assert "16 of 64" in first
    assert "682,314" in first
    assert "broken" in second
    assert "sha256" in second


def test_inspect_shows_the_facts_about_a_bundle(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    result = runner.invoke(app, ["inspect", str(bundle)])
    assert result.exit_code == 0, result.stderr
    for fact in (
        "0 with another top-1",
        "csra-r2 of vit-xs",
        "stride 2, rank 32",
        "16 of 64",
        "682,314",
        "on 360 test images of digits",
        "opset",
    ):
        assert fact in result.stdout


def test_a_bundle_without_attention_is_verified_described_and_profiled(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    manifest = Manifest.model_validate_json((bundle / MANIFEST_FILE).read_text())
    other = manifest.model_copy(update={"attention": None, "macs": None, "architecture": "a small network"})
    (bundle / MANIFEST_FILE).write_text(other.model_dump_json())
    resum(bundle)
    for command in (
        ["verify", str(bundle)],
        ["list", "--repository", str(bundle.parents[1])],
        ["inspect", str(bundle)],
    ):
        result = runner.invoke(app, command)
        assert result.exit_code == 0, result.stderr
        if command[0] == "inspect":
            assert "a small network" in result.stdout
            assert "unknown" in result.stdout
    assert bundle_arm(bundle).attention is None


def test_kernels_lists_every_kind_of_node_and_finds_a_gap(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    result = runner.invoke(app, ["kernels", str(bundle)])
    assert result.exit_code == 0, result.stderr
    assert "Attention-23" in result.stdout
    assert "OperatorKernels.md" in result.stdout
    graph = onnx.load(bundle / MODEL_FILE)
    softmax = next(node for node in graph.graph.node if node.op_type == "Softmax")
    softmax.op_type = "Hardmax"
    (bundle / MODEL_FILE).write_bytes(graph.SerializeToString())
    resum(bundle)
    result = runner.invoke(app, ["kernels", str(bundle)])
    assert result.exit_code == 1
    assert "no kernel for this version" in result.stdout


def test_diff_names_what_differs_and_nothing_else(bundle: Path) -> None:
    other = bundle.parent / "2"
    shutil.copytree(bundle, other)
    same = runner.invoke(app, ["diff", str(bundle), str(other)])
    assert (same.exit_code, same.stdout.strip()) == (0, "no difference")
    manifest = Manifest.model_validate_json((other / MANIFEST_FILE).read_text())
    (other / MANIFEST_FILE).write_text(manifest.model_copy(update={"macs": 7}).model_dump_json())
    resum(other)
    result = runner.invoke(app, ["diff", str(bundle), str(other)])
    assert result.exit_code == 1
    assert "macs" in result.stdout
    assert "params" not in result.stdout
