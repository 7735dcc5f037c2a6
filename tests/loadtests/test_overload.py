"""A step overload: what is counted as in time, refused, too late, and how accurate the answers were."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadtests.__main__ import app
from loadtests.openloop import parse_steps, stepped_arrivals
from loadtests.overload import Answer, Block, Plan, markdown, results


def plan_of(*targets: str) -> Plan:
    return Plan(
        repository=Path("models"),
        targets=targets,
        data=None,
        steps=[(4, 1.0), (8, 1.0)],
        deadline_ms=100,
        rounds=2,
    )


def block(number: int, *answers: Answer, unsent: int = 0) -> Block:
    return Block(
        target="family",
        round=number,
        answers=list(answers),
        top1={"good": 0.8, "fast": 0.6},
        unsent=unsent,
        late_sent=0,
        generator_cores=0.1,
        server_cores=1.0,
    )


def answer(at: float, latency_ms: float = 50, status: int = 200, model: str = "good") -> Answer:
    return Answer(at=at, latency_ms=latency_ms, status=status, model=model)


def test_each_request_is_counted_in_the_step_in_which_it_was_due() -> None:
    first = block(
        0,
        answer(0.1),
        answer(0.5, model="fast"),
        answer(0.99, latency_ms=500),
        answer(1.1, model="fast"),
        answer(1.2, latency_ms=101),
        answer(1.3, status=429, latency_ms=2),
        answer(1.4, status=504),
        answer(1.5, status=0),
        unsent=1,
    )
    second = block(1, answer(0.2), answer(1.7, latency_ms=100))
    calm, crowded = results(plan_of("family"), [first, second])
    assert (calm.offered, calm.goodput, calm.goodput_range) == (2.0, 1.5, (1.0, 2.0))
    assert (calm.within_deadline, calm.refused, calm.too_late, calm.failed) == (0.75, 0, 0.25, 0)
    assert calm.mean_top1 == pytest.approx((0.8 + 0.8 + 0.6) / 3)
    assert calm.models == {"good": pytest.approx(2 / 3), "fast": pytest.approx(1 / 3)}
    assert (crowded.offered, crowded.goodput) == (3.5, 1.0)
    parts = (crowded.within_deadline, crowded.refused, crowded.too_late, crowded.failed)
    assert parts == pytest.approx((2 / 7, 1 / 7, 2 / 7, 2 / 7))


def test_no_answer_in_time_has_no_accuracy() -> None:
    (calm, _) = results(plan_of("family"), [block(0, answer(0.1, status=429)), block(1, answer(0.1, status=429))])
    assert (calm.goodput, calm.refused) == (0, 1)
    assert math.isnan(calm.mean_top1)
    assert "100.0%" in markdown([calm])


def test_arrivals_follow_the_steps() -> None:
    moments = stepped_arrivals([(50, 2.0), (500, 2.0)], seed=1)
    calm, crowded = sum(m < 2 for m in moments), sum(m >= 2 for m in moments)
    assert 60 < calm < 150
    assert 850 < crowded < 1150
    assert moments == sorted(moments)
    assert max(moments) < 4


@pytest.mark.parametrize("text", ["", "10", "10:0", "-1:5", "10:5:5", "x:y"])
def test_malformed_steps_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_steps(text)
    ended = CliRunner().invoke(app, ["overload", "--repository", "models", "--targets", "a", "--steps", text])
    assert ended.exit_code != 0


def test_overload_measures_and_reports(repository: Path, tmp_path: Path) -> None:
    asked = ["--targets", "digits-csra-r2,digits", "--steps", "20:1,60:1", "--rounds", "1", "--out", str(tmp_path)]
    ended = CliRunner().invoke(app, ["overload", "--repository", str(repository), *asked, "--deadline-ms", "5000"])
    assert ended.exit_code == 0, ended.output
    found = json.loads((tmp_path / "results.json").read_text())
    assert [step["target"] for step in found["steps"]] == ["digits-csra-r2"] * 2 + ["digits"] * 2
    for step in found["steps"]:
        assert step["goodput"] > 0
        assert step["models"] == {"digits-csra-r2": 1.0}
        assert step["mean_top1"] == found["blocks"][0]["top1"]["digits-csra-r2"]
    assert "| `digits` |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "overload.svg").stat().st_size > 5000
