"""A comparison end to end: real services, real Locust; and servers whose difference is known."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from loadtests.server import tree_bytes
from tests.loadtests.servers import fake_server
from tests.processes import ROOT

SHORT = ["--blocks", "2", "--seconds", "1", "--warmup", "0", "--users", "4", "--searches", "0", "--no-noise-arm"]


def command(models: str, out: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "loadtests", "compare", "--models", models, "--out", str(out), *SHORT, *arguments]


def run(*asked: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(asked, cwd=ROOT, check=False, capture_output=True, text=True, timeout=280)


def read(out: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((out / "results.json").read_text())
    return document


def test_compare_measures_arms_of_all_kinds_and_reports(repository: Path, tmp_path: Path) -> None:
    models = "digits-csra-r2,digits-csra-r2?max_batch=1@git:HEAD"
    ended = run(*command(models, tmp_path, "--repository", str(repository), "--searches", "1", "--command", "as asked"))
    assert ended.returncode == 0, ended.stderr
    document = read(tmp_path)
    assert [arm["label"] for arm in document["arms"]] == models.split(",")
    assert document["command"] == "as asked"
    assert document["rates"]["moderate"] < document["rates"]["high"]
    assert len(document["blocks"]) == 4
    for block in document["blocks"]:
        assert block["failure"] is None
        assert min(block["idle_bytes"], block["after_bytes"]) > 30_000_000
        for name, load in block["loads"].items():
            assert (load["errors"], load["unsent"]) == (0, 0), name
            assert load["answered"] > 5, name
            assert load["peak_bytes"] > 30_000_000, name
            assert load["server_cores"] > 0, name
            assert load["generator_cores"] > 0, name
            assert {"decode", "queue", "inference", "total"} <= load["stages_ms"].keys(), name
    for search in document["searches"]:
        assert search["rate"] is None or search["rate"] >= 0
    # The service of the other commit, with its setting, is the one that was asked.
    infos = document["info"]
    assert infos[models.split(",")[1]]["kv_tokens"] == 16
    for name in ("report.html", "report.md", "samples.npz", "variants.svg", "pareto.svg"):
        assert (tmp_path / name).stat().st_size > 1000, name
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as samples:
        assert len(samples.files) == 4 * 3
    assert "2 of 10 rounds: a look, not a result" in ended.stderr
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path) not in page
    # What is finished is not gone on with.
    assert not (tmp_path / "blocks").exists()


def test_a_tenth_slower_is_found_and_counts_as_regression(tmp_path: Path) -> None:
    # One image at a time: 20 ms each, or 22.
    with fake_server(lambda _: 0.02, serial=True) as fast, fake_server(lambda _: 0.022, serial=True) as slow:
        arms = f"m@{fast.url},m@{slow.url}"
        asked = ["--blocks", "6", "--loads", "0.3,0.5", "--budget-minutes", "10"]
        ended = run(*command(arms, tmp_path / "new", *asked))
        assert ended.returncode == 0, ended.stderr
    document = read(tmp_path / "new")
    (row,) = [row for row in document["rows"] if row["arm"]["label"].endswith(slow.url)]
    throughput = row["figures"]["throughput"]["change"]
    assert throughput["verdict"] == "worse"
    assert throughput["estimate"] == pytest.approx(1 / 1.1, abs=0.03)
    assert throughput["low"] < 1 / 1.1 + 0.03 < throughput["high"] + 0.06
    assert row["figures"]["moderate_p50"]["change"]["verdict"] == "worse"
    # Memory of a server elsewhere is not known, and not made up.
    assert row["figures"]["peak_bytes"]["value"] is None


def test_a_server_that_fails_on_the_way_is_told_and_not_averaged_away(tmp_path: Path) -> None:
    # It answers its errors as quickly as its answers.
    sick = fake_server(lambda _: 0.005, status=lambda number: 200 if number < 1500 else 500)
    with fake_server(lambda _: 0.005) as well, sick as ill:
        ended = run(*command(f"m@{well.url},m@{ill.url}", tmp_path, "--blocks", "3"))
    document = read(tmp_path)
    rows = {row["arm"]["label"]: row for row in document["rows"]}
    assert rows[f"m@{well.url}"]["errors"] == 0
    failed = rows[f"m@{ill.url}"]
    assert failed["errors"] > 100
    assert failed["figures"]["high_p99"]["value"] is None
    assert any(ill.url in warning and "not answered" in warning for warning in document["warnings"])
    assert "warning" in ended.stderr


def test_a_model_that_does_not_load_ends_with_the_service_s_own_words(repository: Path, tmp_path: Path) -> None:
    ended = run(*command("no-such-model", tmp_path, "--repository", str(repository)))
    assert ended.returncode == 1
    assert "no version of it" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--models", "a@ftp://x"], "http://HOST:PORT or git:COMMIT"),
        (["--models", "a", "--loads", "0.7,0.3"], "the smaller first"),
        (["--models", "a", "--sizes", "big"], "640x480"),
        (["--models", "a", "--data", "nowhere"], "is not a folder"),
        (["--models", "a", "--against", "nowhere.json"], "give the results.json of an earlier compare"),
        (["--models", "a@git:no-such-commit"], "cannot be had from this checkout"),
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
        assert tree_bytes(process.pid) > 80_000_000
        process.stdin.close()
        process.wait(10)
    assert tree_bytes(process.pid) == 0
