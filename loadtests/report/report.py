"""A comparison as Markdown, as a table for the terminal, and as JSON with the raw samples beside it."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table as RichTable
from rich.text import Text

from loadtests.experiment.json_files import to_json
from loadtests.experiment.model import Block, Comparison
from loadtests.generator.load_result import LoadResult
from loadtests.report import tables
from loadtests.report.figures import SYMBOLS, info_of
from loadtests.report.verdicts import Findings, Verdict
from loadtests.report.words import accuracy_note, conclusion, conditions, how_measured, how_to_read
from loadtests.statistics import percentile

SCHEMA_VERSION = 3
"""Of results.json. Version 1 was the single closed loop's."""
COLOURS: dict[Verdict, str] = {"better": "blue", "worse": "red", "no difference seen": "dim"}


def markdown(comparison: Comparison, findings: Findings) -> str:
    """`report.md`, which shows `variants.svg`, `pareto.svg`, `latency.svg` and `blocks.svg` from its own folder."""
    lead, *others = conclusion(comparison, findings)
    parts = ["# Comparison under load", _escaped(conditions(comparison)), "## Conclusion", _escaped(lead)]
    parts += [_bullets(others)] if others else []
    if findings.warnings:
        parts += ["**Before you believe it**", _bullets(findings.warnings)]
    parts += ["## Verdict", _verdict_table(comparison, findings), _escaped(accuracy_note(comparison))]
    parts += [
        "✓ better, ✗ worse, ○ no difference seen: against the baseline, by the interval in brackets.",
        "## Which one to choose",
        "![Accuracy, throughput and memory of every arm](pareto.svg)",
        "## The arms side by side",
        "![Throughput, memory and latency of every arm](variants.svg)",
        "## Latency spectrum",
        "![Percentiles of latency under both open loops](latency.svg)",
        "## Block by block",
        "![Throughput of every block in the order run, and its ratio to the baseline](blocks.svg)",
    ]
    for title, table in sections(comparison, findings):
        parts += [f"## {title}", _table(table)] + ([_escaped(table.note)] if table.note else [])
    parts += ["## How it was measured", _bullets(how_measured(comparison)), "## How to read it"]
    parts += [_bullets(how_to_read(findings)), "## Environment"]
    facts = tables.Table(headings=("what", "value"), rows=tables.environment(comparison), left=2)
    parts += [_table(facts), "## To repeat it", f"```sh\n{comparison.command}\n```"]
    return "\n\n".join(filter(None, parts)) + "\n"


def sections(comparison: Comparison, findings: Findings) -> list[tuple[str, tables.Table]]:
    """The tables after the pictures, with their titles; those without a row are left out."""
    titled = [
        ("Largest rate that keeps the objective", tables.searches(comparison)),
        ("Memory", tables.memory(comparison)),
        ("Where the time went", tables.stages(comparison)),
        ("Load, failures and CPU", tables.loads(comparison)),
        ("Blocks that failed", tables.failures(comparison)),
        ("Every figure", tables.details(comparison, findings)),
        ("What was compared", tables.arms(comparison)),
    ]
    return [(title, table) for title, table in titled if table.rows]


def _verdict_table(comparison: Comparison, findings: Findings) -> str:
    headings = ["arm", "K/V tokens", *tables.verdict_headings(comparison, findings)]
    rows = []
    for line in tables.verdict_lines(comparison, findings):
        mark = f"<br>*{line.mark}*" if line.mark else ""
        cells = [
            cell.value
            if cell.verdict is None
            else f"{cell.value}<br>{cell.estimate} ({cell.interval})<br>{SYMBOLS[cell.verdict]} {cell.verdict}"
            for cell in line.cells
        ]
        rows.append([f"**{_escaped(line.label)}**{mark}", line.kv_tokens, *cells])
    return _rows(headings, rows, ["---", *["---:"] * (len(headings) - 1)])


def _table(table: tables.Table) -> str:
    rule = ["---" if table.is_words(column) else "---:" for column in range(len(table.headings))]
    return _rows([*table.headings], [[_escaped(cell) for cell in row] for row in table.rows], rule)


def _rows(headings: list[str], rows: list[list[str]], rule: list[str]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, rule, *rows))


def _bullets(items: list[str]) -> str:
    return "\n".join(f"- {_escaped(item)}" for item in items)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


def terminal_table(comparison: Comparison, findings: Findings) -> RichTable:
    """The verdict table, in at most 140 columns."""
    table = RichTable(
        title=f"{conditions(comparison)} {accuracy_note(comparison)}",
        title_justify="left",
        caption="against the baseline: change, its interval, verdict; ○ no difference seen, which is not proof of none",
        caption_justify="left",
        show_lines=True,
        padding=(0, 0),
        width=140,
    )
    table.add_column("arm", overflow="fold")
    for heading in ("K/V tokens", *tables.verdict_headings(comparison, findings)):
        # Broken in two, so that the labels get the room.
        before, separator, after = heading.partition(" at " if " at " in heading else " ")
        table.add_column(f"{before}\n{separator.lstrip()}{after}", justify="right")
    for line in tables.verdict_lines(comparison, findings):
        cells = []
        for cell in line.cells:
            text = Text(cell.value.replace(" ", "\n"), style="bold")
            if cell.verdict is not None:
                said = "no diff." if cell.verdict == "no difference seen" else cell.verdict
                interval = cell.interval.replace(" to ", "…")
                text.append(f"\n{cell.estimate}\n{interval}\n", style="not bold")
                text.append(f"{SYMBOLS[cell.verdict]} {said}", style=f"not bold {COLOURS[cell.verdict]}")
            cells.append(text)
        label = Text(line.label)
        label.append(f"\n{line.mark}" if line.mark else "", style="italic dim")
        table.add_row(label, line.kv_tokens, *cells)
    return table


def as_json(comparison: Comparison, findings: Findings) -> dict[str, Any]:
    """All figures for results.json, block by block; strict JSON.

    What is infinite is null: a figure tells it by `unanswered: true`, a load by the share of its requests.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "command": comparison.command,
        "finished": comparison.finished.isoformat(timespec="seconds") if comparison.finished else None,
        "ended_early": comparison.ended_early,
        "environment": comparison.environment,
        "plan": to_json(comparison.plan),
        "payloads": comparison.payloads,
        "rates": to_json(comparison.rates),
        "arms": [to_json(arm) for arm in comparison.plan.arms],
        "metrics": [to_json(metric) for metric in findings.metrics],
        "rows": _verdicts(findings),
        "warnings": findings.warnings,
        "capacity_searches": [to_json(search) for search in comparison.capacity_searches],
        "blocks": [block_document(block) for block in comparison.blocks],
        "info": {arm.label: _info(comparison, arm.label) for arm in comparison.plan.arms},
    }


def _info(comparison: Comparison, label: str) -> Any:
    known = info_of(comparison, label)
    return to_json({name: value for name, value in known.items() if name != "labels"})


def block_document(block: Block) -> dict[str, Any]:
    return {
        "arm": block.arm,
        "round": block.round,
        "failure": block.failure,
        "idle_bytes": block.idle_bytes,
        "after_bytes": block.after_bytes,
        "loads": {name: _load(load) for name, load in block.loads.items()},
    }


def _load(load: LoadResult) -> dict[str, Any]:
    latencies = load.latencies_ms
    answered = int(np.isfinite(latencies).sum())
    values = {
        field.name: getattr(load, field.name) for field in fields(load) if field.name not in {"latencies_ms", "trace"}
    }
    return {
        **{name: to_json(value) for name, value in values.items()},
        **{f"p{rank}_ms": to_json(percentile(latencies, rank)) for rank in (50, 95, 99)},
        "requests": len(latencies),
        "answered": answered,
        "unanswered": 1 - answered / len(latencies) if len(latencies) else 0.0,
    }


def _verdicts(findings: Findings) -> list[dict[str, Any]]:
    """The verdicts; whether a figure is null because it is infinite is told beside it."""
    rows = []
    for row in findings.rows:
        values: dict[str, Any] = to_json(row)
        for key, figure in row.figures.items():
            values["figures"][key]["unanswered"] = figure.value is not None and math.isinf(figure.value)
        rows.append(values)
    return rows


def write_samples(comparison: Comparison, path: Path) -> None:
    """The latencies of every block, failed ones too, as compressed npz; keys are `round-label-load`, rounds from 0."""
    arrays = {
        f"{block.round}-{block.arm}-{name}": load.latencies_ms
        for block in comparison.blocks
        for name, load in block.loads.items()
    }
    np.savez_compressed(path, allow_pickle=False, **arrays)
