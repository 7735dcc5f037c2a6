"""A comparison end to end: real services, real Locust."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from loadtests.server import tree_bytes
from tests.processes import ROOT


def command(repository: Path, out: Path, *arguments: str) -> list[str]:
    base = [sys.executable, "-m", "loadtests", "compare", "--repository", str(repository), "--out", str(out)]
    return [*base, "--users", "4", "--seconds", "1.5", "--warmup", "0.5", *arguments]


def test_compare_measures_and_reports(repository: Path, tmp_path: Path) -> None:
    arguments = ["--models", "digits-csra-r2", "--rounds", "2"]
    ended = subprocess.run(
        command(repository, tmp_path, *arguments), cwd=ROOT, check=False, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert "digits-csra-r2" in ended.stdout
    assert "16 of 64" in ended.stdout
    document = json.loads((tmp_path / "results.json").read_text())
    (row,) = document["rows"]
    assert row["errors"] == 0
    assert row["answered"] > 20
    assert 0 < row["p50_ms"] < row["p95_ms"]
    # Latencies are of requests that start in the window, throughput of answers that end in it: they differ by no more
    # than the requests under way at its two ends, one a user.
    for block in document["blocks"]:
        assert abs(block["throughput"] * 1.5 - block["answered"]) <= 2 * 4
        assert block["peak_bytes"] >= block["idle_bytes"] > 30_000_000
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_a_model_that_does_not_load_ends_with_the_service_s_own_words(repository: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        command(repository, tmp_path, "--models", "no-such-model"),
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert "no version of it" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_comparison_leaves_no_process(repository: Path, tmp_path: Path, end: signal.Signals) -> None:
    process = subprocess.Popen(
        command(repository, tmp_path, "--models", "digits-csra-r2", "--seconds", "60"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, SIGINT is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (no threads here)
    )
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 60
        while len(family) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
            family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(end)
        _, errors = process.communicate(timeout=40)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == 130
    assert "stopped" in errors
    assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_memory_counts_the_whole_tree() -> None:
    code = "import sys, time; block = bytearray(80_000_000); print('ready', flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdin
        process.stdout.readline()
        assert tree_bytes(process.pid) > 80_000_000
        process.stdin.close()
        process.wait(10)
    assert tree_bytes(process.pid) == 0
