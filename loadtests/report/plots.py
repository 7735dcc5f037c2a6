"""The four pictures of a comparison: what to choose, the arms side by side, their latencies, and every single block."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from loadtests.experiment.model import Comparison
from loadtests.report.plot_blocks import blocks, latency
from loadtests.report.plot_pareto import pareto
from loadtests.report.plot_style import RC, as_svg
from loadtests.report.plot_variants import variants
from loadtests.report.verdicts import Findings


def drawings(comparison: Comparison, findings: Findings) -> dict[str, str]:
    """`pareto`, `variants`, `latency` and `blocks` as SVG."""
    return {name: as_svg(figure, name) for name, figure in _figures(comparison, findings).items()}


def write_plots(comparison: Comparison, findings: Findings, out: Path) -> None:
    """`pareto.svg`, `variants.svg`, `latency.svg` and `blocks.svg` in the folder `out`, and `variants.png`."""
    figures = _figures(comparison, findings)
    for name, figure in figures.items():
        (out / f"{name}.svg").write_text(as_svg(figure, name), encoding="utf-8")
    with mpl.rc_context(RC):
        figures["variants"].savefig(out / "variants.png", dpi=200, metadata={"Software": None})


def _figures(comparison: Comparison, findings: Findings) -> dict[str, Figure]:
    with mpl.rc_context(RC):
        return {
            "pareto": pareto(comparison, findings),
            "variants": variants(comparison, findings),
            "latency": latency(comparison),
            "blocks": blocks(comparison),
        }
