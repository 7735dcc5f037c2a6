"""The report of a comparison: what it says follows from the intervals, and nothing in it breaks or misleads."""

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
from loadtests.report.document import as_document, write_samples
from loadtests.report.findings import LATENCIES, MEMORY, THROUGHPUT, TOP1, Change, Findings, Metric, Row, Verdict
from loadtests.report.plot_arms import pareto, variants
from loadtests.report.plot_blocks import blocks, latency
from loadtests.report.rendering import Table, number, rich_table
from loadtests.report.report import write_comparison, write_plots
from loadtests.report.texts import conclusion, detail_tables, top1_note, verdict_table
from loadtests.report.verdicts import judge
from tests.loadtests.report.fakes import ARMS, BASELINE, CSRA, LSRA, REPEATED, comparison, load, plan, read_back
from tests.loadtests.report.test_verdicts import correct

MODERATE_P50 = LATENCIES[0]
HIGH_P99 = LATENCIES[-1]


@pytest.fixture(scope="module")
def measured() -> Comparison:
    return comparison()


@pytest.fixture(scope="module")
def found(measured: Comparison) -> Findings:
    return judge(measured)


def change(estimate: float, low: float, high: float, verdict: Verdict) -> Change:
    return Change(estimate=estimate, low=low, high=high, level=0.99, p_value=0.01, verdict=verdict)


def only(found: Findings, label: str, values: dict[Metric, tuple[float | None, Change | None]]) -> Findings:
    """Of one arm, only these values and changes are known."""
    rows = [row for row in found.rows if row.arm != label]
    labelled = {metric: metric for metric in found.metrics}
    rows += [
        Row(
            arm=label,
            metric=labelled[metric],
            value=value,
            base=found.value(BASELINE, metric),
            smallest=value,
            largest=value,
            change=changed,
        )
        for metric, (value, changed) in values.items()
    ]
    return replace(found, rows=rows)


def of(measured: Comparison, *arms: Arm) -> Comparison:
    return replace(measured, plan=replace(measured.plan, arms=arms))


@pytest.fixture(scope="module")
def pair(measured: Comparison) -> Comparison:
    """The baseline and one arm."""
    return of(measured, ARMS[0], ARMS[2])


def titled(tables: list[Table], title: str) -> Table:
    return next(table for table in tables if table.title == title)


def test_conclusion_holds_gains_then_losses_then_what_shows_no_difference(pair: Comparison, found: Findings) -> None:
    changed = only(
        found,
        CSRA,
        {
            TOP1: (52.0, change(-1.71, -3, -0.4, "worse")),
            THROUGHPUT: (373, change(1.08, 1.04, 1.12, "better")),
            HIGH_P99: (30, change(-12.34, -15.1, -9.0, "better")),
            MODERATE_P50: (6, change(0.1, -0.4, 0.5, "no difference seen")),
            MEMORY: (150, None),
        },
    )
    summary, sentence = conclusion(pair, changed)
    assert summary == (
        f"The baseline is {BASELINE}. Better in some respects, worse in others: {CSRA}. "
        "Not judged, for lack of rounds: peak memory."
    )
    assert sentence == (
        f"{CSRA}: answers ×1.08 (1.04–1.12) as many images at saturation; p99 at 289/s is 12.3 ms lower (9.00–15.1); "
        "but top-1 is 1.71 points lower (0.40–3.00); no difference seen in p50 at 170/s; "
        "without an interval: peak memory 150 against 172."
    )


def test_a_tail_that_was_not_answered_is_at_least_that_much_higher(pair: Comparison, found: Findings) -> None:
    lost = only(found, CSRA, {HIGH_P99: (math.inf, change(math.inf, 12.5, math.inf, "worse"))})
    assert "p99 at 289/s is at least 12.5 ms higher (requests were not answered)" in conclusion(pair, lost)[1]
    assert str(verdict_table(pair, lost).rows[1][7]) == "∞\n+∞ ms\n(+12.5…+∞)\n✗ worse"


def test_without_intervals_nothing_is_called_better(measured: Comparison, pair: Comparison, found: Findings) -> None:
    bare = only(found, CSRA, {THROUGHPUT: (373, None), HIGH_P99: (None, None)})
    assert "too few blocks to say whether any arm differs" in conclusion(pair, bare)[0]
    assert conclusion(pair, bare)[1] == f"{CSRA}: without an interval: images/s at saturation 373 against 339."
    alone = of(measured, ARMS[0])
    assert conclusion(alone, found) == ["Only one arm was measured: there is nothing to compare it with."]


def test_a_baseline_that_differs_from_itself_is_told(measured: Comparison, found: Findings) -> None:
    said = conclusion(measured, found)[-1]
    assert said.startswith(f"Noise floor: {BASELINE}, measured a second time")
    assert said.endswith("shows no difference in any of 8 metrics, as it should.")
    noisy = only(found, REPEATED, {THROUGHPUT: (373, change(1.05, 1.02, 1.08, "better"))})
    assert "differs from itself in images/s at saturation. The machine makes" in conclusion(measured, noisy)[-1]


def test_the_note_on_top1_says_how_it_is_compared_and_that_seeds_differ(measured: Comparison) -> None:
    independent = top1_note(measured)
    assert "as if each arm had been asked other images" in independent
    assert "training with another seed may change it by as much" in independent

    def listing(*labels: str) -> Comparison:
        right = {label: np.arange(10_000) < round(10_000 * info["accuracy"]["top1"]) for label, info in by_arm.items()}
        infos = {
            label: {**info, "accuracy": {**info["accuracy"], "correct": correct(right[label])}}
            for label, info in by_arm.items()
        }
        blocks = [replace(one, info=infos[one.arm]) if one.arm in labels else one for one in measured.blocks]
        return replace(measured, blocks=blocks)

    by_arm = {block.arm: block.info for block in measured.blocks}
    paired = top1_note(listing(BASELINE, LSRA, CSRA))
    assert "image by image (exact McNemar test)" in paired
    assert "other images" not in paired
    mixed = top1_note(listing(BASELINE, LSRA))
    assert "image by image" in mixed
    assert "Where a manifest does not say which images it gets right, it is compared as if" in mixed
    assert top1_note(comparison(trained=False, rounds=2)).startswith("Random weights, so speed and memory only")


def test_an_interval_close_to_one_keeps_the_digit_that_decides() -> None:
    def texts(found: Change) -> tuple[str, str]:
        return Row(arm=CSRA, metric=THROUGHPUT, value=373, change=found).change_texts

    assert texts(change(1.01, 1.002, 1.02, "better")) == ("×1.010", "1.002–1.020")
    assert texts(change(1.05, 1.02, 1.08, "better")) == ("×1.05", "1.02–1.08")
    assert [number(value) for value in (0.1234, 9.996, 12.34, 151.4, 1395.2, -0.5)] == [
        "0.12", "10.0", "12.3", "151", "1,395", "−0.50",
    ]  # fmt: skip


def test_verdict_rows_mark_the_baseline_and_the_noise_floor(measured: Comparison, found: Findings) -> None:
    rows = verdict_table(measured, found).rows
    assert [str(row[0]) for row in rows] == [f"{BASELINE}\nbaseline", LSRA, CSRA, f"{REPEATED}\nnoise floor"]
    assert [row[1] for row in rows] == ["64 of 64", "32 of 64", "16 of 64", "64 of 64"]
    assert str(rows[0][2]) == "53.71%"
    assert all("\n" not in str(cell) for cell in rows[0][2:])


def test_random_weights_and_too_few_samples_are_not_numbers(pair: Comparison, found: Findings) -> None:
    untrained = comparison(trained=False, rounds=2)
    assert str(verdict_table(untrained, judge(untrained)).rows[1][2]) == "random weights"
    few = only(found, CSRA, {HIGH_P99: (None, None)})
    assert [str(cell) for cell in verdict_table(pair, few).rows[1][3:]] == ["–"] * 6


def test_tables_hold_medians_and_reasons(measured: Comparison, found: Findings) -> None:
    tables = detail_tables(measured, found)
    rows = {row[0]: row for row in titled(tables, "Largest rate that keeps the objective").rows}
    assert rows[BASELINE][1:4] == ["268", "262–274", "3 of 3"]
    assert rows[CSRA][1:] == ["–", "–", "0 of 1", "the generator could not send 500/s"]
    memory, stages = titled(tables, "Memory"), titled(tables, "Where the time went")
    assert memory.headings[-1] == "after all loads", "without a GPU it has no column"
    assert memory.rows[0][1] == "118"
    first = dict(zip(stages.headings, map(str, stages.rows[0]), strict=True))
    assert float(first["total"]) == pytest.approx(
        sum(float(first[name]) for name in ("read", "decode", "queue", "inference", "rest")), abs=0.2
    )
    metrics = {row[0] for row in titled(tables, "Every metric").rows}
    assert metrics >= {"p95 at 170/s, ms", "p95 at 289/s, ms"}
    (failed,) = titled(tables, "Failed blocks").rows
    assert failed == [LSRA, "5", "the service died under load; see server-4-lsra.log"]
    loads = {tuple(row[:2]): row for row in titled(tables, "Load, failures and CPU").rows}
    assert loads[BASELINE, "saturation"][6:8] == ["–", "–"]
    assert loads[BASELINE, "289/s"][5:7] == ["9", "9"]


def test_memory_of_the_gpu_is_shown_where_there_is_one(measured: Comparison, found: Findings) -> None:
    on_gpu = [
        replace(block, loads={name: replace(part, device_bytes=2_000_000_000) for name, part in block.loads.items()})
        for block in measured.blocks
    ]
    known = replace(measured, blocks=on_gpu)
    table = titled(detail_tables(known, found), "Memory")
    assert table.headings[-1] == "peak on the GPU"
    assert table.rows[0][-1] == "2,000"
    assert verdict_table(known, judge(known)).headings[-1] == "peak GPU memory, MB"


def test_json_is_strict_and_keeps_what_is_infinite_apart_from_what_is_unknown(found: Findings) -> None:
    latencies = np.array([1.0] * 600 + [math.inf] * 400)
    saturating = load(latencies, mode="closed", connections=4, offered_rate=None)
    block = Block(
        arm=BASELINE,
        round=0,
        loads={SATURATED: saturating, HIGH: load(np.arange(50.0))},
        info={"kv_tokens": 64, "batch_ms": {1: math.nan}},
    )
    whole = Comparison(plan=plan(), command="x", environment={}, blocks=[block])
    lost = only(found, CSRA, {HIGH_P99: (math.inf, change(math.inf, 1.0, math.inf, "worse"))})
    document = read_back(as_document(whole, lost, ["mind"]))
    assert (document["schema_version"], document["caveats"]) == (3, ["mind"])
    saturated, high = (document["blocks"][0]["loads"][name] for name in (SATURATED, HIGH))
    assert (saturated["p50_ms"], saturated["p95_ms"], saturated["unanswered"]) == (1.0, None, 0.4)
    assert (saturated["requests"], saturated["answered"], saturated["connections"]) == (1000, 600, 4)
    assert (high["mode"], high["p50_ms"], high["p95_ms"], high["p99_ms"], high["unanswered"]) == (
        "open", 25, None, None, 0,
    )  # fmt: skip
    (tail,) = [row for row in document["rows"] if row["arm"] == CSRA]
    assert (tail["load"], tail["metric"], tail["value"], tail["unanswered"]) == ("high", "p99_ms", None, True)
    assert (tail["change"]["kind"], tail["change"]["estimate"], tail["change"]["low"]) == ("difference", None, 1.0)
    assert document["info"][BASELINE] == {"kv_tokens": 64, "batch_ms": {"1": None}}
    assert document["plan"]["repository"] == "models"


def test_json_has_one_row_for_each_arm_load_and_metric_and_the_counts_of_each_arm(
    measured: Comparison, found: Findings
) -> None:
    document = as_document(measured, found, [])
    assert len({(row["arm"], row["load"], row["metric"]) for row in document["rows"]}) == len(document["rows"]) == 4 * 9
    arms = {arm["label"]: arm for arm in document["arms"]}
    assert (arms[LSRA]["blocks"], arms[LSRA]["failed_blocks"], arms[REPEATED]["repeat_of"]) == (9, 1, BASELINE)
    assert (arms[BASELINE]["errors"], arms[BASELINE]["unsent"]) == (9, 9)


def test_json_and_samples_hold_every_block(measured: Comparison, found: Findings, tmp_path: Path) -> None:
    document = as_document(measured, found, [])
    assert len(document["blocks"]) == 40
    assert [block["failure"] for block in document["blocks"] if block["failure"]] == [
        "the service died under load; see server-4-lsra.log"
    ]
    write_samples(measured, tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as samples:
        assert len(samples.files) == 39 * 3
        np.testing.assert_array_equal(samples[f"3-{CSRA}-{HIGH}"], measured.blocks_of(CSRA)[3].loads[HIGH].latencies_ms)


@pytest.fixture(scope="module")
def written(measured: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a comparison whose words are hostile."""
    out = tmp_path_factory.mktemp("report")
    environment = {**measured.environment, "cpu": "<b>$x_1$</b>"}
    hostile = replace(measured, payloads="<script>alert(1)</script> | b", environment=environment)
    hostile.blocks = [
        replace(block, failure="<i>died</i> | twice") if block.failure else block for block in measured.blocks
    ]
    write_comparison(hostile, out)
    return out


def test_markdown_has_even_tables_and_shows_the_plots_beside_it(measured: Comparison, written: Path) -> None:
    text = (written / "report.md").read_text(encoding="utf-8")
    for name in re.findall(r"!\[[^]]+\]\(([^)]+)\)", text):
        root = ET.fromstring((written / name).read_text(encoding="utf-8"))  # noqa: S314 (our own)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert (written / "variants.png").stat().st_size > 10_000
    for block in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    for said in ("✓ better", "&lt;script>alert(1)&lt;/script> \\| b", "&lt;i>died&lt;/i> \\| twice", measured.command):
        assert said in text
    assert text.index("## Conclusion") < text.index("**Caveats**") < text.index("## Verdict") < text.index("## Memory")


def test_page_needs_nothing_else_and_escapes_what_others_wrote(written: Path) -> None:
    page = (written / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4
    assert "<script" not in page
    assert "&lt;i&gt;died&lt;/i&gt;" in page
    assert "<b>$x_1$" not in page
    assert not re.search(r"(?:src|href|action)\s*=\s*[\"'](?!#)", page), "nothing is fetched"
    assert "@import" not in page
    assert "url(" not in re.sub(r"url\(#", "", page)
    assert set(re.findall(r"https?://[\w.]+", page)) <= {"http://www.w3.org"}, "only names of XML vocabularies"
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for said in ("✓ better", "○ no diff.", "no difference seen", "baseline", "noise floor", "64 of 64"):
        assert said in page
    assert page.index("Conclusion") < page.index("Caveats") < page.index("<table")


def test_the_report_says_how_it_was_measured(measured: Comparison, written: Path, tmp_path: Path) -> None:
    text = (written / "report.md").read_text(encoding="utf-8")
    for said in (
        "10 rounds planned, 9/10 measured to their end of each arm. A round holds",
        "at 170/s and 289/s (50% and 85% of what the slowest arm",
        "a closed loop of 16 connections",
        "3 times for each arm, a bisection",
        "Every service was started with: --intra-op-threads 2",
        "because 256 were in flight",
    ):
        assert said in text
    write_comparison(replace(measured, plan=plan(rounds=3, capacity_searches=0), blocks=[]), tmp_path)
    short = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "The default is 10." in short
    assert "bisection" not in short
    assert "The default" not in text


def test_two_loads_that_are_written_alike_share_a_column(tmp_path: Path) -> None:
    alike = comparison()
    alike.rates = {MODERATE: 110.2, HIGH: 110.4}
    write_comparison(alike, tmp_path)
    for table in detail_tables(alike, judge(alike)):
        assert {len(row) for row in table.rows} == {len(table.headings)}, table.title


def test_terminal_table_fits_140_columns(measured: Comparison, found: Findings) -> None:
    console = Console(width=140, force_terminal=False)
    with console.capture() as captured:
        console.print(rich_table(verdict_table(measured, found)))
    lines = captured.get().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 140
    assert f"│{LSRA}" in captured.get(), "a label of usual length stays in one line"
    assert "✓ better" in captured.get()


def test_plots_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    measured = comparison(rounds=2)
    assert write_plots(measured, judge(measured), tmp_path) == write_plots(measured, judge(measured), tmp_path)


def test_bars_begin_at_zero_and_leave_out_the_a_a_arm(measured: Comparison, found: Findings) -> None:
    drawn = variants(measured, found)
    labels = [text.get_text() for text in drawn.axes[2].get_yticklabels()]
    assert labels == [BASELINE, LSRA, CSRA]
    assert all(axes.get_xlim()[0] == 0 for axes in drawn.axes)
    for axes in drawn.axes:
        assert all(bar.get_x() == 0 for bar in axes.patches if isinstance(bar, Rectangle))
    texts = [text.get_text() for text in drawn.axes[0].texts]
    assert texts == ["339", "344", "373"]


def test_a_percentile_that_was_not_answered_is_a_bar_through_the_edge(measured: Comparison, found: Findings) -> None:
    rows = [replace(row, value=math.inf) if row.metric == HIGH_P99 else row for row in found.rows]
    high = variants(measured, replace(found, rows=rows)).axes[3]
    assert [text.get_text() for text in high.texts].count("∞: requests not answered") == 3
    widths = [bar.get_width() for bar in high.patches if isinstance(bar, Rectangle)]
    assert max(widths) > high.get_xlim()[1]


def test_pareto_joins_only_what_nothing_beats(measured: Comparison, found: Findings) -> None:
    axes = pareto(measured, found).axes[0]
    front = axes.lines[0].get_xydata()
    assert [round(float(y), 2) for _, y in np.asarray(front)] == [53.91, 53.66], "the baseline is beaten by L-SRA"
    assert "Accuracy against throughput" in axes.get_title()
    names = " ".join(text.get_text() for text in axes.texts)
    assert f"{BASELINE} (baseline)" in names
    assert REPEATED not in names


def test_pareto_without_accuracies_says_so() -> None:
    untrained = comparison(trained=False, rounds=3)
    axes = pareto(untrained, judge(untrained)).axes[0]
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


@pytest.mark.parametrize("case", ["nothing", "one failed block", "a server by URL", "one arm"])
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
        at_hand = replace(measured, plan=plan(arms=ARMS[:1]), blocks=measured.blocks_of(BASELINE)[:2])
    report = write_comparison(at_hand, tmp_path)
    rich_table(report.table)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    if at_hand.ended_early:
        assert "Ended early: interrupted." in text
        assert any("ended early" in caveat for caveat in report.caveats)
    assert "nan" not in text.lower()
