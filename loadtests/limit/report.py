"""What `python -m loadtests limit` found: the arms under each load, and ratios paired by round.

Percentiles are taken round by round, and their median is shown. Where a round holds too few answers for its 99th
percentile, the answers of all rounds are pooled instead, and the figure is marked.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loadtests.experiment.model import Arm
from loadtests.generator.load_result import IN_FLIGHT, LoadResult
from loadtests.generator.samples import LATE_MS
from loadtests.limit.measure import LimitExperiment, closed_name
from loadtests.report.experiment import conditions, write_experiment
from loadtests.report.rendering import UNKNOWN, Table, print_tables
from loadtests.statistics import paired_ratio, percentile

POOLED = -1
"""The key of a figure of all rounds together."""
_LEVEL = 0.95

ByRound = dict[int, float]
"""A figure by round."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Two figures, one divided by the other (or subtracted) round by round."""

    name: str
    values: ByRound
    unit: str = "×"

    @property
    def median(self) -> float:
        """The median over rounds."""
        return float(np.median(list(self.values.values())))

    @property
    def text(self) -> str:
        """The median with the smallest and the largest round."""
        values = list(self.values.values())
        spread = "rounds pooled" if POOLED in self.values else f"{min(values):.2f}–{max(values):.2f}"
        return f"×{self.median:.2f} ({spread})" if self.unit == "×" else f"{self.median:.2f} ({spread}) {self.unit}"

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's t interval of the mean ratio over rounds; None for fewer than five rounds."""
        values = list(self.values.values())
        effect = paired_ratio(values, [1.0] * len(values)) if self.unit == "×" and POOLED not in self.values else None
        return effect.at(_LEVEL)[1:] if effect else None


class Figures:
    """The figures of one arm under one load; empty if no block has it."""

    def __init__(self, experiment: LimitExperiment, arm: Arm, load: str) -> None:
        self.label = arm.label
        blocks = [block for block in experiment.blocks_of(arm.label) if load in block.loads]
        self.loads = {block.round: block.loads[load] for block in blocks}
        self.idle_bytes = {block.round: float(block.idle_bytes) for block in blocks if block.idle_bytes}

    def of(self, read: Callable[[LoadResult], float]) -> ByRound:
        """Any figure of the load."""
        return {number: read(load) for number, load in self.loads.items()}

    def percentile_ms(self, rank: float) -> ByRound:
        """A latency percentile by round, or pooled if a round is too small for the 99th."""
        samples = {number: load.latencies_ms for number, load in self.loads.items()}
        if any(percentile(latencies, 99) is None for latencies in samples.values()):
            samples = {POOLED: np.concatenate(list(samples.values()))}
        values = {number: percentile(latencies, rank) for number, latencies in samples.items()}
        return {number: value for number, value in values.items() if value is not None}

    @property
    def throughput(self) -> ByRound:
        """Images per second."""
        return self.of(lambda load: load.throughput)

    @property
    def tail(self) -> ByRound:
        """p99 divided by p50."""
        return ratio(self.percentile_ms(99), self.percentile_ms(50))


def ratio(above: ByRound, below: ByRound) -> ByRound:
    """Divided round by round, without infinite values; median by median if one is pooled, or they share no round."""
    above, below = ({n: value for n, value in values.items() if math.isfinite(value)} for values in (above, below))
    shared = [number for number in above if below.get(number)]
    if shared:
        return {number: above[number] / below[number] for number in shared}
    if not above or not any(below.values()):
        return {}
    return {POOLED: float(np.median(list(above.values())) / np.median(list(below.values())))}


def ratios(experiment: LimitExperiment) -> list[Ratio]:
    """What the services are judged by, as far as it was measured."""
    models = dict.fromkeys(arm.model for arm in experiment.plan.arms)
    return [found for model in models for found in _ratios(experiment, model) if found.values]


def _ratios(experiment: LimitExperiment, model: str) -> Iterator[Ratio]:
    plan = experiment.plan
    arms = [arm for arm in plan.arms if arm.model == model and arm.kind != "engine"]
    services, limits = arms[:-1], _engine(experiment, model, "images_per_second")
    for load in map(closed_name, plan.connections):
        *found, plain = (Figures(experiment, arm, load) for arm in arms)
        for one in (*found, plain):
            peak = one.of(lambda load: load.peak_bytes)
            growth = {n: 100 * (value - 1) for n, value in ratio(peak, one.idle_bytes).items()}
            yield Ratio(name=f"{one.label} / engine limit, images/s, {load}", values=ratio(one.throughput, limits))
            yield Ratio(name=f"{one.label}, p99 / p50, {load}", values=one.tail)
            yield Ratio(name=f"{one.label}, peak memory above idle, {load}", values=growth, unit="%")
        for one, other in [*((one, plain) for one in found), *((one, found[0]) for one in found[1:])]:
            name = f"{one.label} / {other.label}"
            yield Ratio(name=f"{name}, images/s, {load}", values=ratio(one.throughput, other.throughput))
            p50_ms = ratio(one.percentile_ms(50), other.percentile_ms(50))
            yield Ratio(name=f"{name}, p50, {load}", values=p50_ms)
    for arm in services:
        opened, single = Figures(experiment, arm, plan.open_name), Figures(experiment, arm, closed_name(1))
        values = ratio(opened.percentile_ms(99), single.percentile_ms(50))
        yield Ratio(name=f"{arm.label}, p99 in the {plan.open_name} / p50 at {closed_name(1)}", values=values)
        alone = _engine(experiment, model, "baseline_pss_bytes")
        above = {n: (idle - alone[n]) / 1e6 for n, idle in opened.idle_bytes.items() if n in alone}
        yield Ratio(name=f"{arm.label} idle, memory above ONNX Runtime and model alone", values=above, unit="MB")


def _engine(experiment: LimitExperiment, model: str, name: str) -> ByRound:
    """A figure of a model's engine limit."""
    arm = next(arm for arm in experiment.plan.arms if arm.kind == "engine" and arm.model == model)
    return {block.round: block.info[name] for block in experiment.blocks_of(arm.label) if block.info[name]}


def load_table(experiment: LimitExperiment) -> Table:
    """Every arm under every load."""
    rows: list[tuple[str, ...]] = []
    for arm in experiment.plan.arms:
        blocks = experiment.blocks_of(arm.label)
        if arm.kind == "engine" and blocks:
            batches = "/".join(dict.fromkeys(str(block.info["batch_size"]) for block in blocks))
            alone = _middle(_engine(experiment, arm.model, "baseline_pss_bytes"), ".1f", scale=1e-6)
            rates = _range(_engine(experiment, arm.model, "images_per_second"))
            rows.append((arm.label, f"batch {batches}", rates, *[UNKNOWN] * 4, alone, *[UNKNOWN] * 3))
        for load in experiment.plan.loads(arm):
            figures = Figures(experiment, arm, load.name)
            if figures.loads:
                rows.append((arm.label, load.name, *_cells(figures)))
    headings = ("arm", "load", "images/s (min–max)", "p50 ms", "p99 ms", "p99/p50", "errors")
    memory_and_cpu = ("idle MB", "peak MB", "server cores", "generator cores")
    return Table(title=_conditions(experiment), headings=(*headings, *memory_and_cpu), rows=rows, text=(0, 1))


def _cells(figures: Figures) -> Iterator[str]:
    loads = figures.loads.values()
    yield _range(figures.throughput)
    yield _middle(figures.percentile_ms(50), ".1f")
    yield _middle(figures.percentile_ms(99), ".1f")
    yield _middle(figures.tail, ".2f")
    errors, arrivals = sum(load.errors for load in loads), sum(load.arrivals for load in loads)
    unsent, late = sum(load.unsent_arrivals for load in loads), sum(load.late_arrivals for load in loads)
    yield f"{errors}" + (f" (of {arrivals}: unsent {unsent}, late {late})" if arrivals else "")
    yield _middle(figures.idle_bytes, ".1f", scale=1e-6)
    yield f"{max(load.peak_bytes for load in loads) / 1e6:.1f}"
    yield _middle(figures.of(lambda load: load.server_cores), ".2f")
    yield _middle(figures.of(lambda load: load.generator_cores), ".2f")


def ratio_table(experiment: LimitExperiment) -> Table:
    """The ratios with their intervals."""
    rows = []
    for found in ratios(experiment):
        interval = f"×{found.interval[0]:.3f}–{found.interval[1]:.3f}" if found.interval else UNKNOWN
        rows.append((found.name, found.text, interval))
    headings = ("figure", "median over rounds (smallest–largest)", f"{_LEVEL:.0%} interval")
    return Table(title="Ratios", headings=headings, rows=rows)


def _conditions(experiment: LimitExperiment) -> str:
    plan = experiment.plan
    services = ", ".join(arm.label for arm in plan.arms if arm.kind == "service")
    return conditions(experiment, f"{services}, {plan.seconds:g} s per load after {plan.warmup_seconds:g} s of warm-up")


def write(experiment: LimitExperiment, out: Path) -> Path:
    """Write `report.md` and `results.json` in the folder `out`, print the tables, and return the report's path."""
    loads, found = load_table(experiment), ratio_table(experiment)
    versions: Mapping[str, str] = next((b.info["versions"] for b in experiment.blocks if "versions" in b.info), {})
    keys = ("name", "unit", "median", "interval", "values")
    figures = [{key: getattr(one, key) for key in keys} for one in ratios(experiment)]
    write_experiment(
        experiment,
        out,
        template="limit.md.j2",
        figures={"ratios": figures},
        conditions=_conditions(experiment),
        loads=loads,
        ratios=found,
        in_flight=IN_FLIGHT,
        late_ms=LATE_MS,
        versions=versions,
    )
    print_tables(loads, found, width=190)
    return out / "report.md"


def _range(values: ByRound) -> str:
    numbers = list(values.values())
    return f"{np.median(numbers):.1f} ({min(numbers):.1f}–{max(numbers):.1f})"


def _middle(values: ByRound, form: str, *, scale: float = 1.0) -> str:
    if not values:
        return UNKNOWN
    return f"{np.median(list(values.values())) * scale:{form}}" + "*" * (POOLED in values)
