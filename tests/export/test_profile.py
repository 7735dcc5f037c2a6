"""Profiles: one process per measurement, figures from known measurements, and an interrupt that keeps them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from export import profile as profile_module
from export import profile_report
from export.__main__ import app
from export.graph import ExportError
from export.probe import Probe
from export.profile import Arm, Measured, Setup, bundle_arm, measure, random_arms
from service.manifest import Attention
from tests.processes import PATIENCE_SECONDS, ROOT
from training.models import architecture

SETUP = Setup(batches=(1, 4), rounds=2, seconds=0.05, threads=1, device="cpu")


def arm(label: str) -> Arm:
    attention = Attention(variant=label, tokens=64, kv_tokens=16)
    return Arm(label=label, model=Path(f"{label}.onnx"), img_size=32, attention=attention)


def test_each_round_is_measured_in_processes_of_its_own(repository: Path) -> None:
    one = bundle_arm(repository / "digits-csra-r2" / "1")
    descriptions: list[str] = []
    measured = measure([one], SETUP, descriptions.append)
    assert measured.rounds == 2
    # Every other round backwards.
    assert [line.split(", ")[1] for line in descriptions] == ["batch 1", "batch 4", "batch 4", "batch 1"]
    cells = {cell.batch: cell for cell in measured.cells()}
    assert cells[4].peak_bytes > cells[4].added_bytes > 0
    assert cells[1].images_per_s == pytest.approx(1000 / cells[1].latency_ms)
    assert cells[1].ratio.ratio == 1


def test_ratio_and_memory_follow_from_the_measurements(tmp_path: Path) -> None:
    """The second model takes half the time of the first in every round, however much rounds differ."""
    slow = [1.0, 3.0, 0.5, 2.0, 1.5, 4.0]
    probes = {
        ("mha", 1): [
            Probe(seconds=[s, s, 9 * s], idle_bytes=100_000_000, peak_bytes=300_000_000, cpu_seconds=s) for s in slow
        ],
        ("csra-r2", 1): [
            Probe(seconds=[s / 2], idle_bytes=90_000_000, peak_bytes=190_000_000, cpu_seconds=s / 2) for s in slow
        ],
    }
    setup = Setup(batches=(1,), rounds=6, seconds=1, threads=2, device="cpu")
    measured = Measured(arms=[arm("mha"), arm("csra-r2")], setup=setup, probes=probes, rounds=6)
    _, faster = measured.cells()
    assert faster.ratio.ratio == pytest.approx(2)
    assert (faster.added_bytes, faster.peak_bytes) == (100_000_000, 190_000_000)
    text = profile_report.markdown(measured)
    assert "| 1 | csra-r2 | 16 of 64 |" in text
    assert "×0.50" in text
    assert "6 interleaved rounds" in text
    assert "+22.9 % throughput, -27.2 % memory" in text
    files = profile_report.write(measured, tmp_path)
    assert all(path.stat().st_size > 500 for path in files)
    record = json.loads((tmp_path / "profile.json").read_text())
    assert record["cells"][1]["rates"] == [2.0, 0.667, 4.0, 1.0, 1.333, 0.5]
    assert record["environment"]["onnxruntime"]


def test_a_model_that_cannot_be_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    broken = Arm(label="bad", model=tmp_path / "bad.onnx", img_size=32, attention=None)
    with pytest.raises(ExportError, match=r"bad at batch 1 cannot be measured: .*cannot load the model"):
        measure([broken], SETUP, lambda _: None)


def test_random_weights_are_exported_in_every_combination(tmp_path: Path) -> None:
    spec = architecture("vit-xs", "csra-r2", img_size=8).model_copy(update={"depth": 1})
    arms = list(random_arms(tmp_path, [spec], ["fp32"], [23], ["shaped", "unshaped"]))
    assert [arm.label for arm in arms] == ["csra-r2 shaped", "csra-r2 unshaped"]
    assert [arm.model.name for arm in arms] == ["csra-r2-shaped.onnx", "csra-r2-unshaped.onnx"]
    assert all(arm.model.stat().st_size > 10_000 and arm.img_size == 8 for arm in arms)
    assert arms[0].attention == Attention(variant="csra-r2", tokens=4, kv_tokens=1, stride=2, rank=32)


def test_a_bundle_is_profiled_by_operator_and_reported(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    quick = ["--batch", "2", "--rounds", "1", "--seconds", "0.05", "--threads", "1", "--device", "cpu"]
    bundle = str(repository / "digits-csra-r2" / "1")
    result = CliRunner().invoke(app, ["profile", bundle, *quick, "--by-operator", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    attention = next(line for line in result.stdout.splitlines() if line.strip().startswith("Attention"))
    assert float(attention.split()[1]) > 0
    (cell,) = json.loads((tmp_path / "profile.json").read_text())["cells"]
    assert cell["arm"] == "digits-csra-r2/1"
    assert "digits-csra-r2/1" in result.stdout
    assert (tmp_path / "profile.svg").read_text().startswith("<?xml")


def test_runtimes_are_compared_side_by_side(repository: Path, tmp_path: Path) -> None:
    quick = ["--batch", "1", "--rounds", "1", "--seconds", "0.05", "--threads", "1", "--device", "cpu"]
    bundle = str(repository / "digits-csra-r2" / "1")
    runtimes = "onnxruntime,openvino,openvino-bf16"
    result = CliRunner().invoke(app, ["profile", bundle, *quick, "--runtimes", runtimes, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    cells = json.loads((tmp_path / "profile.json").read_text())["cells"]
    assert [cell["arm"] for cell in cells] == [f"digits-csra-r2/1 {runtime}" for runtime in runtimes.split(",")]
    assert all(0 < cell["cpu_ms"] < 1000 and cell["added_bytes"] >= 0 for cell in cells)


@pytest.mark.long
def test_random_weights_are_profiled_by_combination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    arguments = ["profile", "--preset", "vit-xs", "--variants", "mha,csra-r2", "--forms", "shaped,unshaped"]
    quick = ["--batch", "2", "--rounds", "1", "--seconds", "0.05", "--threads", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, *quick, "--by-operator", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    attention = next(line for line in result.stdout.splitlines() if line.strip().startswith("Attention"))
    assert all(float(cell) > 0 for cell in attention.split()[1:5])
    labels = [cell["arm"] for cell in json.loads((tmp_path / "profile.json").read_text())["cells"]]
    assert labels == ["mha shaped", "mha unshaped", "csra-r2 shaped", "csra-r2 unshaped"]
    assert all(label in result.stdout for label in labels)
    assert (tmp_path / "profile.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precisions", "bf16"], "choose from fp32, fp16, int8, int8-dynamic"),
        (["--variants", "mha,xyz"], "xyz"),
        (["--batch", "0"], "batch sizes '0' are not whole numbers"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--opsets", "99"], "opset 99 cannot be exported"),
        (["nowhere/1"], "cannot be listed"),
        (["--runtimes", "tvm"], "choose from onnxruntime, openvino"),
        (["--runtimes", "openvino", "--by-operator"], "no --by-operator"),
    ],
)
def test_wrong_arguments_name_the_fix(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["profile", "--preset", "vit-xs", *arguments])
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_ctrl_c_keeps_the_complete_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Probe(seconds=[0.1], idle_bytes=1, peak_bytes=2, cpu_seconds=0.1)
    monkeypatch.setattr(profile_module, "_probe", lambda *_: found)
    setup = Setup(batches=(1,), rounds=500, seconds=1, threads=1, device="cpu")

    def measure_until(interrupted_at: int) -> Measured:
        probes = 0

        def on_probe(_: str) -> None:
            nonlocal probes
            probes += 1
            if probes == interrupted_at:
                signal.raise_signal(signal.SIGINT)

        return measure([arm("mha"), arm("csra-r2")], setup, on_probe)

    measured = measure_until(5)
    # The fifth probe was the first of the third round.
    assert measured.rounds == 2
    assert [len(cell.rates) for cell in measured.cells()] == [2, 2]
    assert measure_until(4).rounds == 2
    with pytest.raises(KeyboardInterrupt):
        measure_until(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.long
def test_ctrl_c_in_a_terminal_writes_the_complete_rounds(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "export", "profile", str(repository / "digits-csra-r2" / "1"), "--batch", "1"]
    command += ["--rounds", "500", "--seconds", "0.05", "--threads", "1", "--device", "cpu", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    # Three probes, one after the other: then two rounds are whole.
    probes: set[int] = set()
    end = time.monotonic() + PATIENCE_SECONDS
    while len(probes) < 3:
        assert process.poll() is None
        assert time.monotonic() < end
        probes |= {child.pid for child in psutil.Process(process.pid).children()}
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, stderr
    assert "of 500 rounds" in stderr
    assert json.loads((tmp_path / "profile.json").read_text())["rounds"] >= 1
