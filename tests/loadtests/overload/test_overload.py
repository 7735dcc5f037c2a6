"""A step overload: what is counted as in time, refused, too late, and how accurate the answers were."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadtests.__main__ import app
from loadtests.generator.samples import UNSENT
from loadtests.overload.measure import Answer, Block, Plan, markdown, results


def plan_of(*targets: str) -> Plan:
    return Plan(
        repository=Path("models"),
        targets=targets,
        data=None,
        steps=[(4, 3.5), (8, 3.5)],
        deadline_ms=100,
        rounds=2,
    )


def block(number: int, *answers: Answer) -> Block:
    return Block(
        target="family",
        round=number,
        answers=list(answers),
        top1={"good": 0.8, "fast": 0.6},
        unsent_arrivals=0,
        late_arrivals=0,
        generator_cores=0.1,
        server_cores=1.0,
    )


def answer(at: float, latency_ms: float = 50, status: int = 200, model: str = "good") -> Answer:
    return Answer(at=at, latency_ms=latency_ms, status=status, model=model)


def test_each_request_is_counted_in_the_step_in_which_it_was_due() -> None:
    first = block(
        0,
        # The rate is still changing: of neither step.
        answer(0.1),
        answer(3.6, latency_ms=900),
        answer(1.6),
        answer(2.5, model="fast"),
        answer(3.4, latency_ms=500),
        answer(5.1, model="fast"),
        answer(5.2, latency_ms=101),
        answer(5.3, status=429, latency_ms=2),
        answer(5.4, status=504),
        answer(5.5, status=0),
        answer(5.6, status=UNSENT, latency_ms=0.1),
    )
    second = block(1, answer(2.2), answer(6.7, latency_ms=100))
    calm, crowded = results(plan_of("family"), [first, second])
    assert (calm.offered_rate, calm.goodput, calm.goodput_range) == (1.0, 0.75, (0.5, 1.0))
    assert (calm.within_deadline, calm.refused, calm.too_late, calm.failed) == (0.75, 0, 0.25, 0)
    assert calm.mean_top1 == pytest.approx((0.8 + 0.8 + 0.6) / 3)
    assert calm.models == {"good": pytest.approx(2 / 3), "fast": pytest.approx(1 / 3)}
    assert (crowded.offered_rate, crowded.goodput) == (1.75, 0.5)
    parts = (crowded.within_deadline, crowded.refused, crowded.too_late, crowded.failed)
    assert parts == pytest.approx((2 / 7, 1 / 7, 2 / 7, 2 / 7))


def test_no_answer_in_time_has_no_accuracy() -> None:
    (calm, _) = results(plan_of("family"), [block(0, answer(2, status=429)), block(1, answer(2, status=429))])
    assert (calm.goodput, calm.refused) == (0, 1)
    assert math.isnan(calm.mean_top1)
    assert "100.0%" in markdown([calm])


@pytest.mark.parametrize(
    ("text", "reason"), [("10", "RATE:SECONDS"), ("10:0", "more than nothing"), ("1>5:3", "a ramp")]
)
def test_malformed_steps_are_refused(text: str, reason: str) -> None:
    ended = CliRunner().invoke(app, ["overload", "--repository", "models", "--targets", "a", "--steps", text])
    assert ended.exit_code == 1
    assert reason in ended.output


def test_overload_measures_and_reports(repository: Path, tmp_path: Path) -> None:
    asked = ["--targets", "digits-csra-r2,digits", "--steps", "20:3,60:3", "--rounds", "1", "--out", str(tmp_path)]
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
