"""The figures from a measurement of the fronts, and the table of what each rate needs."""

import json
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from loadtests.capacity.sizing import Figures, Machine, Needs, SizingError
from loadtests.report.rendering import Table, number

_NAMES = tuple(field.name for field in fields(Figures))


def figures_of(results: Path, front: str, own: Sequence[str] = ()) -> Figures:
    """The figures of a front in a results.json of `loadtest fronts`, with `own` ones, NAME=VALUE, replacing them.

    The file is not read if `own` gives all of them. Raises SizingError.
    """
    mine = _own(own)
    values = {**(_measured(results, front) if set(_NAMES) - mine.keys() else {}), **mine}
    if missing := [name for name in _NAMES if values.get(name) is None]:
        raise SizingError(
            f"{results} does not say {', '.join(missing)} of {front}: "
            f"{' '.join(f'--figure {name}=VALUE' for name in missing)}"
        )
    return Figures(**{name: value for name in _NAMES if (value := values[name]) is not None})


def _measured(results: Path, front: str) -> dict[str, float | None]:
    try:
        document: dict[str, Any] = json.loads(results.read_bytes())
        known = document["sizing"]
        measured: dict[str, float | None] = known[front]
    except OSError as error:
        raise SizingError(f"cannot read {results}: {error.strerror}; run `make bench-fronts` first") from error
    except (ValueError, TypeError) as error:
        raise SizingError(f"{results} is not JSON of `loadtest fronts`: give --fronts its results.json") from error
    except KeyError as error:
        if error.args == ("sizing",):
            raise SizingError(f"{results} is not of `loadtest fronts`: give --fronts its results.json") from error
        raise SizingError(f"{results} has no {front!r}: choose with --front one of {', '.join(known)}") from error
    # One process has no front.
    return {**measured, "front_cpu_ms": measured.get("front_cpu_ms") or 0.0}


def _own(words: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if name not in _NAMES or not math.isfinite(value) or value < 0:
            raise SizingError(f"--figure {word}: write NAME=NUMBER, where NAME is one of {', '.join(_NAMES)}")
        found[name] = value
    return found


def table_of(figures: Figures, machine: Machine, found: Sequence[Needs]) -> Table:
    """What each rate needs."""
    headings = ("requests/s", "workers", "their load %", "p99 ms", "cores of workers", "of fronts", "machines")
    rows = [
        (
            f"{one.rate:,.0f}",
            f"{one.workers:,}",
            f"{100 * one.load:.0f}",
            number(one.p99_ms),
            f"{one.worker_cores:,}",
            number(one.front_cores),
            f"{one.machines:,}",
            number(one.memory_bytes / 1e9),
            number(one.network_gbits),
            number(one.answers_gbits),
            f"{one.balancers}" if one.balancers else "none",
            " ".join(dict.fromkeys(one.limits)),
        )
        for one in found
    ]
    return Table(
        title="Computed from measured figures, not measured",
        headings=[*headings, "memory GB", "Gbit/s in", "Gbit/s out", "balancers", "limited by"],
        rows=rows,
        text=(-1,),
        note=(
            f"A request: {number(figures.worker_cpu_ms)} ms of CPU in a worker ({number(figures.loop_cpu_ms)} of it in "
            f"its event loop), {figures.front_cpu_ms:.3f} in the front, {number(figures.alone_ms)} ms alone, "
            f"{number(figures.request_bytes / 1e3)} kB in, {number(figures.response_bytes / 1e3)} kB out. "
            f"A worker: {machine.cores_per_worker} cores, {number(figures.worker_bytes / 1e6)} MB. "
            f"A machine: {machine.cores} cores, {number(machine.memory_bytes / 1e9)} GB, "
            f"{machine.network_gbits:g} Gbit/s. Machines include the spare ones."
        ),
    )
