"""The report of a rollout: its figures are those of the counters, and a real service can be read."""

import json
import math
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from loadtests.__main__ import app
from loadtests.errors import LoadTestError
from loadtests.experiment.model import Progress
from loadtests.rollout.counters import Counts, Duration, parse, read
from loadtests.rollout.measure import Name, RolloutPlan, RolloutReading, figures, latency, measure
from loadtests.rollout.report import verdict, write
from tests.processes import post, serving
from tests.service.identity import picture, publish_identity

NAME: Name = ("canary", "a:b")


class Silent:
    """A progress that nobody sees."""

    def step(self, what: str, done: float, total: float) -> None:
        pass

    def note(self, message: str) -> None:
        pass


def counts(images: int, *, agree: int, primary_ms: float = 10.0, candidate_ms: float = 8.0) -> Counts:
    return Counts(
        images=Counter({("primary", "ok"): images, ("candidate", "ok"): images, ("candidate", "model-fault"): 2}),
        compared=Counter({"agree": agree, "differ": images - agree}),
        dropped=Counter(full=1),
        fallbacks=Counter(late=3),
        durations={
            "primary": Duration(
                count=images, seconds=images * primary_ms / 1000, buckets={0.01: images, math.inf: images}
            ),
            "candidate": Duration(
                count=images, seconds=images * candidate_ms / 1000, buckets={0.01: images, math.inf: images}
            ),
        },
    )


def test_rounds_are_paired_and_the_interval_is_that_of_compare() -> None:
    noise = np.random.default_rng(0)
    rounds = []
    for _ in range(10):
        slow = noise.uniform(1, 5)  # hits both alike
        rounds.append(counts(100, agree=90, primary_ms=10 * slow, candidate_ms=8 * slow * noise.uniform(0.98, 1.02)))
    effect = latency(rounds)
    assert effect is not None
    _, low, high = effect.at(0.95)
    assert low < 0.8 < high
    assert high / low < 1.06
    assert latency(rounds[:4]) is None


def test_the_verdict_is_one_sentence() -> None:
    values = figures([counts(200, agree=194) for _ in range(5)])
    said = verdict("canary", values)
    assert said.startswith("agreement 97.0 % (95.7–97.9) over 1,000 images; latency ×0.80 (0.80–0.80); ")
    assert said.endswith("left to the primary: 15 late; errors: 10 model-fault; 5 not compared")
    nothing = figures([Counts()])
    assert verdict("shadow", nothing).startswith("no image was compared; no interval of latency")


def test_a_service_that_begins_anew_is_noticed() -> None:
    with pytest.raises(LoadTestError, match="started again"):
        counts(5, agree=5).since(counts(6, agree=6))


@pytest.mark.parametrize(("images", "rounds"), [(None, 5), (30, 5)])
def test_rounds_end_with_the_time_or_the_images(images: int | None, rounds: int) -> None:
    now = 0.0
    plan = RolloutPlan(url="x", seconds=60 if images is None else 1e6, images=images, rounds=rounds)
    reading = RolloutReading(plan=plan, command="x")

    def reads() -> dict[Name, Counts]:
        return {NAME: counts(int(now), agree=int(now))}

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    progress: Progress = Silent()
    measure(reading, progress, reads, clock=lambda: now, sleep=sleep)
    assert len(reading.rounds) == rounds
    assert sum(counts.compared.total() for counts in reading.of(NAME)) == pytest.approx(images or 60, abs=1)
    with pytest.raises(LoadTestError, match="has no rollout"):
        measure(RolloutReading(plan=plan, command="x"), progress, dict)


def test_a_report_holds_what_was_read(tmp_path: Path) -> None:
    plan = RolloutPlan(url="http://x", seconds=60, images=None, rounds=5)
    reading = RolloutReading(plan=plan, command="stridevit loadtest rollout")
    reading.rounds = [{NAME: counts(200, agree=194)} for _ in range(5)]
    text = write(reading, tmp_path).read_text()
    assert "agreement 97.0 % (95.7–97.9) over 1,000 images" in text
    document = json.loads((tmp_path / "results.json").read_bytes())
    assert document["rollouts"][0]["agree"] == 970
    assert [row["metric"] for row in document["rows"]] == ["mean_ms", "mean_ms"]
    assert document["rows"][1]["change"]["kind"] == "ratio"
    assert len(document["blocks"]) == 5


def test_a_running_service_is_reported(tmp_path: Path) -> None:
    models = tmp_path / "models"
    for top1 in (0.5, 0.6):
        publish_identity(models, "first", top1=top1)
    # The name of a variable and not a flag, so that both are read.
    environment = {"STRIDEVIT_THREADS": "1", "STRIDEVIT_SHADOW": "first@2=100%"}
    with serving(models, environment=environment) as (url, _):
        ended = threading.Event()

        def send() -> None:
            number = 0
            while not ended.is_set():
                number += 1
                assert post(f"{url}/v1/classify?model=first", picture(number)).json()["version"] == 1

        sender = threading.Thread(target=send)
        sender.start()
        try:
            flags = [
                "--url",
                url,
                "--seconds",
                "300",
                "--images",
                "60",
                "--rounds",
                "6",
                "--out",
                str(tmp_path / "out"),
            ]
            result = CliRunner().invoke(app, ["rollout", *flags])
        finally:
            ended.set()
            sender.join()
        assert result.exit_code == 0, result.output
        assert "shadow first:first@2: agreement 100.0 %" in result.output
        assert read(url)["shadow", "first:first@2"].compared["agree"] >= 60
        assert CliRunner().invoke(app, ["rollout", "--url", f"{url}/nowhere"]).exit_code == 1
    assert parse("") == {}
