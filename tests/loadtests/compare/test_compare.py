"""A comparison end to end: real services, real Locust; and servers whose difference is known."""

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from service.host import git, process_tree_bytes
from tests.loadtests.compare.runs import command, read, run
from tests.processes import ROOT, in_a_checkout


@in_a_checkout
def test_compare_measures_arms_and_reports(repository: Path, tmp_path: Path) -> None:
    # Another commit's service, with a setting, and again as the A/A arm.
    label = "digits-csra-r2?max_batch=1@git:HEAD"
    asked = ["--repository", str(repository), "--command", "as asked"]
    ended = run(*command(label, tmp_path, *asked, noise=True))
    assert ended.returncode == 0, ended.stderr
    document = read(tmp_path)
    assert [arm["label"] for arm in document["arms"]] == [label, f"{label} (again)"]
    assert {arm["commit"] for arm in document["arms"]} == {git("rev-parse", "HEAD")}
    assert document["command"] == "as asked"
    assert document["rates"]["moderate"] < document["rates"]["high"]
    assert len(document["blocks"]) == 4
    for block in document["blocks"]:
        assert block["failure"] is None
        assert min(block["idle_bytes"], block["after_bytes"]) > 30_000_000
        for name, load in block["loads"].items():
            assert (load["errors"], load["unsent_arrivals"]) == (0, 0), name
            assert load["answered"] > 5, name
            assert load["peak_bytes"] > 30_000_000, name
            assert load["server_cores"] > 0, name
            assert load["generator_cores"] > 0, name
            assert {"decode", "queue", "inference", "total"} <= load["stages_ms"].keys(), name
    # The commit's service took the setting over.
    assert document["info"][label]["batch_ms"].keys() == {"1"}
    assert document["info"][label]["sha256"]
    for name in ("report.html", "report.md", "samples.npz", "variants.svg", "pareto.svg"):
        assert (tmp_path / name).stat().st_size > 1000, name
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as samples:
        assert len(samples.files) == 4 * 3
    assert "2 of 10 rounds: a quick look, not a result" in ended.stderr
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path) not in page
    # What is finished is not gone on with.
    assert not (tmp_path / "blocks").exists()


def test_a_service_that_dies_loses_its_block_and_the_others_are_measured_on(repository: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("digits-csra-r2", tmp_path, "--repository", str(repository)),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        log = tmp_path / "logs" / "round01-digits-csra-r2.log"
        services: list[psutil.Process] = []
        while not log.is_file() or not services:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
            # Those that have just ended have no command line any more.
            with suppress(psutil.Error):
                family = psutil.Process(process.pid).children()
                services = [child for child in family if "service" in child.cmdline()] if len(family) > 1 else []
        services[0].kill()
        _, errors = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == 1, errors
    first, second = read(tmp_path)["blocks"]
    assert "died under load" in first["failure"]
    assert second["failure"] is None
    assert "1 of 2 blocks of digits-csra-r2 failed" in errors


def test_a_model_that_does_not_load_ends_with_the_service_s_own_words(repository: Path, tmp_path: Path) -> None:
    ended = run(*command("no-such-model", tmp_path, "--repository", str(repository)))
    assert ended.returncode == 1
    assert "no version of it" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--models", "a@ftp://x"], "http://HOST:PORT or git:COMMIT"),
        (["--models", "a", "--load", "0.7,0.3"], "the smaller first"),
        (["--models", "a", "--sizes", "big"], "640x480"),
        (["--models", "a", "--data", "nowhere"], "is not a folder"),
        (["--models", "a", "--against", "nowhere.json"], "give the results.json of an earlier compare"),
        pytest.param(["--models", "a@git:no-such-commit"], "cannot be had from this checkout", marks=in_a_checkout),
        (["--models", "a@http://me:secret@b"], "has a password in its URL"),
        (["--models", "a", "--sizes", "64x64", "--data", "photos"], "does not go with --data"),
        (["--models", "a@http://127.0.0.1:1"], "is not ready"),
    ],
)
def test_what_cannot_be_compared_ends_with_the_reason(arguments: list[str], reason: str, tmp_path: Path) -> None:
    ended = run(sys.executable, "-m", "loadtests", "compare", "--out", str(tmp_path), *arguments)
    assert ended.returncode == 1
    assert reason in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_comparison_reports_leaves_no_process_and_goes_on(
    repository: Path, tmp_path: Path, end: signal.Signals
) -> None:
    asked = command("digits-csra-r2", tmp_path, "--repository", str(repository), "--command", "c")
    process = subprocess.Popen(
        asked,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, SIGINT is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (no threads here)
    )
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "blocks" / "0000.json").is_file() or len(family) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
            family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(end)
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == 130
    assert "The same command goes on" in errors
    assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
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


def test_memory_counts_the_whole_tree() -> None:
    code = "import sys, time; block = bytearray(80_000_000); print('ready', flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdin
        process.stdout.readline()
        assert process_tree_bytes(process.pid) > 80_000_000
        process.stdin.close()
        process.wait(10)
    assert process_tree_bytes(process.pid) == 0
