"""The fronts: the figures' arithmetic and the report, bad input, and short runs behind real programs."""

import itertools
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from loadtests.__main__ import app
from loadtests.capacity.report import figures_of
from loadtests.experiment.model import Arm, Block
from loadtests.experiment.server import Server
from loadtests.fronts import configurations
from loadtests.fronts.figures import results, sizing_figures
from loadtests.fronts.measure import Budget, FrontsExperiment, FrontsPlan
from loadtests.fronts.model_check import checked
from loadtests.fronts.report import tables_of, write
from loadtests.fronts.serving import Started, fronts, shares
from loadtests.generator.load_result import LoadResult
from loadtests.limit.ideal_queue import IdealQueue
from loadtests.limit.measure import closed_name

THOUSAND = np.arange(1.0, 1001.0)
FEW = np.arange(1.0, 101.0)
FACTS = {"worker_bytes": 2e8, "front_bytes": 5e7, "request_bytes": 20_000.0, "response_bytes": 900}


def loaded(throughput: float, *, latencies: Any = THOUSAND, workers: tuple[float, ...] = (), **more: Any) -> LoadResult:
    """A load in which each worker had so many requests, used half a core, and its loop a tenth of one."""
    counts = {f"requests of worker {number}": requests for number, requests in enumerate(workers)}
    parts = {f"worker {number}": 0.5 for number in range(len(workers))}
    parts |= {f"loop of worker {number}": 0.1 for number in range(len(workers))}
    values = {"mode": "closed", "connections": 16, "errors": 1, "part_cores": parts, "counts": counts}
    return LoadResult(throughput=throughput, latencies_ms=latencies, **{**values, **more})


def experiment(rounds: int = 5) -> FrontsExperiment:
    plan = FrontsPlan(
        repository=Path("models"),
        arms=(Arm(label="one process", model="m"), Arm(label="Envoy", model="m")),
        data=None,
        rounds=rounds,
        seconds=1.0,
        workers=2,
        connections=(1, 16),
        load_fraction=0.5,
        budget_minutes=1.0,
        skipped=(("nginx", "nginx is not installed"),),
    )
    found = FrontsExperiment(plan=plan, command="stridevit loadtest fronts", environment={"cpu": "test"})
    for number in range(rounds):
        speed = 1 + 0.1 * number
        for label, workers, ratio in (("one process", (100.0,), 1.0), ("Envoy", (110.0, 90.0), 0.9)):
            busy = loaded(100 * speed * ratio, workers=workers)
            if label == "Envoy":
                busy.part_cores.update(front=0.027 * speed, supervisor=0.009)
            opened = loaded(
                50 * speed * ratio,
                mode="open",
                connections=None,
                offered_rate=50 * speed * ratio,
                arrivals=1000,
                latencies=THOUSAND / 10,
            )
            loads = {
                closed_name(1): loaded(40 * speed, latencies=FEW / 10, workers=workers),
                closed_name(16): busy,
                plan.open_name: opened,
            }
            info = {**FACTS, "workers": len(workers), "servers": 2}
            found.blocks.append(Block(arm=label, round=number, loads=loads, info=info))
    return found


def test_cpu_of_front_and_workers_is_by_request() -> None:
    found = {(one.front, one.load): one for one in results(experiment())}
    envoy = found["Envoy", "16 connections"].figures
    assert envoy["front CPU ms"].rounds == pytest.approx([0.3] * 5)
    assert envoy["worker CPU ms"].rounds[0] == pytest.approx(1 / 90 * 1000)
    assert envoy["loop CPU ms"].rounds[0] == pytest.approx(0.2 / 90 * 1000)
    assert "front CPU ms" not in found["one process", "16 connections"].figures


def test_unevenness_is_the_distance_from_the_mean() -> None:
    found = {one.front: one.figures for one in results(experiment()) if one.load == "16 connections"}
    assert found["Envoy"]["unevenness"].mean == pytest.approx(0.1)
    assert "unevenness" not in found["one process"]


def test_throughput_is_set_against_the_first_front_round_by_round() -> None:
    found = {(one.front, one.load): one.against_first for one in results(experiment())}
    assert found["Envoy", "16 connections"] == pytest.approx((0.9, 0.9, 0.9))
    assert found["one process", "16 connections"] is None
    assert {one.against_first for one in results(experiment(4))} == {None}, "four rounds say nothing"


def test_intervals_are_students_and_need_five_rounds() -> None:
    (five,) = (one for one in results(experiment()) if (one.front, one.load) == ("one process", "16 connections"))
    assert five.figures["requests/s"].mean == pytest.approx(120)
    # 15.81 / sqrt(5) · t(0.975, 4)
    assert five.figures["requests/s"].interval == pytest.approx((120 - 19.63, 120 + 19.63), abs=0.01)
    assert {figure.interval for one in results(experiment(4)) for figure in one.figures.values()} == {None}


def test_a_percentile_of_too_few_answers_is_that_of_all_rounds() -> None:
    found = {one.load: one.figures["p99 ms"] for one in results(experiment()) if one.front == "Envoy"}
    assert found["1 connection"].pooled
    assert found["1 connection"].rounds == (10.0,)
    assert not found["16 connections"].pooled
    (row,) = (row for row in tables_of(experiment())[0].rows if row[:2] == ["Envoy", "1 connection"])
    assert "10.0*" in row


def test_the_model_is_held_against_the_open_loop() -> None:
    found = {(one.front, one.percentile): one for one in checked(experiment())}
    one_process = found["one process", 99]
    assert one_process.load.rounds == pytest.approx([0.5] * 5)
    assert one_process.measured_ms.mean == pytest.approx(99.1)
    # Alone 5.1 ms. In the first round 100/s are two servers of 20 ms, and 50/s arrive.
    due = np.cumsum(np.random.default_rng(1).exponential(1 / 50, 100_000))
    waits = IdealQueue(lanes=2, seconds=0.02).latencies_ms(due) - 20
    assert one_process.one_queue_ms.rounds[0] == pytest.approx(5.1 + np.percentile(waits, 99), abs=2)
    assert one_process.random_ms is None
    envoy = found["Envoy", 99]
    assert envoy.random_ms
    assert envoy.random_ms.mean > envoy.one_queue_ms.mean


def test_the_report_has_what_capacity_planning_needs(tmp_path: Path) -> None:
    found = experiment()
    report = write(found, tmp_path).read_text()
    assert "| Envoy | 16 connections |" in report
    assert "nginx is not installed" in report
    assert "stridevit loadtest fronts" in report
    figures = figures_of(tmp_path / "results.json", "Envoy")
    assert figures.front_cpu_ms == pytest.approx(0.3)
    assert figures.alone_ms == pytest.approx(5.1)
    assert figures.worker_bytes == 2e8
    assert sizing_figures(found)["one process"]["front_cpu_ms"] is None
    document = json.loads((tmp_path / "results.json").read_text())
    assert len(document["blocks"]) == 10


def test_no_round_begins_that_would_exceed_the_budget() -> None:
    clock = itertools.chain([0.0], [1.0, 21.0, 41.0, 50.0])
    budget = Budget(1, clock=lambda: next(clock))
    assert budget.stop(0) is None
    assert budget.stop(1) is None, "the first took 20 of 60 s"
    assert "--budget 1 minutes" in (budget.stop(2) or ""), "41 + 20 s"


def test_a_front_that_is_started_once_starts_again_only_if_it_died(tmp_path: Path) -> None:
    events = []

    class Mortal(Server):
        lives = True

        def alive(self) -> bool:
            return self.lives

    @contextmanager
    def serve(label: str, _: Path) -> Iterator[Server]:
        events.append(f"{label} starts")
        yield Mortal("http://127.0.0.1:1", name=label)
        events.append(f"{label} ends")

    with Started(serve) as started:
        for label in ("a", "b", "a"):
            with started.serve(label, tmp_path) as server:
                assert server.name == label
        assert events == ["a starts", "b starts"]
        with started.serve("a", tmp_path) as server:
            assert isinstance(server, Mortal)
            server.lives = False
        with started.serve("a", tmp_path):
            assert events == ["a starts", "b starts", "a starts"]
    assert events[3:] == ["a ends", "b ends", "a ends"]


def test_workers_share_the_cores_as_evenly_as_possible() -> None:
    assert shares([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3, 4]]
    assert shares([4, 5], 2) == [[4], [5]]
    assert shares([7], 3) == [[7], [7], [7]]


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (["--only", "Caddy"], "there are one process, SO_REUSEPORT, Envoy"),
        (["--model", "m?max_batch=1"], "--service-args"),
        (["--sizes", "1x1", "--data", "."], "does not go with --data"),
        (["--sizes", "wide"], "wide"),
    ],
)
def test_bad_input_is_refused(flags: list[str], advice: str) -> None:
    ended = CliRunner().invoke(app, ["fronts", *flags])
    assert ended.exit_code == 1
    assert advice in " ".join(ended.output.split())


def test_every_front_says_why_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtests.fronts.serving.shutil.which", lambda *_, **__: None)
    monkeypatch.setattr("loadtests.fronts.serving.importlib.util.find_spec", lambda _: None)
    missing = {front.label: front.missing() for front in fronts()}
    assert missing["one process"] is None
    assert "apt-get install nginx" in (missing["nginx"] or "")
    assert "apt-get install haproxy" in (missing["HAProxy"] or "")
    assert "stridevit[workers]" in (missing["Envoy"] or "")
    assert "ray is not installed" in (missing["Ray Serve"] or "")


@pytest.mark.skipif(not shutil.which("nginx", path="/usr/sbin:/usr/bin"), reason="nginx is not installed")
def test_nginx_takes_its_configuration(tmp_path: Path) -> None:
    file = tmp_path / "nginx.conf"
    file.write_text(configurations.nginx(1234, ["127.0.0.1:1", "127.0.0.1:2"], tmp_path))
    done = subprocess.run(
        ["/usr/sbin/nginx", "-t", "-c", file, "-e", tmp_path / "log"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("haproxy", path="/usr/sbin:/usr/bin"), reason="HAProxy is not installed")
def test_haproxy_takes_its_configuration(tmp_path: Path) -> None:
    file = tmp_path / "haproxy.cfg"
    file.write_text(configurations.haproxy(1234, ["127.0.0.1:1", "127.0.0.1:2"]))
    done = subprocess.run(["/usr/sbin/haproxy", "-c", "-f", file], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout + done.stderr


@pytest.mark.cluster
@pytest.mark.parametrize("front", [one.label for one in fronts()])
def test_a_front_is_measured(front: str, repository: Path, tmp_path: Path) -> None:
    (chosen,) = (one for one in fronts() if one.label == front)
    if why := chosen.missing():
        pytest.skip(why)
    model = next(folder.name for folder in sorted(repository.iterdir()) if folder.is_dir())
    asked = ["--model", model, "--only", front, "--rounds", "1", "--seconds", "1", "--warmup", "0", "--sizes", "64x64"]
    ended = CliRunner().invoke(app, ["fronts", "--repository", str(repository), "--out", str(tmp_path), *asked])
    assert ended.exit_code == 0, ended.output
    document = json.loads((tmp_path / "results.json").read_text())
    busy = next(one for one in document["fronts"] if one["front"] == front and one["load"] == "16 connections")
    assert busy["errors"] == 0
    assert busy["figures"]["worker CPU ms"]["mean"] > 0
    assert ("unevenness" in busy["figures"]) == (front != "one process")
    assert ("front CPU ms" in busy["figures"]) == (front in ("Envoy", "nginx", "HAProxy"))
    counted = next(block for block in document["blocks"] if block["arm"] == front)["loads"]["16 connections"]["counts"]
    requests = sum(value for name, value in counted.items() if name.startswith("requests of"))
    assert requests >= document["blocks"][-1]["loads"]["16 connections"]["throughput"] > 0
