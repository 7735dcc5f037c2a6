"""A comparison as a table, a JSON file and a page. A percentile is shown only where enough samples lie beyond it."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from rich.table import Table

from loadtests.compare import Comparison, plan_as_json

_MIN_BEYOND = 5
"""Samples that must lie beyond a percentile for it to be shown."""

HEADINGS = (
    "model",
    "K/V tokens",
    "images/s",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "errors",
    "peak MB",
    "under load +MB",
    "top-1",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model's figures over all its blocks."""

    model: str
    variant: str
    tokens: int
    kv_tokens: int
    throughput: float
    """Median over blocks."""
    throughput_range: tuple[float, float]
    """Slowest and fastest block."""
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    answered: int
    errors: int
    peak_bytes: int
    """Largest over blocks."""
    idle_bytes: int
    """Of the block with the largest peak."""
    top1: float | None
    """From the manifest."""
    top1_of: str | None

    def cells(self) -> tuple[str, ...]:
        """As text, in the order of `HEADINGS`."""
        low, high = self.throughput_range
        return (
            self.model,
            f"{self.kv_tokens} of {self.tokens}",
            f"{self.throughput:.1f} ({low:.1f}–{high:.1f})",
            _ms(self.p50_ms),
            _ms(self.p95_ms),
            _ms(self.p99_ms),
            str(self.errors),
            f"{self.peak_bytes / 1e6:.1f}",
            f"{(self.peak_bytes - self.idle_bytes) / 1e6:.1f}",
            "–" if self.top1 is None else f"{self.top1:.2%}",
        )


def rows(comparison: Comparison) -> list[Row]:
    """One row a model, in the order of the plan."""
    result = []
    for model in comparison.plan.models:
        blocks = comparison.of(model)
        throughputs = [block.throughput for block in blocks]
        latencies = np.concatenate([block.latencies_ms for block in blocks])
        heaviest = max(blocks, key=lambda block: block.peak_bytes)
        info = blocks[0].info
        accuracy = info.get("accuracy")
        result.append(
            Row(
                model=model,
                variant=info["variant"],
                tokens=info["tokens"],
                kv_tokens=info["kv_tokens"],
                throughput=float(np.median(throughputs)),
                throughput_range=(min(throughputs), max(throughputs)),
                p50_ms=percentile(latencies, 50),
                p95_ms=percentile(latencies, 95),
                p99_ms=percentile(latencies, 99),
                answered=len(latencies),
                errors=sum(block.errors for block in blocks),
                peak_bytes=heaviest.peak_bytes,
                idle_bytes=heaviest.idle_bytes,
                top1=accuracy["top1"] if accuracy else None,
                top1_of=f"{accuracy['dataset']} {accuracy['split']}, n={accuracy['n']}" if accuracy else None,
            )
        )
    return result


def percentile(samples: npt.NDArray[np.float64], rank: float) -> float | None:
    """The `rank`-th percentile, or None where fewer than five samples lie beyond it."""
    if len(samples) * (100 - rank) / 100 < _MIN_BEYOND:
        return None
    return float(np.percentile(samples, rank))


def table(comparison: Comparison) -> Table:
    """For the terminal."""
    result = Table(title=conditions(comparison), title_justify="left")
    for heading in HEADINGS:
        result.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for row in rows(comparison):
        result.add_row(*row.cells())
    return result


def conditions(comparison: Comparison) -> str:
    """In one sentence, what the figures hold for."""
    plan = comparison.plan
    return (
        f"closed loop, {plan.users} users, {plan.rounds} blocks of {plan.seconds:g} s a model, interleaved; "
        f"{comparison.payloads}"
    )


def write_json(comparison: Comparison, path: Path) -> None:
    """All figures, block by block, with the environment. Raw latencies go to samples.npz beside it."""
    document: dict[str, Any] = {
        "schema_version": 1,
        "finished": comparison.finished.isoformat(timespec="seconds"),
        "environment": comparison.environment,
        "plan": plan_as_json(comparison.plan),
        "payloads": comparison.payloads,
        "rows": [vars(row) for row in rows(comparison)],
        "blocks": [
            {
                "model": block.model,
                "throughput": block.throughput,
                "answered": len(block.latencies_ms),
                "errors": block.errors,
                "idle_bytes": block.idle_bytes,
                "peak_bytes": block.peak_bytes,
            }
            for block in comparison.blocks
        ],
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    arrays = {f"{number}-{block.model}": block.latencies_ms for number, block in enumerate(comparison.blocks)}
    np.savez_compressed(path.with_name("samples.npz"), allow_pickle=False, **arrays)


def write_html(comparison: Comparison, path: Path) -> None:
    """A page that needs no other file."""
    table_rows = rows(comparison)
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE)
    path.write_text(
        page.render(
            conditions=conditions(comparison),
            finished=f"{comparison.finished:%Y-%m-%d %H:%M} UTC",
            headings=HEADINGS,
            rows=table_rows,
            plots=[_latency_plot(comparison), _ladder_plot(table_rows)],
            environment=comparison.environment,
            top1_of=sorted({row.top1_of for row in table_rows if row.top1_of}),
        ),
        encoding="utf-8",
    )


def _latency_plot(comparison: Comparison) -> str:
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    for model in comparison.plan.models:
        latencies = np.sort(np.concatenate([block.latencies_ms for block in comparison.of(model)]))
        if len(latencies):
            share = np.arange(1, len(latencies) + 1) / len(latencies)
            axes.plot(latencies, share * 100, label=model, linewidth=1.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("latency, ms (log scale)")
    axes.set_ylabel("answered within, % of images")
    axes.set_title("Latency under load", loc="left")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right", frameon=False)
    return _svg(figure)


def _ladder_plot(table_rows: list[Row]) -> str:
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row in table_rows:
        low, high = row.throughput_range
        error = [[row.throughput - low], [high - row.throughput]]
        left.barh(row.model, row.throughput, xerr=error, error_kw={"ecolor": "#444", "capsize": 3})
        right.barh(row.model, row.idle_bytes / 1e6)
        colour = right.patches[-1].get_facecolor()
        added = (row.peak_bytes - row.idle_bytes) / 1e6
        right.barh(row.model, added, left=row.idle_bytes / 1e6, color=colour, alpha=0.45)
    left.set_title("Throughput, images/s\n(median and range of blocks)", loc="left", fontsize=10)
    right.set_title("Memory, MB\n(idle, and light: peak under load)", loc="left", fontsize=10)
    right.set_yticks([])
    for axes in (left, right):
        axes.invert_yaxis()
        axes.grid(alpha=0.3, axis="x")
    return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>StrideViT: comparison under load</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; color: #1d2430; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.5rem; margin-bottom: 0; }
  p, dl { color: #556; margin: .3rem 0 1.2rem; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; width: 100%; }
  th, td { padding: .4rem .6rem; text-align: right; border-bottom: 1px solid #dde; white-space: nowrap;
    font-variant-numeric: tabular-nums; }
  th:first-child, td:first-child { text-align: left; }
  th { font-size: .87rem; color: #556; }
  svg { max-width: 100%; height: auto; }
  dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .9rem; }
  dd { margin: 0; }
  @media print { body { margin: 0; font-size: 12px; } svg { break-inside: avoid; } }
</style>
</head>
<body>
<h1>Comparison under load</h1>
<p>{{ finished }}: {{ conditions }}.</p>
<div class="scroll"><table>
<thead><tr>{% for heading in headings %}<th>{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}
<tr>{% for cell in row.cells() %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
<p>images/s is the median of the blocks, with the slowest and the fastest in brackets: where two models' ranges overlap,
this run shows no difference between them. Latencies are pooled over blocks and count from the moment of sending; in a
closed loop an overloaded server slows its own users down, so they say nothing about a fixed rate of arrivals. A
percentile with fewer than five samples beyond it is not shown. Peak memory is of the service's process tree (PSS
where the system tells it); “under load” is what it adds to the idle service.
Top-1 is the manifest's{% if top1_of %} ({{ top1_of | join("; ") }}){% endif %}.</p>
{% for plot in plots %}{{ plot | safe }}
{% endfor %}
<h2>Environment</h2>
<dl>{% for name, value in environment.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
</body>
</html>
"""
