"""A step overload: what is counted as in time, refused, too late, and how accurate the answers were."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from loadtests.__main__ import app
from loadtests.experiment.model import Arm, Block
from loadtests.experiment.server import service_for
from loadtests.generator.load_result import LoadResult, RequestTrace
from loadtests.generator.payloads import read_payloads
from loadtests.generator.samples import UNSENT, Sample
from loadtests.overload.estimates import errors_of, estimates, median_of
from loadtests.overload.measure import STEPS, OverloadExperiment, OverloadPlan, foretold, recoveries, step_results
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
        trace=RequestTrace(
            due_s=due_s, statuses=statuses, models=models, ended_ms=latencies_ms, behind_ms=np.zeros(len(due_s))
        ),
    )
    return Block(arm="family", round=number, loads={STEPS: load}, info={"top1": {"good": 0.8, "fast": 0.6}})


def closed_loop(*, throughput: float = 0.0, errors: int = 0, cores: float) -> LoadResult:
    return LoadResult(
        mode="closed",
        connections=8,
        throughput=throughput,
        errors=errors,
        latencies_ms=np.zeros(0),
        server_cores=cores,
    )


def levels(*levels: float, blocks: list[Block]) -> OverloadExperiment:
    bare = Arm(label="bare 429", model="", kind="refusing")
    found = experiment(*blocks)
    plan = replace(
        found.plan, arms=(*found.plan.arms, bare), steps=(), levels=levels, connections=("kept",), seconds=3.5
    )
    return replace(found, plan=plan)


def level_blocks(*requests: Request, throughput: float) -> list[Block]:
    one = block(0, *requests)
    loads = {"saturated": closed_loop(throughput=throughput, cores=1.0), "kept": one.loads[STEPS]}
    refusing = Block(arm="bare 429", round=0, loads={"kept": closed_loop(errors=35, cores=1.0)})
    return [replace(one, loads=loads, idle_bytes=1_000_000), refusing]


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
    (table,) = tables("overload_tables.txt.j2", title="Overload", steps=[calm], recoveries=[], foretold=[])
    shown = dict(zip(table.headings, table.rows[0], strict=True))
    assert (shown["refused"], shown["refusal p50 ms"], shown["p99 ms"], shown["mean top-1"]) == (
        "100.0%",
        "50.0",
        "–",
        "–",
    )


def test_a_level_is_set_against_what_the_cpu_allows() -> None:
    # An answer takes half of a core's second, a refusal a tenth: of 4/s at twice the capacity, g answers are possible
    # with g / 2 + (4 - g) / 10 = 1.
    calm = [request(1.6 + 0.5 * number) for number in range(4)]
    crowded = [request(5.1 + 0.25 * number, status=429 if number % 4 else 200) for number in range(8)]
    first, second = step_results(levels(1, 2, blocks=level_blocks(*calm, *crowded, throughput=2.0)))
    assert (first.level, first.rate, first.offered_rate, first.goodput) == (1, 2.0, 2.0, 2.0)
    assert (first.of_peak, first.sent) == (1.0, True)
    assert (second.goodput, second.of_peak) == (1.0, 0.5)
    assert second.of_ceiling == pytest.approx(1.0 / 1.5)
    assert second.refused_p50_ms == 50


def test_a_level_that_the_generator_could_not_send_is_marked() -> None:
    block, bare = level_blocks(*(request(1.6 + 0.5 * number) for number in range(4)), throughput=2.0)
    trace = block.loads["kept"].trace
    assert trace is not None
    behind = replace(trace, behind_ms=np.array([0.0, 80.0, 0.0, 0.0]))
    slow = replace(block, loads={**block.loads, "kept": replace(block.loads["kept"], trace=behind)})
    (found,) = step_results(levels(1, blocks=[slow, bare]))
    assert not found.sent


def test_recovery_ends_with_the_last_half_second_that_is_not_normal() -> None:
    calm = [request(1.6 + 0.5 * number, latency_ms=20) for number in range(4)]
    rest = [
        request(3.6, status=429),
        request(4.2, latency_ms=39),
        request(5.2, latency_ms=41),
        request(5.7, latency_ms=20),
    ]
    (found,) = recoveries(levels(1, blocks=level_blocks(*calm, *rest, throughput=2.0)))
    assert found.seconds == 2.0
    never = [*rest, request(6.2, status=504)]
    (found,) = recoveries(levels(1, blocks=level_blocks(*calm, *never, throughput=2.0)))
    assert found.seconds is None


@pytest.mark.parametrize(
    ("text", "reason"), [("10", "RATE:SECONDS"), ("10:0", "greater than zero"), ("1>5:3", "a ramp")]
)
def test_malformed_steps_are_refused(text: str, reason: str) -> None:
    ended = CliRunner().invoke(app, ["overload", "--models", "a", "--steps", text])
    assert ended.exit_code == 1
    assert reason in ended.output


def test_overload_measures_and_reports(repository: Path, tmp_path: Path) -> None:
    asked = ["--models", "digits", "--steps", "20:2,60:2", "--rounds", "1", "--out", str(tmp_path)]
    ended = CliRunner().invoke(app, ["overload", "--repository", str(repository), *asked, "--deadline-ms", "120000"])
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


@pytest.mark.long
def test_levels_follow_the_throughput_that_the_block_has_reached(repository: Path, tmp_path: Path) -> None:
    asked = [
        "--models",
        "digits",
        "--levels",
        "0.2,0.4",
        "--bursts",
        "0",
        "--seconds",
        "4",
        "--rounds",
        "1",
        "--out",
        str(tmp_path),
    ]
    ended = CliRunner().invoke(app, ["overload", "--repository", str(repository), *asked, "--deadline-ms", "20000"])
    assert ended.exit_code == 0, ended.output
    document = json.loads((tmp_path / "results.json").read_text())
    expected = [("kept", 0.2), ("kept", 0.4), ("new", 0.2), ("new", 0.4)]
    assert [(step["load"], step["level"]) for step in document["steps"]] == expected
    service = next(block for block in document["blocks"] if block["arm"] == "digits")
    saturated = service["loads"]["saturated"]["throughput"]
    assert any(step["offered_rate"] for step in document["steps"])
    for step in document["steps"]:
        assert step["rate"] == pytest.approx(step["level"] * saturated)
        if step["offered_rate"]:
            assert step["of_ceiling"] > 0
    assert [one["load"] for one in document["recoveries"]] == ["kept", "new"]
    refusing = next(block for block in document["blocks"] if block["arm"] == "bare 429")
    assert refusing["loads"]["kept"]["errors"] > 0


@pytest.mark.parametrize(
    ("flags", "reason"),
    [(["--levels", "0"], "above 0"), (["--levels", "two"], "1,2,5,10"), (["--connections", "old"], "kept or new")],
)
def test_malformed_levels_are_refused(flags: list[str], reason: str) -> None:
    ended = CliRunner().invoke(app, ["overload", "--models", "a", *flags])
    assert ended.exit_code == 1
    assert reason in ended.output


def test_the_time_to_come_back_is_judged_by_the_next_request_that_was_accepted() -> None:
    def sample(at: float, status: int, said_ms: int = 0) -> tuple[Sample, bytes]:
        return Sample(at, 0.0, status, 0.0, "", 0, None), json.dumps({"retry_after_ms": said_ms}).encode()

    burst = [sample(0.0, 200), sample(0.0, 429, 300)]
    probes = [sample(0.1, 429, 150), sample(0.15, 429, 50), sample(0.19, 429, 5), sample(0.2, 200), sample(0.3, 429, 9)]
    loop = SimpleNamespace(samples=[one for one, _ in burst + probes], refusals=[body for _, body in burst + probes])
    # 0.15 s said and 0.1 s true; 0.05 s twice; too short to be judged; nothing accepted later. The burst is left out.
    assert errors_of(loop, 2) == pytest.approx([0.5, 0.0])  # type: ignore[arg-type]


def test_the_median_of_a_histogram_lies_within_its_bucket() -> None:
    assert median_of({0.5: 0, 1.0: 10, 2.0: 30, math.inf: 40}) == pytest.approx(1.5)
    assert median_of({0.5: 0, math.inf: 0}) is None


def test_bursts_show_what_a_real_service_foretells(repository: Path, tmp_path: Path) -> None:
    payloads = read_payloads(None)
    with service_for("digits-csra-r2", repository=repository, log=tmp_path / "log") as server:
        arm = Arm(label="digits", model="digits-csra-r2")
        found = estimates(arm, server, payloads, deadline_ms=2000, bursts=1)
    assert found["predicted_finish"] > 0
    one = experiment(replace(block(0, request(0)), info={"top1": {}, **found}))
    (said,) = foretold(one)
    assert said.refusals == found["refusals"]
