"""Reports of a profile: tables for the terminal, profile.md, profile.json and a chart."""

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from pydantic_core import to_jsonable_python
from rich.box import SIMPLE_HEAD
from rich.table import Table

from export.descriptions import kv_tokens
from export.intervals import MIN_ROUNDS_FOR_INTERVAL
from export.profile import THESIS, Cell, Measured
from service.host import cpu_features, git_commit

HEADINGS = (
    "batch",
    "model",
    "K/V tokens",
    "images/s (slowest–fastest round)",
    "throughput",
    "ms per batch",
    "CPU ms per image",
    "added MB",
    "added",
    "peak MB",
)


def rows(measured: Measured) -> Iterator[tuple[str, ...]]:
    """Rows of the table. `throughput` and `added` are ratios to the first model at the same batch size."""
    baseline: dict[int, Cell] = {}
    for cell in measured.cells():
        base = baseline.setdefault(cell.batch, cell)
        yield (
            str(cell.batch),
            cell.arm.label,
            kv_tokens(cell.arm.attention),
            f"{cell.images_per_s:.1f} ({min(cell.rates):.1f}–{max(cell.rates):.1f})",
            "1" if cell is base else str(cell.ratio),
            f"{cell.latency_ms:.1f}",
            f"{cell.cpu_ms:.2f}",
            f"{cell.added_bytes / 1e6:.0f}",
            "1" if cell is base else f"×{cell.added_bytes / max(1, base.added_bytes):.2f}",
            f"{cell.peak_bytes / 1e6:.0f}",
        )


def table(measured: Measured) -> Table:
    """The table for the terminal."""
    shown = Table(*HEADINGS, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption(measured))
    for row in rows(measured):
        shown.add_row(*row)
    return shown


def caption(measured: Measured) -> str:
    """How it was measured, what the columns mean, and the results of the thesis."""
    setup = measured.setup
    on = f"{setup.threads} threads" if setup.device == "cpu" else setup.device
    thesis = "; ".join(
        f"{variant} {speed:+.1f} % throughput, {memory:+.1f} % memory" for variant, (speed, memory) in THESIS.items()
    )
    intervals = ", with 95 % intervals (paired Student t over rounds)"
    return (
        f"{measured.rounds} interleaved rounds of {setup.seconds:g} s, a fresh process each, on {on}. Ratios are to "
        f"{measured.arms[0].label}{intervals if measured.rounds >= MIN_ROUNDS_FOR_INTERVAL else ''}. Added: peak above "
        f"the loaded session. The thesis, on a GPU at 384 px, in total memory: {thesis}."
    )


def markdown(measured: Measured) -> str:
    """The table and its caption in Markdown."""
    lines = [f"| {' | '.join(HEADINGS)} |", "| ---: | --- |" + " ---: |" * (len(HEADINGS) - 2)]
    lines += [f"| {' | '.join(row)} |" for row in rows(measured)]
    return "\n".join([*lines, "", caption(measured), ""])


def operator_table(measured: dict[str, dict[str, float]]) -> Table:
    """Milliseconds per run by operator, one column per model."""
    shown = Table("operator, ms", *measured, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = list(measured.values())
    largest = {name: max(column.get(name, 0.0) for column in columns) for column in columns for name in column}
    for name in sorted(largest, key=lambda name: -largest[name]):
        shown.add_row(name, *(f"{1000 * column.get(name, 0.0):.1f}" for column in columns))
    shown.add_section()
    shown.add_row("total", *(f"{1000 * sum(column.values()):.1f}" for column in columns))
    return shown


def as_json(measured: Measured) -> str:
    """Machine, setup, and every cell with the rate of each round."""
    record = {
        "environment": {
            "cpu": cpu_features(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "git_commit": git_commit(),
            **{name: version(name) for name in ("onnxruntime", "onnx", "torch")},
        },
        "setup": asdict(measured.setup),
        "rounds": measured.rounds,
        "arms": [{**asdict(arm), "model": arm.model.name} for arm in measured.arms],
        "cells": [{**asdict(cell), "arm": cell.arm.label} for cell in measured.cells()],
        "thesis_percent": THESIS,
    }
    return json.dumps(to_jsonable_python(record), indent=1, ensure_ascii=False) + "\n"


def write(measured: Measured, folder: Path) -> list[Path]:
    """Write profile.md, profile.json, profile.svg and profile.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    document, record, vector, picture = (folder / f"profile.{kind}" for kind in ("md", "json", "svg", "png"))
    document.write_text(markdown(measured), encoding="utf-8")
    record.write_text(as_json(measured), encoding="utf-8")
    # Fixed ids and no date: equal measurements give equal files.
    with mpl.rc_context({"svg.hashsalt": "stridevit"}):
        figure = _bars(measured)
        figure.savefig(vector, metadata={"Date": None})
        figure.savefig(picture, dpi=150)
    return [document, record, vector, picture]


def _bars(measured: Measured) -> Figure:
    arms, batches = measured.arms, measured.setup.batches
    figure = Figure(figsize=(10, 1.6 + 0.22 * len(arms) * len(batches)), layout="constrained")
    speed, memory = figure.subplots(1, 2, sharey=True)
    height = 0.8 / len(batches)
    cells = list(measured.cells())
    for number, batch in enumerate(batches):
        chosen = [cell for cell in cells if cell.batch == batch]
        places = [index + number * height for index in range(len(arms))]
        ratios = np.array([cell.ratio.ratio for cell in chosen])
        low = np.array([cell.ratio.low or cell.ratio.ratio for cell in chosen])
        high = np.array([cell.ratio.high or cell.ratio.ratio for cell in chosen])
        color = f"C{number}"
        speed.barh(places, ratios, height, xerr=[ratios - low, high - ratios], color=color, ecolor="0.3")
        memory.barh(places, [cell.added_bytes / 1e6 for cell in chosen], height, color=color, label=f"batch {batch}")
    speed.axvline(1, color="0.3", linewidth=0.8)
    speed.set_yticks([index + 0.4 - height / 2 for index in range(len(arms))], [arm.label for arm in arms])
    speed.invert_yaxis()
    speed.set(xlabel=f"throughput, ratio to {arms[0].label}")
    memory.set(xlabel="peak memory above the loaded session, MB")
    for axes in (speed, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    memory.legend(frameon=False)
    return figure
