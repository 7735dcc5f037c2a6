"""Memory over many requests: what is sent, what is compared, and a short run."""

import json
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from loadtests.__main__ import app
from loadtests.experiment.model import Arm, Block
from loadtests.experiment.run import Bench
from loadtests.experiment.server import ServerError
from loadtests.experiment.store import Store
from loadtests.generator.payloads import read_payloads
from loadtests.soak.soak import LONGER_SIDES, SoakExperiment, SoakPlan, figures, mixed_sizes, write


def test_the_first_tenth_of_the_requests_is_compared_with_the_last() -> None:
    samples = [(0, 50), (5, 100), (10, 102), (50, 300), (90, 1), (95, 103), (98, 105), (100, 104)]
    found = figures(samples)
    assert found.pop("growth") == pytest.approx(3 / 101)
    assert found == {"idle_bytes": 50, "first_bytes": 101, "last_bytes": 104, "peak_bytes": 300}


def test_an_interrupted_run_is_reported_if_it_has_enough_samples(tmp_path: Path) -> None:
    plan = SoakPlan(repository=tmp_path, arms=(Arm(label="m", model="m"),), data=None, requests=1000)
    samples = [(number, 1) for number in range(49)]
    soak = SoakExperiment(plan=plan, images=[])
    assert not soak.measured
    soak.blocks.append(Block(arm="m", round=0, info={"samples": samples}, failure="interrupted"))
    assert not soak.measured
    samples.append((50, 1))
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
    assert [number for number, _ in document["samples"]] == list(range(121))
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
                for child in psutil.Process().children(recursive=True):
                    if "--port" in child.cmdline():
                        child.kill()

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


@pytest.mark.parametrize(
    ("model", "said"), [("a@http://127.0.0.1:1", "the memory of a server that already runs"), ("a?b", "are written")]
)
def test_an_arm_whose_memory_is_unknown_is_refused(model: str, said: str, tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["soak", "--model", model, "--out", str(tmp_path)])
    assert ended.exit_code == 1
    assert said in ended.output
