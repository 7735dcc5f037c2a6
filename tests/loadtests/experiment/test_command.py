"""How every command ends: its exit code, its partial report, and what it prints."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loadtests.errors import LoadTestError
from loadtests.experiment.command import names, run_measurement
from loadtests.experiment.environment import this_command
from loadtests.experiment.model import Block, Measurement, Progress
from loadtests.experiment.store import Store


class Fake(Measurement):
    done: int = 0

    @property
    def measured(self) -> bool:
        return self.done > 0


@pytest.fixture(autouse=True)
def _sigterm_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


Measure = Callable[[Fake, Progress], None]


def outcome(measure: Measure, *, store: Store | None = None) -> tuple[int, Fake, list[str | None]]:
    """The exit code, the results, and why they ended early at the time of each report."""
    results = Fake(command="", environment={})
    reports: list[str | None] = []

    def report() -> Path:
        reports.append(results.ended_early)
        return Path("out/report.md")

    code = run_measurement(results, lambda progress: measure(results, progress), report=report, store=store)
    return code, results, reports


def test_a_finished_measurement_reports_and_ends_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(results: Fake, progress: Progress) -> None:
        progress.step("one", 0, 1)
        progress.note("[a] line that stays")
        results.done = 1

    store = Store(tmp_path / "blocks")
    store.open({}, fresh=False)
    code, results, reports = outcome(measure, store=store)
    assert (code, reports) == (0, [None])
    assert results.finished is not None
    # What is finished is not resumed.
    assert not (tmp_path / "blocks").exists()
    said = capsys.readouterr()
    assert said.out == "report: out/report.md\n"
    assert "[a] line that stays" in said.err


def test_an_error_is_one_line_and_what_was_measured_until_then_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    def measure(results: Fake, progress: Progress) -> None:
        results.done = 1
        raise LoadTestError("the service died:\nits log")

    code, results, reports = outcome(measure)
    assert (code, reports, results.finished) == (1, ["the service died"], None)
    assert "error: the service died:\nits log" in capsys.readouterr().err


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_reports_and_ends_with_130(
    signal_number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(results: Fake, progress: Progress) -> None:
        # Tests in the background inherit an ignored SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        results.done = 1
        os.kill(os.getpid(), signal_number)
        signal.pause()

    store = Store(tmp_path / "blocks")
    store.open({}, fresh=False)
    store.add(Block(arm="a", round=0), 0)
    code, _, reports = outcome(measure, store=store)
    assert (code, reports) == (130, ["interrupted"])
    assert (tmp_path / "blocks").is_dir()
    assert "The same command resumes the measurement" in capsys.readouterr().err


@pytest.mark.parametrize(("problem", "code"), [(LoadTestError("no"), 1), (KeyboardInterrupt(), 130)])
def test_without_any_figure_there_is_no_report(problem: BaseException, code: int) -> None:
    def measure(results: Fake, progress: Progress) -> None:
        raise problem

    assert outcome(measure)[::2] == (code, [])


def test_a_command_can_be_run_again_as_it_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/x/loadtests/__main__.py", "compare", "--models", "a b"])
    assert this_command() == "python -m loadtests compare --models 'a b'"
    monkeypatch.setattr("sys.argv", ["/usr/bin/stridevit", "loadtest", "limit"])
    assert this_command() == "stridevit loadtest limit"


def test_names_are_separated_by_commas_and_unique() -> None:
    assert names(" a,b, a,,") == ("a", "b")
