"""The report of a comparison: what it says follows from the intervals, and nothing in it breaks or misleads."""

import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.patches import Rectangle
from rich.console import Console

from loadtests.experiment.model import HIGH, MODERATE, SATURATED, Arm, Block, Comparison
from loadtests.report.figures import interval_text, number
from loadtests.report.page import write_page
from loadtests.report.plot_blocks import blocks, latency
from loadtests.report.plot_pareto import pareto
from loadtests.report.plot_variants import variants
from loadtests.report.plots import drawings, write_plots
from loadtests.report.report import as_json, markdown, terminal_table, write_samples
from loadtests.report.tables import details, memory, searches, stages, verdict_lines
from loadtests.report.verdicts import Change, Figure, Findings, Verdict, judge
from loadtests.report.words import conclusion, how_measured
from tests.loadtests.report.fakes import (
    ARMS,
    BASELINE,
    CSRA,
    LSRA,
    METRICS,
    TWIN,
    comparison,
    findings,
    load,
    plan,
)

BY_KEY = {metric.key: metric for metric in METRICS}


@pytest.fixture(scope="module")
def measured() -> Comparison:
    return comparison()


@pytest.fixture(scope="module")
def found(measured: Comparison) -> Findings:
    return findings(measured)


def change(estimate: float, low: float, high: float, verdict: Verdict) -> Change:
    return Change(estimate=estimate, low=low, high=high, level=0.99, p_value=0.01, verdict=verdict)


def figure(value: float | None, changed: Change | None = None) -> Figure:
    return Figure(value=value, smallest=value, largest=value, change=changed)


def only(found: Findings, label: str, figures: dict[str, Figure]) -> Findings:
    """The baseline and one arm, of which these figures alone are known."""
    rows = {row.arm.label: row for row in found.rows}
    return replace(found, rows=[rows[BASELINE], replace(rows[label], figures=figures)])


def test_conclusion_holds_gains_then_losses_then_what_shows_no_difference(
    measured: Comparison, found: Findings
) -> None:
    changed = only(
        found,
        CSRA,
        {
            "top1": figure(0.52, change(-0.0171, -0.03, -0.004, "worse")),
            "throughput": figure(373, change(1.08, 1.04, 1.12, "better")),
            "high_p99": figure(30, change(-12.34, -15.1, -9.0, "better")),
            "moderate_p50": figure(6, change(0.1, -0.4, 0.5, "no difference seen")),
            "peak_bytes": figure(150e6),
        },
    )
    summary, sentence = conclusion(measured, changed)
    assert summary == f"The baseline is {BASELINE}. Better in something and worse in something else: {CSRA}."
    assert sentence == (
        f"{CSRA}: answers ×1.08 (1.04–1.12) as many images at saturation; p99 at 289/s is 12.3 ms lower (9.00–15.1); "
        "but top-1 is 1.71 points lower (0.40–3.00); no difference seen in p50 at 170/s; "
        "without an interval: peak memory 150 against 171."
    )


def test_a_tail_that_was_not_answered_is_at_least_so_much_higher(measured: Comparison, found: Findings) -> None:
    lost = only(found, CSRA, {"high_p99": figure(math.inf, change(math.inf, 12.5, math.inf, "worse"))})
    assert "p99 at 289/s is at least 12.5 ms higher (so many were not answered)" in conclusion(measured, lost)[1]
    assert verdict_lines(measured, lost)[1].cells[5].value == "∞"
    assert verdict_lines(measured, lost)[1].cells[5].interval == "+12.5 to +∞"


def test_without_intervals_nothing_is_called_better(measured: Comparison, found: Findings) -> None:
    bare = only(found, CSRA, {"throughput": figure(373), "high_p99": figure(None)})
    assert "too few blocks to say whether any arm differs" in conclusion(measured, bare)[0]
    assert conclusion(measured, bare)[1] == f"{CSRA}: without an interval: images/s at saturation 373 against 339."
    alone = replace(found, rows=found.rows[:1])
    assert conclusion(measured, alone) == ["Only one arm was measured: there is nothing to compare it with."]


def test_a_baseline_that_differs_from_itself_is_told(measured: Comparison, found: Findings) -> None:
    assert conclusion(measured, found)[-1].startswith(f"Noise floor: {BASELINE} measured a second time")
    noisy = only(found, TWIN, {"throughput": figure(373, change(1.05, 1.02, 1.08, "better"))})
    noisy = replace(noisy, rows=[noisy.rows[0], found.rows[1], noisy.rows[1]])
    assert "differs from itself in images/s at saturation" in conclusion(measured, noisy)[-1]


def test_an_interval_close_to_one_keeps_the_digit_that_decides() -> None:
    assert interval_text(BY_KEY["throughput"], change(1.01, 1.002, 1.02, "better")) == "1.002–1.020"
    assert interval_text(BY_KEY["throughput"], change(1.05, 1.02, 1.08, "better")) == "1.02–1.08"
    assert [number(value) for value in (0.1234, 9.996, 12.34, 151.4, 1395.2, -0.5)] == [
        "0.12", "10.0", "12.3", "151", "1,395", "−0.50",
    ]  # fmt: skip


def test_verdict_rows_mark_the_baseline_and_end_with_the_noise_floor(measured: Comparison, found: Findings) -> None:
    turned = replace(found, rows=[found.rows[0], found.rows[3], *found.rows[1:3]])
    lines = verdict_lines(measured, turned)
    assert [(line.label, line.mark) for line in lines] == [
        (BASELINE, "baseline"),
        (LSRA, ""),
        (CSRA, ""),
        (TWIN, "noise floor"),
    ]
    assert [line.kv_tokens for line in lines] == ["64 of 64", "32 of 64", "16 of 64", "64 of 64"]
    assert lines[0].cells[0].value == "53.71%"
    assert all(cell.verdict is None for cell in lines[0].cells)


def test_random_weights_and_too_few_samples_are_not_numbers(measured: Comparison, found: Findings) -> None:
    untrained = comparison(trained=False, rounds=2)
    assert verdict_lines(untrained, findings(untrained))[1].cells[0].value == "random weights"
    few = only(found, CSRA, {"high_p99": figure(None)})
    assert [cell.value for cell in verdict_lines(measured, few)[1].cells[1:]] == ["–"] * 6


def test_tables_hold_medians_and_reasons(measured: Comparison, found: Findings) -> None:
    rows = {row[0]: row for row in searches(measured).rows}
    assert rows[BASELINE][1:4] == ("268", "262–274", "3 of 3")
    assert rows[CSRA][1:] == ("–", "–", "0 of 1", "the generator could not send 500/s")
    assert memory(measured).headings[-1] == "after all loads", "without a GPU it has no column"
    assert memory(measured).rows[0][1] == "118"
    first = dict(zip(stages(measured).headings, stages(measured).rows[0], strict=True))
    assert float(first["total"]) == pytest.approx(
        sum(float(first[name]) for name in ("read", "decode", "queue", "inference", "rest")), abs=0.2
    )
    assert {row[0] for row in details(measured, found).rows} >= {"p95 at 170/s, ms", "p95 at 289/s, ms"}


def test_memory_of_the_gpu_is_shown_where_there_is_one(measured: Comparison) -> None:
    on_gpu = [
        replace(block, loads={name: replace(part, device_bytes=2_000_000_000) for name, part in block.loads.items()})
        for block in measured.blocks
    ]
    table = memory(replace(measured, blocks=on_gpu))
    assert table.headings[-1] == "peak on the GPU"
    assert table.rows[0][-1] == "2,000"


def test_fewer_rounds_than_the_default_are_told(measured: Comparison) -> None:
    short = replace(measured, plan=plan(rounds=3))
    assert "The default is 10." in how_measured(short)[0]
    assert "The default" not in how_measured(measured)[0]


def test_json_is_strict_and_keeps_what_is_infinite_apart_from_what_is_unknown(found: Findings) -> None:
    latencies = np.array([1.0] * 600 + [math.inf] * 400)
    block = Block(
        arm=BASELINE,
        round=0,
        loads={SATURATED: load(latencies, connections=4, offered_rate=None), HIGH: load(np.arange(50.0))},
        info={"labels": ["a"], "kv_tokens": 64, "batch_ms": {1: math.nan}},
    )
    whole = Comparison(plan=plan(), command="x", environment={}, blocks=[block])
    lost = only(found, CSRA, {"high_p99": figure(math.inf, change(math.inf, 1.0, math.inf, "worse"))})
    document = json.loads(json.dumps(as_json(whole, lost), allow_nan=False))
    assert document["schema_version"] == 3
    saturated, high = (document["blocks"][0]["loads"][name] for name in (SATURATED, HIGH))
    assert (saturated["p50_ms"], saturated["p95_ms"], saturated["unanswered"]) == (1.0, None, 0.4)
    assert (saturated["requests"], saturated["answered"], saturated["connections"]) == (1000, 600, 4)
    assert (high["p50_ms"], high["p95_ms"], high["p99_ms"], high["unanswered"]) == (24.5, None, None, 0)
    tail = document["rows"][1]["figures"]["high_p99"]
    assert (tail["value"], tail["unanswered"], tail["change"]["estimate"], tail["change"]["low"]) == (
        None, True, None, 1.0,
    )  # fmt: skip
    assert document["info"][BASELINE] == {"kv_tokens": 64, "batch_ms": {"1": None}}
    assert document["plan"]["repository"] == "models"


def test_json_and_samples_hold_every_block(measured: Comparison, found: Findings, tmp_path: Path) -> None:
    document = as_json(measured, found)
    assert len(document["blocks"]) == 40
    assert [block["failure"] for block in document["blocks"] if block["failure"]] == [
        "the service died under load; see server-4-lsra.log"
    ]
    write_samples(measured, tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as samples:
        assert len(samples.files) == 39 * 3
        np.testing.assert_array_equal(samples[f"3-{CSRA}-{HIGH}"], measured.blocks_of(CSRA)[3].loads[HIGH].latencies_ms)


def test_markdown_has_even_tables_and_shows_the_plots_beside_it(
    measured: Comparison, found: Findings, tmp_path: Path
) -> None:
    text = markdown(replace(measured, payloads="a | b <c>"), replace(found, warnings=["warned <b>", "warned twice"]))
    write_plots(measured, found, tmp_path)
    for name in re.findall(r"!\[[^]]+\]\(([^)]+)\)", text):
        root = ET.fromstring((tmp_path / name).read_text(encoding="utf-8"))  # noqa: S314 (our own)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert (tmp_path / "variants.png").stat().st_size > 10_000
    for block in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert "✓ better" in text
    assert "a \\| b &lt;c>" in text
    assert (
        text.index("## Conclusion")
        < text.index("warned &lt;b>")
        < text.index("warned twice")
        < text.index("## Verdict")
    )
    assert measured.command in text


def test_page_needs_nothing_else_and_escapes_what_others_wrote(
    measured: Comparison, found: Findings, tmp_path: Path
) -> None:
    hostile = replace(measured, payloads="<script>alert(1)</script>", environment={"cpu": "<b>$x_1$</b>", "cores": "2"})
    write_page(hostile, replace(found, warnings=["<i>mind</i>"]), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4
    assert "<script" not in page
    assert "&lt;i&gt;mind&lt;/i&gt;" in page
    assert "<b>$x_1$" not in page
    assert not re.search(r"(?:src|href|action)\s*=\s*[\"'](?!#)", page), "nothing is fetched"
    assert "@import" not in page
    assert "url(" not in re.sub(r"url\(#", "", page)
    assert set(re.findall(r"https?://[\w.]+", page)) <= {"http://www.w3.org"}, "only names of XML vocabularies"
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for said in ("✓ better", "○ no difference seen", "baseline", "noise floor", "64 of 64"):
        assert said in page
    assert page.index("Conclusion") < page.index("Before you believe it") < page.index("<table")


def test_terminal_table_fits_140_columns(measured: Comparison, found: Findings) -> None:
    console = Console(width=200, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as captured:
        console.print(terminal_table(measured, found))
    lines = captured.get().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 140
    assert f"│{LSRA}" in captured.get(), "a label of usual length stays in one line"
    assert "✓ better" in captured.get()


def test_drawings_are_the_same_bytes_each_time(measured: Comparison, found: Findings) -> None:
    assert drawings(measured, found) == drawings(measured, found)


def test_bars_begin_at_zero_and_leave_out_the_twin(measured: Comparison, found: Findings) -> None:
    drawn = variants(measured, found)
    labels = [text.get_text() for text in drawn.axes[2].get_yticklabels()]
    assert labels == [BASELINE, LSRA, CSRA]
    assert all(axes.get_xlim()[0] == 0 for axes in drawn.axes)
    for axes in drawn.axes:
        assert all(bar.get_x() == 0 for bar in axes.patches if isinstance(bar, Rectangle))
    texts = [text.get_text() for text in drawn.axes[0].texts]
    assert texts == ["339", "344", "373"]


def test_a_percentile_that_was_not_answered_is_a_bar_through_the_edge(measured: Comparison, found: Findings) -> None:
    rows = [replace(row, figures={**row.figures, "high_p99": figure(math.inf)}) for row in found.rows]
    high = variants(measured, replace(found, rows=rows)).axes[3]
    assert [text.get_text() for text in high.texts].count("∞: so many were not answered") == 3
    widths = [bar.get_width() for bar in high.patches if isinstance(bar, Rectangle)]
    assert max(widths) > high.get_xlim()[1]


def test_pareto_joins_only_what_nothing_beats(measured: Comparison, found: Findings) -> None:
    axes = pareto(measured, found).axes[0]
    front = axes.lines[0].get_xydata()
    assert [round(float(y), 2) for _, y in np.asarray(front)] == [53.91, 53.66], "the baseline is beaten by L-SRA"
    assert "Accuracy against throughput" in axes.get_title()
    names = " ".join(text.get_text() for text in axes.texts)
    assert f"{BASELINE} (baseline)" in names
    assert TWIN not in names


def test_pareto_without_accuracies_says_so() -> None:
    untrained = comparison(trained=False, rounds=3)
    axes = pareto(untrained, findings(untrained)).axes[0]
    assert "random weights" in axes.get_title()
    assert axes.get_ylabel() == "peak memory, MB"
    assert "p99" in axes.texts[0].get_text()


def test_spectrum_goes_no_further_than_five_samples_and_leaves_the_plot_where_requests_failed() -> None:
    def block(arm: str, latencies: npt.NDArray[np.float64]) -> Block:
        return Block(arm=arm, round=0, loads={kind: load(latencies) for kind in (MODERATE, HIGH)})

    failing = np.concatenate([np.linspace(5, 20, 540), np.full(60, math.inf)])
    two = Comparison(
        plan=plan(arms=ARMS[:2]),
        command="x",
        environment={},
        rates={MODERATE: 10.0, HIGH: 20.0},
        blocks=[block(BASELINE, np.linspace(1, 10, 600)), block(LSRA, failing)],
    )
    axes = latency(two).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["50", "90", "95", "99"]
    healthy, broken = (np.asarray(line.get_ydata(), dtype=float) for line in axes.lines[:2])
    assert healthy.max() < axes.get_ylim()[1] < broken.max()
    assert "10.00% not answered" in axes.texts[-1].get_text()


def test_blocks_stand_in_the_order_run_and_failed_ones_are_marked(measured: Comparison) -> None:
    above, below = blocks(measured).axes
    assert [text.get_text() for text in above.texts] == ["✗ failed"]
    base = next(line for line in above.lines if line.get_label() == f"{BASELINE} (baseline)")
    ran = [place for place, block in enumerate(measured.blocks, start=1) if block.arm == BASELINE]
    assert list(np.asarray(base.get_xdata())) == ran
    ratios = np.asarray(below.lines[1].get_ydata(), dtype=float)
    assert len(ratios) == 9, "the round of the failed block has no ratio"
    first = [measured.blocks_of(label)[0].loads[SATURATED].throughput for label in (LSRA, BASELINE)]
    assert ratios[0] == pytest.approx(first[0] / first[1])


@pytest.mark.parametrize("case", ["nothing", "one failed block", "a server by URL", "one arm", "judged"])
def test_any_comparison_can_be_reported(case: str, measured: Comparison, tmp_path: Path) -> None:
    at_hand = Comparison(plan=plan(), command="x", environment={"cpu": "y"}, ended_early="interrupted")
    if case == "one failed block":
        at_hand.blocks = [Block(arm=BASELINE, round=0, failure="it died")]
    if case == "a server by URL":
        part = load(np.arange(1.0, 30.0), peak_bytes=0, server_cores=0.0)
        at_hand = replace(at_hand, plan=plan(arms=(Arm(label="m@http://h:1", model="m", url="http://h:1"), ARMS[1])))
        at_hand.blocks = [
            Block(arm=arm.label, round=0, loads=dict.fromkeys((SATURATED, MODERATE, HIGH), part))
            for arm in at_hand.plan.arms
        ]
    if case == "one arm":
        at_hand = replace(measured, plan=plan(arms=ARMS[:1]))
    if case == "judged":
        at_hand = measured
    judged = judge(at_hand)
    write_page(at_hand, judged, tmp_path / "report.html")
    write_plots(at_hand, judged, tmp_path)
    write_samples(at_hand, tmp_path / "samples.npz")
    json.dumps(as_json(at_hand, judged), allow_nan=False)
    text = markdown(at_hand, judged)
    terminal_table(at_hand, judged)
    if at_hand.ended_early:
        assert "Ended early: interrupted." in text
    assert "nan" not in text.lower()
