"""A step overload: what is counted as in time, refused, too late, and how accurate the answers were."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from loadtests.__main__ import app
from loadtests.experiment.model import Arm, Block
from loadtests.generator.load_result import LoadResult, RequestTrace
from loadtests.generator.samples import UNSENT
from loadtests.overload.measure import STEPS, OverloadExperiment, OverloadPlan, step_results
from loadtests.report.rendering import tables

Request = tuple[float, float, int, str]


def experiment(*blocks: Block) -> OverloadExperiment:
    plan = OverloadPlan(
        repository=Path("models"),
        arms=(Arm(label="family", model="family"),),
        data=None,
        rounds=2,
        seconds=7.0,
        steps=((4, 3.5), (8, 3.5)),
        deadline_ms=100,
    )
    return OverloadExperiment(plan=plan, command="", environment={}, blocks=list(blocks))


def request(at: float, latency_ms: float = 50, status: int = 200, model: str = "good") -> Request:
    return at, latency_ms, status, model


def block(number: int, *requests: Request) -> Block:
    due_s, latencies_ms, statuses, models = (np.array(column) for column in zip(*requests, strict=True))
    load = LoadResult(
        mode="open",
        connections=None,
        offered_rate=None,
        throughput=1.0,
        latencies_ms=np.where(statuses == 200, latencies_ms, np.inf),
        errors=0,
        peak_bytes=1,
        server_cores=1.0,
        generator_cores=0.1,
        trace=RequestTrace(due_s=due_s, statuses=statuses, models=models),
    )
    return Block(arm="family", round=number, loads={STEPS: load}, info={"top1": {"good": 0.8, "fast": 0.6}})


def test_each_request_is_counted_in_the_step_in_which_it_was_due() -> None:
    first = block(
        0,
        # The rate is still changing: of neither step.
        request(0.1),
        request(3.6, latency_ms=900),
        request(1.6),
        request(2.5, model="fast"),
        request(3.4, latency_ms=500),
        request(5.1, model="fast"),
        request(5.2, latency_ms=101),
        request(5.3, status=429, latency_ms=2),
        request(5.4, status=504),
        request(5.5, status=0),
        request(5.6, status=UNSENT, latency_ms=0.1),
    )
    second = block(1, request(2.2), request(6.7, latency_ms=100))
    calm, crowded = step_results(experiment(first, second))
    assert (calm.offered_rate, calm.goodput, calm.goodput_range) == (1.0, 0.75, (0.5, 1.0))
    assert (calm.within_deadline, calm.refused, calm.too_late, calm.failed) == (0.75, 0, 0.25, 0)
    assert calm.mean_top1 == pytest.approx((0.8 + 0.8 + 0.6) / 3)
    assert calm.models == {"good": pytest.approx(2 / 3), "fast": pytest.approx(1 / 3)}
    assert (crowded.offered_rate, crowded.goodput) == (1.75, 0.5)
    outcomes = (crowded.within_deadline, crowded.refused, crowded.too_late, crowded.failed)
    assert outcomes == pytest.approx((2 / 7, 1 / 7, 2 / 7, 2 / 7))


def test_no_answer_in_time_has_no_accuracy() -> None:
    found = experiment(block(0, request(2, status=429)), block(1, request(2, status=429)))
    calm, _ = step_results(found)
    assert (calm.goodput, calm.refused) == (0, 1)
    assert calm.mean_top1 is None
    (table,) = tables("overload_tables.txt.j2", title="A step overload", steps=[calm])
    assert table.rows[0][4:] == ["100.0%", "0.0%", "0.0%", "–", "–"]


@pytest.mark.parametrize(
    ("text", "reason"), [("10", "RATE:SECONDS"), ("10:0", "greater than zero"), ("1>5:3", "a ramp")]
)
def test_malformed_steps_are_refused(text: str, reason: str) -> None:
    ended = CliRunner().invoke(app, ["overload", "--models", "a", "--steps", text])
    assert ended.exit_code == 1
    assert reason in ended.output


def test_overload_measures_and_reports(repository: Path, tmp_path: Path) -> None:
    asked = ["--models", "digits", "--steps", "20:2,60:2", "--rounds", "1", "--out", str(tmp_path)]
    ended = CliRunner().invoke(app, ["overload", "--repository", str(repository), *asked, "--deadline-ms", "20000"])
    assert ended.exit_code == 0, ended.output
    document = json.loads((tmp_path / "results.json").read_text())
    assert [step["arm"] for step in document["steps"]] == ["digits"] * 2
    for step in document["steps"]:
        assert step["goodput"] > 0
        assert step["models"] == {"digits-csra-r2": 1.0}
        assert step["mean_top1"] == document["blocks"][0]["info"]["top1"]["digits-csra-r2"]
    (load,) = document["blocks"][0]["loads"].values()
    assert (load["mode"], load["errors"]) == ("open", 0)
    assert "| digits |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "overload.svg").stat().st_size > 5000
