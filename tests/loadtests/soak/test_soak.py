"""Memory over many requests: what is sent, what is compared, and a short run."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from loadtests.__main__ import app
from loadtests.experiment.model import Arm, Block
from loadtests.experiment.run import Bench
from loadtests.experiment.server import ServerError
from loadtests.experiment.store import Store
from loadtests.faults.client import Outcome
from loadtests.generator.payloads import read_payloads
from loadtests.soak import numbered
from loadtests.soak.report import broken, write
from loadtests.soak.soak import LONGER_SIDES, SoakExperiment, SoakPlan, figures, mixed_sizes
from loadtests.soak.watch import QUANTITIES, trends
from tests.processes import still_running, wait_until


def test_the_first_tenth_of_the_requests_is_compared_with_the_last() -> None:
    samples = [(0, 50), (5, 100), (10, 102), (50, 300), (90, 1), (95, 103), (98, 105), (100, 104)]
    found = figures([{"requests": requests, "pss_bytes": used} for requests, used in samples])
    assert found.pop("growth") == pytest.approx(3 / 101)
    assert found == {"idle_bytes": 50, "first_bytes": 101, "last_bytes": 104, "peak_bytes": 300}


def test_an_interrupted_run_is_reported_if_it_has_enough_samples(tmp_path: Path) -> None:
    plan = SoakPlan(repository=tmp_path, arms=(Arm(label="m", model="m"),), data=None, requests=1000)
    samples = [{"requests": number} for number in range(49)]
    soak = SoakExperiment(plan=plan, images=[])
    assert not soak.measured
    soak.blocks.append(Block(arm="m", round=0, info={"samples": samples}, failure="interrupted"))
    assert not soak.measured
    samples.append({"requests": 50})
    assert soak.measured


def test_each_image_is_sent_in_several_sizes() -> None:
    images, what = mixed_sizes(None)
    assert len(set(images)) == 8 * len(LONGER_SIDES)
    assert max(map(len, images)) > 50 * min(map(len, images))
    assert "48 JPEGs" in what


def test_soak_samples_memory_all_along(repository: Path, tmp_path: Path) -> None:
    asked = ["--model", "digits-csra-r2", "--repository", str(repository), "--out", str(tmp_path), "--requests", "120"]
    ended = CliRunner().invoke(app, ["soak", *asked])
    assert ended.exit_code == 0, ended.output
    document = json.loads((tmp_path / "results.json").read_text())
    assert (document["requests"], document["failed_requests"]) == (120, 0)
    assert [sample["requests"] for sample in document["samples"]] == list(range(121))
    assert all(sample["descriptors"] > 3 and sample["threads"] > 1 for sample in document["samples"])
    assert [trend["name"] for trend in document["trends"]] == list(QUANTITIES)
    # A stall may leave a part of so short a run without a reading, and then there is no trend.
    known = [trend for trend in document["trends"] if trend["per_hour"] is not None]
    assert all(trend["low"] <= trend["per_hour"] <= trend["high"] for trend in known)
    assert document["peak_bytes"] >= document["last_bytes"] > 30_000_000
    assert "growth" in ended.stdout
    assert "| fresh process |" in (tmp_path / "report.md").read_text()


def test_another_commands_blocks_are_not_discarded(repository: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "blocks")
    store.open({"of": "another command"}, fresh=False)
    store.add(Block(arm="m", round=0), 0)
    asked = ["--model", "digits-csra-r2", "--repository", str(repository), "--out", str(tmp_path)]
    ended = CliRunner().invoke(app, ["soak", *asked])
    assert ended.exit_code == 1
    assert "holds a measurement that was begun with another" in ended.output
    assert store.holds_blocks()


def test_a_service_that_does_not_start_ends_with_its_own_words(repository: Path, tmp_path: Path) -> None:
    asked = ["--model", "digits-csra-r2", "--repository", str(repository), "--out", str(tmp_path)]
    ended = CliRunner().invoke(app, ["soak", *asked, "--service-args", "--device cuda:9"])
    assert ended.exit_code == 1
    assert "did not start" in ended.output
    assert "device 'cuda:9'" in ended.output
    assert not (tmp_path / "report.md").exists()


def test_a_service_that_dies_ends_the_run_and_what_was_measured_is_reported(repository: Path, tmp_path: Path) -> None:
    class Deadly:
        def step(self, what: str, done: float, total: float) -> None:
            if done == 60:
                family = psutil.Process().children(recursive=True)
                services = [child for child in family if "--port" in child.cmdline()]
                for child in services:
                    child.kill()
                # Until it is known to be gone, requests only fail.
                wait_until(lambda: not still_running(services))

        def note(self, message: str) -> None: ...

    arm = Arm(label="digits-csra-r2", model="digits-csra-r2")
    plan = SoakPlan(repository=repository, arms=(arm,), data=None, requests=200)
    found = SoakExperiment(plan=plan, images=[read_payloads(None, limit=1, sizes=[(32, 32)])[0].data])
    bench = Bench(found, (), tmp_path, measure=found.send)
    with bench.opened(Deadly(), fresh=True), pytest.raises(ServerError, match=r"died after \d+ requests"):
        bench.rounds(lambda _: (), Deadly())
    assert found.measured
    assert found.blocks[0].info["failed_requests"] > 0
    assert write(found, tmp_path).is_file()


def reading(seconds: float, *, pss_bytes: float = 1e8, calm: bool = True) -> dict[str, Any]:
    others = {"requests": 1 + int(seconds), "descriptors": 20, "threads": 9, "latency_ms": 5.0}
    return {"seconds": seconds, "pss_bytes": pss_bytes, "calm": calm, **others}


def test_trends_are_per_hour_and_leave_out_the_beginning_and_the_faults() -> None:
    growing = [reading(second, pss_bytes=1e8 + 1e4 * second) for second in range(360, 3600, 10)]
    filling = [reading(second, pss_bytes=1e6 * second) for second in range(0, 360, 10)]
    disturbed = [reading(second + 5, pss_bytes=5e8, calm=False) for second in range(360, 3590, 100)]
    memory, descriptors, *_ = trends([*filling, *growing, *disturbed, reading(3600, pss_bytes=1e8 + 3.6e7)])
    assert memory.per_hour == pytest.approx(36)
    assert memory.low == pytest.approx(36)
    assert memory.high == pytest.approx(36)
    assert (descriptors.first, descriptors.last, descriptors.per_hour) == (20, 20, 0)


@pytest.fixture
def late_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is refused because the machine stood still for a while."""
    monkeypatch.setattr(numbered, "DEADLINE_MS", 100_000.0)
    monkeypatch.setattr(numbered, "ANSWER_SECONDS", 150.0)


@pytest.mark.usefixtures("late_deadlines")
def test_numbered_requests_are_counted_by_what_became_of_them(tmp_path: Path) -> None:
    asked = ["--out", str(tmp_path), "--requests", "300", "--service-args", "--intra-op-threads 1"]
    ended = CliRunner().invoke(app, ["soak", *asked])
    assert ended.exit_code == 0, ended.output
    document = json.loads((tmp_path / "results.json").read_text())
    assert {outcome: count for outcome, count in document["counts"].items() if count} == {"answered": 300}
    assert document["counts"].keys() == set(Outcome)
    assert document["exit_codes"] == []
    assert "| answered | 300 |" in (tmp_path / "report.md").read_text()


@pytest.mark.usefixtures("late_deadlines")
def test_a_numbered_run_ends_when_its_time_is_over(tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["soak", "--out", str(tmp_path), "--minutes", "0.1", "--rate", "20"])
    assert ended.exit_code == 0, ended.output
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["counts"]["answered"] == sum(document["counts"].values()) > 0


@pytest.mark.long
def test_mild_faults_leave_the_process_and_every_request_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbered, "FAULT_EVERY_SECONDS", 6.0)
    monkeypatch.setattr(numbered, "FAULT_SECONDS", 3.0)
    asked = ["--minutes", "1.5", "--rate", "10", "--faults", "--out", str(tmp_path)]
    ended = CliRunner().invoke(app, ["soak", *asked])
    assert ended.exit_code == 0, ended.output
    document = json.loads((tmp_path / "results.json").read_text())
    assert {note.partition(" × ")[2] for note in document["notes"]} >= {"load-unload", "repository-away"}
    assert (document["counts"]["lost"], document["counts"]["swapped"]) == (0, 0)


def test_a_swapped_or_a_lost_answer_and_an_ended_process_break_a_promise() -> None:
    plan = SoakPlan(repository=Path(), arms=(Arm(label="m", model="m"),), data=None, requests=1000)
    found = SoakExperiment(plan=plan)
    assert broken(found) == []
    info = {"counts": {"swapped": 1, "lost": 2, "answered": 3}, "exit_codes": [-9], "unmet": ["a fault failed"]}
    found.blocks.append(Block(arm="m", round=0, info=info))
    assert broken(found) == ["1 requests swapped", "2 requests lost", "the process ended with -9", "a fault failed"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--requests", "100", "--minutes", "1"], "give one of them"),
        (["--model", "m", "--faults"], "leave --model out"),
        (["--model", "m", "--rate", "5"], "leave --model out"),
        (["--data", "."], "--data is for --model"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(asked: list[str], said: str, tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["soak", *asked, "--out", str(tmp_path)])
    assert ended.exit_code == 1
    assert said in ended.output


@pytest.mark.parametrize(
    ("model", "said"), [("a@http://127.0.0.1:1", "the memory of a server that already runs"), ("a?b", "are written")]
)
def test_an_arm_whose_memory_is_unknown_is_refused(model: str, said: str, tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["soak", "--model", model, "--out", str(tmp_path)])
    assert ended.exit_code == 1
    assert said in ended.output
