"""The faults, the command, and two faults from end to end."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image
from typer.testing import CliRunner

from loadtests.__main__ import app
from loadtests.experiment.model import Arm, Block
from loadtests.faults import process_faults
from loadtests.faults.attacks import ATTACKS
from loadtests.faults.catalogue import all_faults
from loadtests.faults.client_faults import client_faults
from loadtests.faults.hostile_images import hostile_images
from loadtests.faults.mild import MILD, MILD_LAUNCH, mild_faults
from loadtests.faults.models import Kind
from loadtests.faults.plan import Bin, FaultExperiment, FaultPlan, FaultResult
from loadtests.faults.report import write
from tests.processes import PATIENCE_SECONDS, interruptible, wait_until


def test_every_fault_has_a_name_of_its_own_and_a_model_that_exists(tmp_path: Path) -> None:
    faults = all_faults(tmp_path)
    assert len(faults) >= 20
    for name, fault in faults.items():
        assert name == fault.name
        assert fault.model in get_args(Kind)
        assert fault.what
    assert {name for name, fault in faults.items() if not fault.survives} == {"sigterm", "sigkill", "engine-hang"}


def test_mild_faults_can_all_be_made_with_one_launch() -> None:
    for fault in mild_faults():
        assert fault.name in MILD
        assert fault.survives
        assert fault.model == "numbered"
        assert set(fault.launch.flags) <= set(MILD_LAUNCH.flags)
        assert (fault.launch.log, fault.launch.open_files) == (MILD_LAUNCH.log, None)


def test_every_attack_of_a_fault_exists() -> None:
    named = {fault.act.args[0] for fault in client_faults()}  # type: ignore[attr-defined]
    assert named <= ATTACKS.keys()


def test_hostile_images_are_small_and_their_headers_are_read() -> None:
    for name, image in hostile_images().items():
        assert len(image) < 20_000_000, name
        with Image.open(io.BytesIO(image)) as opened:
            assert opened.size, name


def test_the_faults_are_listed() -> None:
    ended = CliRunner().invoke(app, ["faults", "--faults", "list"])
    assert ended.exit_code == 0
    assert "sigkill" in ended.stdout


def test_an_unknown_fault_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["faults", "--faults", "sigkill,earthquake", "--out", str(tmp_path)])
    assert ended.exit_code == 1
    assert "earthquake: there are" in ended.output
    assert "log-unread" in ended.output


def test_a_fault_that_cannot_be_made_is_reported_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    reasons = {name: fault.impossible for name, fault in all_faults(tmp_path).items() if fault.impossible}
    assert reasons.keys() == {"clock-step", "log-disk-full"}
    text = report(tmp_path, not_run=tuple((name, str(reason)) for name, reason in reasons.items()))
    assert "- clock-step: needs a C compiler" in text
    assert "- log-disk-full: only root can mount" in text


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_wall_clock_of_a_process_can_be_moved_and_its_other_clocks_stay(tmp_path: Path) -> None:
    launch = all_faults(tmp_path)["clock-step"].launch
    process_faults._set_clock(Path(dict(launch.variables)["FAULTS_CLOCK"]), 3600)
    # Python's own clocks, and a sleep, which libfaketime breaks.
    code = "import time; time.sleep(0.01); print(time.time(), time.monotonic())"
    variables = {**os.environ, **dict(launch.variables)}
    said = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    wall, monotonic = map(float, said.stdout.split())
    assert wall - time.time() == pytest.approx(3600, abs=PATIENCE_SECONDS)
    assert monotonic == pytest.approx(time.monotonic(), abs=PATIENCE_SECONDS)


def test_the_report_names_what_is_not_as_promised(tmp_path: Path) -> None:
    text = report(tmp_path, result(swapped=1, lost=2), result(fault="other"))
    assert "- one: 1 answers to another image" in text
    assert "- one: 2 requests lost" in text
    assert "other:" not in text.split("## What was done")[0]
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["broken"] == ["one: 1 answers to another image", "one: 2 requests lost"]
    assert (tmp_path / "faults.svg").stat().st_size > 5000


def test_a_service_that_does_not_start_under_a_fault_breaks_a_promise_and_is_reported(tmp_path: Path) -> None:
    never = FaultResult(fault="one", what="a fault", survives=True, unmet=("the service did not start: no space",))
    assert "- one: the service did not start: no space" in report(tmp_path, vars(never))


def test_a_report_without_broken_promises_says_so(tmp_path: Path) -> None:
    assert "Nothing was swapped, and nothing lost" in report(tmp_path, result())


def result(fault: str = "one", **counts: int) -> dict[str, object]:
    names = ("answered", "refused", "failed", "unconnected", "unsent", "lost", "swapped", "cut")
    timeline = (Bin(at_s=0.0, answered=1, refused=1, others=1, worst_ms=5.0),)
    zeros = dict.fromkeys(names, 0)
    return asdict(FaultResult(fault=fault, what="a fault", survives=True, counts=zeros | counts, timeline=timeline))


def report(out: Path, *results: dict[str, object], not_run: tuple[tuple[str, str], ...] = ()) -> str:
    arms = tuple(Arm(label=str(each["fault"]), model="numbered") for each in results)
    plan = FaultPlan(repository=out, arms=arms, data=None, seconds=5, rate=10, not_run=not_run)
    blocks = [Block(arm=arm.label, round=0, info={"result": each}) for arm, each in zip(arms, results, strict=True)]
    return write(FaultExperiment(plan=plan, blocks=blocks), out).read_text()


def results_in(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """results.json, and the results of its faults."""
    document = json.loads((out / "results.json").read_text())
    return document, [block["info"]["result"] for block in document["blocks"]]


@pytest.mark.long
def test_a_killed_process_and_an_unread_log_from_end_to_end(tmp_path: Path) -> None:
    asked = ["--faults", "sigkill,stderr-closed", "--rate", "10", "--seconds", "3", "--out", str(tmp_path)]
    ended = CliRunner().invoke(app, ["faults", *asked])
    document, (killed, closed) = results_in(tmp_path)
    assert (killed["fault"], closed["fault"]) == ("sigkill", "stderr-closed")
    assert killed["exit_codes"] == [-signal.SIGKILL]
    assert killed["counts"]["unconnected"] > 0
    assert killed["first_answer_s"] > 0
    for found in (killed, closed):
        assert found["counts"]["swapped"] == 0
        assert found["counts"]["answered"] > 0
        assert found["after"]["answered"] > 0
        assert found["peak_bytes"] > 30_000_000
    assert ended.exit_code == int(bool(document["broken"])), ended.output
    assert not (tmp_path / "blocks").exists()


@pytest.mark.long
def test_an_interrupted_run_leaves_no_service_and_is_resumed_at_the_next_fault(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtests", "faults", "--faults", "sigstop,sigkill", "--rate", "10"]
    command += ["--seconds", "3", "--out", str(tmp_path)]
    with interruptible(*command) as process:
        wait_until((tmp_path / "blocks" / "Block-0000").exists, process)
        os.kill(process.pid, signal.SIGTERM)
        process.wait(PATIENCE_SECONDS)
    assert process.returncode == 130
    assert [found["fault"] for found in results_in(tmp_path)[1]] == ["sigstop"]
    with interruptible(*command) as process:
        process.wait(PATIENCE_SECONDS)
    document, found = results_in(tmp_path)
    assert [each["fault"] for each in found] == ["sigstop", "sigkill"]
    assert document["ended_early"] is None
