"""What ends an accuracy run early leaves: a report, no process, and the answers of each model that has given all."""

import signal
import sys
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from loadtests.accuracy.ask import ask, choose_images
from loadtests.accuracy.results import AccuracyExperiment, AccuracyPlan
from loadtests.experiment.model import Arm
from loadtests.experiment.run import Bench
from tests.loadtests.accuracy.fakes import TEN, Answers, Fake, asking, images_of, predicted, results_in
from tests.processes import PATIENCE_SECONDS, interruptible, still_running, wait_until
from training.__main__ import app as training


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_an_interruption_cancels_is_not_counted(number: signal.Signals, fake: Fake, tmp_path: Path) -> None:
    stopped = threading.Event()

    def answer(model: str, image: str, _: int) -> Answers:
        if int(image.partition("#")[2]) >= 4:
            stopped.wait()
            return 503, {}, {}
        return predicted(model, image)

    class Interrupt:
        def step(self, what: str, done: float, total: float) -> None:
            if what.startswith("images") and done == 4:
                signal.raise_signal(number)

        def note(self, message: str) -> None: ...

    fake.answer = answer
    data = images_of(tmp_path / "data", TEN)
    source, positions = choose_images(data, None, labelled=True)
    plan = AccuracyPlan(
        arms=(Arm(label="right", model="right", url=fake.url),),
        repository=tmp_path,
        data=data,
        limit=None,
        connections=2,
        max_drop_points=0.1,
    )
    run = AccuracyExperiment(plan=plan, command="as typed", environment={}, source=source, positions=positions)
    bench = Bench(run, (), tmp_path / "out", measure=partial(ask, run))
    # If the tests run in the background, SIGINT is ignored.
    before = [(one, signal.signal(one, signal.default_int_handler)) for one in (signal.SIGINT, signal.SIGTERM)]
    try:
        with bench.opened(Interrupt(), fresh=False), pytest.raises(KeyboardInterrupt):
            bench.rounds(lambda _: (), Interrupt())
    finally:
        stopped.set()
        for one, handler in before:
            signal.signal(one, handler)
    assert [name for name in run.answers[0]["name"] if name] == [f"{number:02d}.png" for number in range(4)]
    assert not run.answers[0]["failure"].any()
    # The model is asked anew: only what has all its answers is kept.
    assert not bench.store.blocks()


def test_the_model_s_answers_are_kept_when_the_reference_is_interrupted(fake: Fake, tmp_path: Path) -> None:
    def refuse(model: str, image: str, _: int) -> Answers:
        if model == "left":
            raise ConnectionResetError
        return predicted(model, image)

    fake.answer = refuse
    data = images_of(tmp_path / "data", TEN)
    options = ["--url", fake.url, "--reference", "left", "--connections", "1"]
    ended = asking(data, tmp_path / "out", *options)
    assert ended.exit_code == 1
    assert "10 of 10 images were sent to right, 3 of 10 images were sent to left" in ended.output
    assert "right and left give the same class for 0 of 3 images" in ended.output
    fake.answer = lambda model, image, _: predicted(model, image)
    fake.asked.clear()
    # Other images would be compared with the answers to these.
    ended = asking(data, tmp_path / "out", *options, "--limit", "9")
    assert "begun with another labels, limit" in ended.output
    ended = asking(data, tmp_path / "out", *options)
    assert ended.exit_code == 0, ended.output
    assert Counter(model for _, model, _ in fake.asked) == {"left": 10}
    assert "right and left give the same class for 6 of 10 images" in ended.output
    # What has finished is asked anew.
    asking(data, tmp_path / "out", *options)
    assert Counter(model for _, model, _ in fake.asked) == {"left": 20, "right": 10}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_reports_what_it_has_and_leaves_no_process(
    number: signal.Signals, repository: Path, tmp_path: Path
) -> None:
    data = tmp_path / "digits"
    CliRunner().invoke(training, ["images", "--dataset", "digits", "--out", str(data), "--count", "1"])
    image = {"bytes": (data / "00000.png").read_bytes(), "path": None}
    pq.write_table(pa.table({"image": [image] * 50_000, "label": [0] * 50_000}), tmp_path / "test-0.parquet")
    asked = ["--model", "digits-csra-r2", "--data", str(tmp_path), "--repository", str(repository)]
    command = [sys.executable, "-m", "loadtests", "accuracy", *asked, "--out", str(tmp_path / "out")]
    with interruptible(*command) as process:
        wait_until(lambda: answering(process.pid), process)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, errors
    assert "stopped" in errors
    found = results_in(tmp_path / "out")
    assert found["ended_early"] == "interrupted"
    assert 0 < found["models"][0]["sent"] < found["images"] == 50_000
    assert found["models"][0]["failed"] == 0
    assert "- Ended early: interrupted; " in (tmp_path / "out" / "report.md").read_text()
    assert family
    assert not still_running(family)


def answering(pid: int) -> bool:
    """Whether the service that this process started has answered some requests."""
    for child in psutil.Process(pid).children(recursive=True):
        try:
            words = child.cmdline()
            if "--port" in words:
                url = f"http://127.0.0.1:{words[words.index('--port') + 1]}"
                return 'route="/v1/classify"' in httpx.get(url + "/metrics", trust_env=False).text
        except (psutil.Error, httpx.TransportError):
            continue
    return False
