"""The four plots of a comparison: what to choose, the arms side by side, their latencies, and every single block."""

from pathlib import Path

from matplotlib import style

from loadtests.experiment.model import Comparison
from loadtests.report.plot_blocks import blocks, latency
from loadtests.report.plot_pareto import pareto
from loadtests.report.plot_style import STYLE, as_svg
from loadtests.report.plot_variants import variants
from loadtests.report.verdicts import Findings


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
