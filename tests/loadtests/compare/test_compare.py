"""A comparison end to end: real services, real Locust."""

import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from loadtests.__main__ import app
from service.host import git
from tests.loadtests.compare.runs import arguments, command, read, run
from tests.loadtests.servers import fake_server
from tests.processes import PATIENCE_SECONDS, ROOT, in_a_checkout, interruptible, still_running

BEFORE_THE_RENAMES = "38c342e"
"""A commit whose service has other names for its settings, and reads manifests of version 1 only."""


def test_compare_measures_arms_in_turn_and_reports(tmp_path: Path) -> None:
    with fake_server(lambda _: 0.01) as one, fake_server(lambda _: 0.01) as other:
        arms = [f"m@{one.url}", f"m@{other.url}"]
        ended = run(*arguments(",".join(arms), tmp_path, "--rounds", "1", "--seconds", "3", "--command", "as asked"))
    assert ended.returncode == 0, ended.stderr
    document = read(tmp_path)
    assert document["command"] == "as asked"
    assert document["rates"]["moderate"] < document["rates"]["high"]
    assert sorted(block["arm"] for block in document["blocks"]) == sorted(arms)
    for block in document["blocks"]:
        assert block["failure"] is None
        assert list(block["loads"]) == ["moderate", "high", "saturated"]
        assert [load["mode"] for load in block["loads"].values()] == ["open", "open", "closed"]
        for name, load in block["loads"].items():
            assert load["errors"] == 0, name
            assert load["answered"] > 0, name
    # A server at a URL does not tell its memory, and none is made up.
    assert {load["peak_bytes"] for block in document["blocks"] for load in block["loads"].values()} == {0}
    for name in ("report.html", "report.md", "samples.npz", "variants.svg", "pareto.svg"):
        assert (tmp_path / name).stat().st_size > 500, name
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as samples:
        assert len(samples.files) == 2 * 3
    assert str(tmp_path) not in (tmp_path / "report.html").read_text()
    # What is finished is not resumed.
    assert not (tmp_path / "blocks").exists()


@in_a_checkout
@pytest.mark.long
def test_services_of_other_commits_with_settings_are_arms(repository: Path, tmp_path: Path) -> None:
    label = "digits-csra-r2?max_batch=1@git:HEAD"
    ended = run(*arguments(label, tmp_path, "--repository", str(repository), "--seconds", "3", aa_run=True))
    assert ended.returncode == 0, ended.stderr
    document = read(tmp_path)
    assert [arm["label"] for arm in document["arms"]] == [label, f"{label} (again)"]
    assert {arm["commit"] for arm in document["arms"]} == {git("rev-parse", "HEAD")}
    assert len(document["blocks"]) == 4
    for block in document["blocks"]:
        assert block["failure"] is None
        assert min(block["idle_bytes"], block["after_bytes"]) > 30_000_000
        for name, load in block["loads"].items():
            assert (load["errors"], load["unsent_arrivals"]) == (0, 0), name
            assert load["peak_bytes"] > 30_000_000, name
            assert load["server_cores"] > 0, name
            assert load["generator_cores"] > 0, name
            assert {"decode", "queue", "inference", "total"} <= load["stages_ms"].keys(), name
    # The commit's service took the setting over.
    assert document["info"][label]["batch_ms"].keys() == {"1"}
    assert document["info"][label]["sha256"]
    assert "2 of 10 rounds" in ended.stderr


@in_a_checkout
@pytest.mark.long
def test_a_commit_of_before_the_renames_is_an_arm_with_its_own_models(tmp_path: Path) -> None:
    try:
        git("rev-parse", "--verify", f"{BEFORE_THE_RENAMES}^{{commit}}")
    except subprocess.CalledProcessError:
        pytest.skip(f"this checkout has no commit {BEFORE_THE_RENAMES}")
    old = f"cifar100-csra-r2@git:{BEFORE_THE_RENAMES}"
    settings = ["--service-args", "--intra-op-threads 1 --brand-new-setting 3"]
    ended = run(*arguments(old, tmp_path, "--rounds", "1", *settings))
    assert ended.returncode == 0, ended.stderr
    assert "does not know brand_new_setting" in ended.stderr
    document = read(tmp_path)
    (block,) = document["blocks"]
    assert block["failure"] is None
    info = document["info"][old]
    assert (info["name"], info["kv_tokens"], info["img_size"]) == ("cifar100-csra-r2", 16, 32)


@pytest.mark.long
def test_a_service_that_dies_loses_its_block_and_the_others_are_measured(repository: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(*arguments("digits-csra-r2", tmp_path, "--repository", str(repository))),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        log = tmp_path / "logs" / "round01-digits-csra-r2.log"
        children: dict[str, psutil.Process] = {}
        # The service is under load while a generator runs.
        while not log.is_file() or children.keys() != {"service", "locust"}:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
            # Those that have just ended have no command line any more; the calibration's end before the log exists.
            with suppress(psutil.Error, IndexError):
                if not log.is_file():
                    continue
                children = {child.cmdline()[2]: child for child in psutil.Process(process.pid).children()}
        children["service"].kill()
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == 1, errors
    first, second = read(tmp_path)["blocks"]
    assert "died under load" in first["failure"]
    assert second["failure"] is None
    assert "1 of 2 blocks of digits-csra-r2 failed" in errors


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (["--models", "a@ftp://x"], "http://HOST:PORT or git:COMMIT"),
        (["--models", "a", "--load", "0.7,0.3"], "the smaller first"),
        (["--models", "a", "--sizes", "big"], "640x480"),
        (["--models", "a", "--data", "nowhere"], "is not a folder"),
        (["--models", "a", "--against", "nowhere.json"], "give the results.json of an earlier compare"),
        pytest.param(["--models", "a@git:no-such-commit"], "is not available in this checkout", marks=in_a_checkout),
        (["--models", "a@http://me:secret@b"], "has a password, which the report would show"),
        (["--models", "a", "--sizes", "64x64", "--data", "photos"], "does not go with --data"),
        (["--models", "a@http://127.0.0.1:1"], "is not ready"),
        (["--models", "no-such-model"], "no version of it"),
    ],
)
def test_what_cannot_be_compared_ends_with_the_reason(asked: list[str], reason: str, tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["compare", "--out", str(tmp_path), *asked])
    assert ended.exit_code == 1, ended.output
    assert reason in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.long
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_comparison_reports_leaves_no_process_and_is_resumed(
    repository: Path, tmp_path: Path, end: signal.Signals
) -> None:
    asked = arguments("digits-csra-r2", tmp_path, "--repository", str(repository), "--command", "c")
    family: list[psutil.Process] = []
    with interruptible(*command(*asked)) as process:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (tmp_path / "blocks" / "Block-0000").is_file() or len(family) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
            family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(end)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert "The same command resumes" in errors
    assert not still_running(family)
    partial = read(tmp_path)
    assert partial["ended_early"] == "interrupted"
    if end == signal.SIGTERM:
        return
    first = partial["blocks"][0]

    ended = run(*asked)
    assert ended.returncode == 0, ended.stderr
    whole = read(tmp_path)
    assert whole["ended_early"] is None
    assert len(whole["blocks"]) == 2
    assert whole["blocks"][0] == first
    assert whole["rates"] == partial["rates"]


@pytest.mark.long
def test_a_measurement_that_is_killed_takes_its_service_along(repository: Path, tmp_path: Path) -> None:
    asked = arguments("digits-csra-r2", tmp_path, "--repository", str(repository))
    process = subprocess.Popen(command(*asked), cwd=ROOT, stderr=subprocess.DEVNULL)
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(family) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
            family = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.communicate()
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_SECONDS)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
