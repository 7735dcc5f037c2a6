"""What a rate needs: arithmetic by hand, what must hold for all figures, and the command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from loadtests.__main__ import app
from loadtests.capacity.report import figures_of
from loadtests.capacity.sizing import Figures, Machine, SizingError, Target, needs

FIGURES = Figures(
    worker_cpu_ms=4.0,
    front_cpu_ms=0.4,
    loop_cpu_ms=1.0,
    alone_ms=5.0,
    worker_bytes=200e6,
    front_bytes=50e6,
    request_bytes=25_000,
    response_bytes=1_000,
)
COUNTED = ("workers", "worker_cores", "front_cores", "machines", "memory_bytes", "network_gbits", "balancers")


def test_what_ten_thousand_requests_need() -> None:
    found = needs(FIGURES, Machine(), Target(rate=10_000, p99_ms=1000, spare=0))
    # The event loop takes 1 ms, so a worker gets 700 requests/s at most, of the 1,000 of its cores.
    assert found.workers == 15
    assert found.worker_cores == 60
    assert found.load == pytest.approx(10_000 / 15 * 4 / 4000)
    assert found.front_cores == pytest.approx(4)
    # A worker with its part of the front takes 4.28 cores: seven on a machine of 32.
    assert found.machines == 3
    assert found.memory_bytes == pytest.approx(3 * (7 * 200e6 + 50e6))
    assert found.network_gbits == pytest.approx(2)
    assert found.balancers == 2
    assert found.limits == ("event loop", "cores")


def test_a_tight_p99_leaves_cores_idle() -> None:
    easy, tight = (needs(FIGURES, Machine(), Target(rate=10_000, p99_ms=p99_ms)) for p99_ms in (1000, 6))
    assert tight.limits[0] == "p99"
    assert tight.workers > easy.workers
    assert tight.load < easy.load
    assert tight.p99_ms <= 6 < easy.p99_ms


@pytest.mark.parametrize(
    ("machine", "scarce"),
    [
        (Machine(memory_bytes=700e6), "memory"),
        (Machine(network_gbits=0.5), "network"),
        (Machine(cores=8), "cores"),
    ],
)
def test_what_a_machine_lacks_first_is_named(machine: Machine, scarce: str) -> None:
    found = needs(FIGURES, machine, Target(rate=10_000, p99_ms=1000))
    assert found.limits[-1] == scarce
    assert found.machines > needs(FIGURES, Machine(), Target(rate=10_000, p99_ms=1000)).machines


def test_one_machine_needs_no_balancer() -> None:
    assert needs(FIGURES, Machine(), Target(rate=100, p99_ms=100, spare=0)).balancers == 0
    assert needs(FIGURES, Machine(), Target(rate=100, p99_ms=100, spare=1)).balancers == 2


@settings(deadline=None, max_examples=40)
@given(
    rates=st.tuples(st.floats(1, 1e5), st.floats(1, 1e5)),
    p99_ms=st.floats(5.5, 500),
    worker_cpu_ms=st.floats(0.5, 50),
    cores_per_worker=st.integers(1, 8),
    spare=st.integers(0, 2),
)
def test_a_higher_rate_never_needs_less(
    rates: tuple[float, float], p99_ms: float, worker_cpu_ms: float, cores_per_worker: int, spare: int
) -> None:
    figures, machine = replace(FIGURES, worker_cpu_ms=worker_cpu_ms), Machine(cores_per_worker=cores_per_worker)
    less, more = (needs(figures, machine, Target(rate=rate, p99_ms=p99_ms, spare=spare)) for rate in sorted(rates))
    for name in COUNTED:
        assert getattr(less, name) <= getattr(more, name), name
    for one in (less, more):
        assert one.p99_ms <= p99_ms
        assert one.load <= 0.8


@pytest.mark.parametrize(
    ("target", "machine", "advice"),
    [
        (Target(rate=10, p99_ms=4), Machine(), "allow more"),
        (Target(rate=0, p99_ms=10), Machine(), "positive"),
        (Target(rate=10, p99_ms=10), Machine(cores=2), "smaller workers"),
        (Target(rate=10, p99_ms=10), Machine(memory_bytes=1e8), "not enough memory"),
    ],
)
def test_what_cannot_be_reached_names_the_remedy(target: Target, machine: Machine, advice: str) -> None:
    with pytest.raises(SizingError, match=advice):
        needs(FIGURES, machine, target)


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    file = tmp_path / "results.json"
    without = {**vars(FIGURES), "front_cpu_ms": None}
    broken = {**vars(FIGURES), "alone_ms": None}
    file.write_text(json.dumps({"sizing": {"Envoy": vars(FIGURES), "one process": without, "broken": broken}}))
    return file


def test_figures_are_those_of_a_front_or_ones_own(measured: Path) -> None:
    assert figures_of(measured, "Envoy") == FIGURES
    assert figures_of(measured, "one process").front_cpu_ms == 0
    assert figures_of(measured, "broken", ["alone_ms=7"]).alone_ms == 7


def test_figures_that_are_all_ones_own_need_no_file() -> None:
    own = [f"{name}={value}" for name, value in vars(FIGURES).items()]
    assert figures_of(Path("no-such-file"), "Envoy", own) == FIGURES


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (["--front", "broken"], "--figure alone_ms=VALUE"),
        (["--front", "Caddy"], "choose with --front one of Envoy, one process, broken"),
        (["--figure", "worker_ms=3"], "NAME is one of worker_cpu_ms"),
        (["--figure", "alone_ms=quick"], "NAME=NUMBER"),
        (["--rates", "many"], "numbers separated by commas"),
        (["--p99-ms", "1"], "cannot be reached"),
        (["--fronts", "no-such-file"], "make bench-fronts"),
        (["--fronts", "pyproject.toml"], "not JSON"),
    ],
)
def test_bad_input_is_refused(measured: Path, flags: list[str], advice: str) -> None:
    ended = CliRunner().invoke(app, ["capacity", "--fronts", str(measured), *flags])
    assert ended.exit_code == 1
    assert advice in ended.output


def test_results_of_another_command_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text("{}")
    with pytest.raises(SizingError, match="not of `loadtest fronts`"):
        figures_of(file, "Envoy")


def test_the_command_prints_a_row_for_each_rate(measured: Path) -> None:
    ended = CliRunner().invoke(app, ["capacity", "--fronts", str(measured), "--rates", "100,10000"])
    assert ended.exit_code == 0, ended.output
    assert "Computed from measured figures, not measured" in ended.output
    assert "10,000" in ended.output
