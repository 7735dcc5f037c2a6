"""What `python -m loadtests limit` found: rows, ratios paired by round, a Markdown page and a JSON file.

Percentiles are taken round by round, and their median is shown. Where a round holds too few answers for its 99th
percentile, the answers of all rounds are pooled instead, and the figure is marked.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from loadtests.experiment.json_files import to_json, write_json
from loadtests.limit.measure import Arm, Drive, Results
from loadtests.statistics import percentile

POOLED = -1
"""Stands for the round where a figure is of all rounds together."""

Figures = dict[int, float]
"""A figure by round."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm under one load; `connections` is None for the open loop."""

    arm: Arm
    connections: int | None
    throughput: Figures
    p50_ms: Figures
    p99_ms: Figures
    idle_bytes: Figures
    peak_bytes: Figures
    server_cores: Figures
    generator_cores: Figures
    answered: int
    errors: int
    arrivals: int
    late_arrivals: int
    unsent_arrivals: int

    @property
    def tail(self) -> Figures:
        """p99 over p50."""
        return ratio(self.p99_ms, self.p50_ms)

    @property
    def growth(self) -> Figures:
        """Peak over idle memory, less 1."""
        return {number: value - 1 for number, value in ratio(self.peak_bytes, self.idle_bytes).items()}


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A figure that the issue of speed asks for, by round."""

    name: str
    values: Figures
    unit: str = "×"

    @property
    def median(self) -> float:
        """Over rounds."""
        return float(np.median(list(self.values.values())))

    @property
    def text(self) -> str:
        """With the smallest and largest round."""
        values = list(self.values.values())
        numbers = f"{self.median:.2f} ({min(values):.2f}–{max(values):.2f})"
        if POOLED in self.values:
            numbers = f"{self.median:.2f} (rounds pooled)"
        return f"{numbers} {self.unit}" if self.unit != "×" else f"×{numbers}"


def ratio(above: Figures, below: Figures) -> Figures:
    """Divided round by round; if one is pooled, or they share no round, median by median. Endless figures have none."""
    above, below = (_finite(figures) for figures in (above, below))
    shared = [number for number in above if below.get(number)]
    if shared:
        return {number: above[number] / below[number] for number in shared}
    if not above or not any(below.values()):
        return {}
    return {POOLED: float(np.median(list(above.values())) / np.median(list(below.values())))}


def _finite(figures: Figures) -> Figures:
    return {number: value for number, value in figures.items() if math.isfinite(value)}


def rows(results: Results) -> list[Row]:
    """The servers' rows: service, then plain, by connections, the open loop last."""
    result = []
    for arm in ("service", "plain"):
        loads = {drive.load.connections for drive in results.drives if drive.arm == arm}
        for connections in sorted(loads, key=lambda load: (load is None, load)):
            drives = [drive for drive in results.drives if drive.arm == arm and drive.load.connections == connections]
            result.append(_row(arm, connections, drives))
    return result


def _row(arm: Arm, connections: int | None, drives: list[Drive]) -> Row:
    p50_ms, p99_ms = _percentiles(drives)
    return Row(
        arm=arm,
        connections=connections,
        throughput={drive.round: drive.load.throughput for drive in drives},
        p50_ms=p50_ms,
        p99_ms=p99_ms,
        idle_bytes={drive.round: drive.idle_bytes for drive in drives},
        peak_bytes={drive.round: drive.load.peak_bytes for drive in drives},
        server_cores={drive.round: drive.load.server_cores for drive in drives},
        generator_cores={drive.round: drive.load.generator_cores for drive in drives},
        answered=sum(drive.load.answered for drive in drives),
        errors=sum(drive.load.errors for drive in drives),
        arrivals=sum(drive.load.arrivals for drive in drives),
        late_arrivals=sum(drive.load.late_arrivals for drive in drives),
        unsent_arrivals=sum(drive.load.unsent_arrivals for drive in drives),
    )


def _percentiles(drives: list[Drive]) -> tuple[Figures, Figures]:
    samples = {drive.round: drive.load.latencies_ms for drive in drives}
    if any(percentile(latencies, 99) is None for latencies in samples.values()):
        samples = {POOLED: np.concatenate(list(samples.values()))}
    return _known(samples, 50), _known(samples, 99)


def _known(samples: dict[int, Any], rank: float) -> Figures:
    values = {number: percentile(latencies, rank) for number, latencies in samples.items()}
    return {number: value for number, value in values.items() if value is not None}


def ratios(results: Results) -> list[Ratio]:
    """What the service is to be judged by, as far as it was measured."""
    by_load = {(row.arm, row.connections): row for row in rows(results)}
    limit = {number: said["images_per_second"] for number, said in results.limits.items()}
    found: list[Ratio] = []
    for connections in results.plan.connections:
        at = f"at {connections} connection{'s' * (connections > 1)}"
        service, plain = by_load.get(("service", connections)), by_load.get(("plain", connections))
        if service:
            found.append(Ratio(name=f"service / engine limit, images/s {at}", values=ratio(service.throughput, limit)))
        if plain:
            found.append(Ratio(name=f"plain / engine limit, images/s {at}", values=ratio(plain.throughput, limit)))
        if service and plain:
            found += [
                Ratio(name=f"service / plain, images/s {at}", values=ratio(service.throughput, plain.throughput)),
                Ratio(name=f"service / plain, p50 {at}", values=ratio(service.p50_ms, plain.p50_ms)),
            ]
        for row in filter(None, (service, plain)):
            found += [
                Ratio(name=f"{row.arm}, p99 / p50 {at}", values=row.tail),
                Ratio(name=f"{row.arm}, peak memory above idle {at}", values=_percent(row.growth), unit="%"),
            ]
    opened, single = by_load.get(("service", None)), by_load.get(("service", 1))
    if opened and single:
        name = f"service, p99 at {results.plan.load_fraction:.0%} load (open loop) / p50 at 1 connection"
        found.append(Ratio(name=name, values=ratio(opened.p99_ms, single.p50_ms)))
    found.append(
        Ratio(name="service idle, memory above ONNX Runtime and model alone", values=_above(results), unit="MB")
    )
    return [one for one in found if one.values]


def _above(results: Results) -> Figures:
    """MB of the idle service above the baseline process of the same round."""
    idle = {drive.round: drive.idle_bytes for drive in results.drives if drive.arm == "service"}
    alone = {number: pss for number, said in results.limits.items() if (pss := said["baseline_pss_bytes"])}
    return {number: (idle[number] - alone[number]) / 1e6 for number in idle if number in alone}


def _percent(values: Figures) -> Figures:
    return {number: value * 100 for number, value in values.items()}


HEADINGS = (
    "arm",
    "load",
    "images/s (min–max)",
    "p50 ms",
    "p99 ms",
    "p99/p50",
    "errors",
    "idle MB",
    "peak MB",
    "server cores",
    "generator cores",
)


def cells(results: Results) -> list[tuple[str, ...]]:
    """The table as text, in the order of `HEADINGS`."""
    lines: list[tuple[str, ...]] = []
    if results.limits:
        said = results.limits.values()
        batches = "/".join(dict.fromkeys(str(one["batch_size"]) for one in said))
        rates = {number: one["images_per_second"] for number, one in results.limits.items()}
        alone = [one["baseline_pss_bytes"] / 1e6 for one in said if one["baseline_pss_bytes"]]
        memory = f"{np.median(alone):.1f}" if alone else "–"
        lines.append(("engine limit", f"batch {batches}", _range(rates), *"––––", memory, *"–––"))
    for row in rows(results):
        opened = row.connections is None
        lines.append(
            (
                row.arm,
                f"{results.plan.load_fraction:.0%}, open loop" if opened else f"{row.connections} conn.",
                _range(row.throughput),
                _middle(row.p50_ms, ".1f"),
                _middle(row.p99_ms, ".1f"),
                _middle(row.tail, ".2f"),
                f"{row.errors}"
                + (f" (of {row.arrivals}: unsent {row.unsent_arrivals}, late {row.late_arrivals})" if opened else ""),
                f"{np.median(list(row.idle_bytes.values())) / 1e6:.1f}",
                f"{max(row.peak_bytes.values()) / 1e6:.1f}",
                _middle(row.server_cores, ".2f"),
                _middle(row.generator_cores, ".2f"),
            )
        )
    return lines


def tables(results: Results) -> list[Table]:
    """For the terminal."""
    measured = Table(title=conditions(results), title_justify="left")
    for heading in HEADINGS:
        measured.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right", no_wrap=True)
    for line in cells(results):
        measured.add_row(*line)
    judged = Table(title="median over rounds (smallest–largest)", title_justify="left")
    judged.add_column("figure")
    judged.add_column("value", justify="right", no_wrap=True)
    for one in ratios(results):
        judged.add_row(one.name, one.text)
    return [measured, judged]


def conditions(results: Results) -> str:
    """In one sentence, what the figures hold for."""
    plan = results.plan
    early = f" Ended early: {results.ended_early}." if results.ended_early else ""
    return (
        f"{plan.model}: {plan.rounds} round{'s' * (plan.rounds > 1)}, {plan.seconds:g} s a load after "
        f"{plan.warmup_seconds:g} s of warm-up; {results.payloads}.{early}"
    )


def markdown(results: Results) -> str:
    """The page: conditions, both tables, how to read them, and where it was measured."""
    lines = ["# The service, the engine limit and a plain server", "", conditions(results), ""]
    lines += ["```sh", results.command, "```", ""]
    lines += ["| " + " | ".join(HEADINGS) + " |", "| --- | --- |" + " ---: |" * (len(HEADINGS) - 2)]
    lines += ["| " + " | ".join(line) + " |" for line in cells(results)]
    lines += ["", "| figure, median over rounds (smallest–largest) | value |", "| --- | ---: |"]
    lines += [f"| {one.name} | {one.text} |" for one in ratios(results)]
    lines += ["", _READING, "", *(f"- {name}: {value}" for name, value in _where(results).items()), ""]
    return "\n".join(lines)


def write(results: Results, out: Path) -> None:
    """`report.md` and `results.json` in the folder `out`."""
    (out / "report.md").write_text(markdown(results), encoding="utf-8")
    write_json(as_json(results), out / "results.json")


def as_json(results: Results) -> dict[str, Any]:
    """All figures, measurement by measurement."""
    return {
        "schema_version": 1,
        "command": results.command,
        "finished": results.finished.isoformat(timespec="seconds") if results.finished else None,
        "ended_early": results.ended_early,
        "environment": _where(results),
        "plan": to_json(results.plan),
        "payloads": results.payloads,
        "ratios": [
            {"name": one.name, "unit": one.unit, "median": one.median, "rounds": list(one.values.values())}
            for one in ratios(results)
        ],
        "engine_limits": [{"round": number, **said} for number, said in results.limits.items()],
        "drives": [_drive_as_json(drive) for drive in results.drives],
    }


def _drive_as_json(drive: Drive) -> dict[str, Any]:
    load = drive.load
    return {
        "round": drive.round,
        "arm": drive.arm,
        "connections": load.connections,
        "mode": load.mode,
        "offered_rate": load.offered_rate,
        "throughput": load.throughput,
        "answered": load.answered,
        **{f"p{rank}_ms": percentile(load.latencies_ms, rank) for rank in (50, 95, 99)},
        "errors": load.errors,
        "arrivals": load.arrivals,
        "late_arrivals": load.late_arrivals,
        "unsent_arrivals": load.unsent_arrivals,
        "idle_bytes": drive.idle_bytes,
        "peak_bytes": load.peak_bytes,
        "server_cores": load.server_cores,
        "generator_cores": load.generator_cores,
    }


def _where(results: Results) -> dict[str, str]:
    said = next(iter(results.limits.values()), {})
    return {**results.environment, **said.get("versions", {})}


def _range(values: Figures) -> str:
    numbers = list(values.values())
    return f"{np.median(numbers):.1f} ({min(numbers):.1f}–{max(numbers):.1f})"


def _middle(values: Figures, form: str) -> str:
    if not values:
        return "–"
    return f"{np.median(list(values.values())):{form}}" + "*" * (POOLED in values)


_READING = """\
Rounds are interleaved, every other one backwards, and each server is a fresh process. *Engine limit* is decoding and
`session.run` at the best batch size with no HTTP; its idle memory is that of a process with ONNX Runtime and the
model alone. *plain* is `loadtests/baseline/plain_fastapi.py`; it decodes each image whole, where the service, and so
the engine limit, lets libjpeg scale large JPEGs down. images/s counts answers within the window; percentiles are of
the images due within it, round by round, and their median is shown (`*`: rounds pooled, for want of answers; `inf`:
so many were not answered with 200). In the open loop a latency counts from the scheduled moment of a Poisson process
with at most 256 images under way; *unsent* are arrivals beyond that, *late* those sent 5 ms or more after their
moment. Memory is PSS of the process tree; idle is the fresh process. Server and generator share the machine: their
CPU time by wall time is given in cores."""
