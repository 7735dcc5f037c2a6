"""The report of a comparison: results.json, a Markdown and an HTML page with the same text, plots and raw samples."""

from pathlib import Path
from typing import NamedTuple

from matplotlib import style

from loadtests.experiment.model import Comparison
from loadtests.generator.load_result import IN_FLIGHT
from loadtests.report import texts
from loadtests.report.document import as_document, write_samples
from loadtests.report.findings import Findings
from loadtests.report.plot_arms import pareto, variants
from loadtests.report.plot_blocks import blocks, latency
from loadtests.report.plot_style import STYLE, as_svg
from loadtests.report.rendering import Table, write_report
from loadtests.report.verdicts import judge


class Report(NamedTuple):
    """What is also shown in the terminal."""

    table: Table
    caveats: list[str]


def write_comparison(comparison: Comparison, out: Path) -> Report:
    """Judge a comparison and write results.json, report.md, report.html, samples.npz and the plots into `out`."""
    findings = judge(comparison)
    said = texts.caveats(comparison, findings)
    table = texts.verdict_table(comparison, findings)
    levels = sorted({f"{row.change.level:.4g}" for row in findings.rows if row.change})
    out.mkdir(parents=True, exist_ok=True)
    plots = write_plots(comparison, findings, out)
    write_report(
        out,
        document=as_document(comparison, findings, said),
        template="compare.md.j2",
        html="compare.html.j2",
        command=comparison.command,
        environment=texts.environment(comparison),
        finished=f"{comparison.finished:%Y-%m-%d %H:%M} UTC" if comparison.finished else "not finished",
        conditions=texts.conditions(comparison),
        conclusion=texts.conclusion(comparison, findings),
        caveats=said,
        verdicts=table,
        top1_note=texts.top1_note(comparison),
        tables=texts.detail_tables(comparison, findings),
        plots=plots,
        plan=comparison.plan,
        rates=texts.rates_text(comparison) or "set rates",
        payloads=comparison.payloads,
        blocks=sorted({len(comparison.blocks_of(arm.label)) for arm in comparison.plan.arms}),
        levels=levels,
        in_flight=IN_FLIGHT,
    )
    write_samples(comparison, out / "samples.npz")
    return Report(table, said)


def write_plots(comparison: Comparison, findings: Findings, out: Path) -> dict[str, str]:
    """Write `pareto`, `variants`, `latency` and `blocks` as SVG into `out`, and `variants.png`. Returns the SVG."""
    with style.context(STYLE):
        figures = {"pareto": pareto(comparison, findings), "variants": variants(comparison, findings)}
        figures |= {"latency": latency(comparison), "blocks": blocks(comparison)}
        figures["variants"].savefig(out / "variants.png", dpi=200, metadata={"Software": None})
        drawn = {name: as_svg(figure, name) for name, figure in figures.items()}
    for name, svg in drawn.items():
        (out / f"{name}.svg").write_text(svg, encoding="utf-8")
    return drawn
