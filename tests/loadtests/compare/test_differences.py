"""Comparisons of servers whose difference, or failure, is known."""

from pathlib import Path
from statistics import median

import pytest

from tests.loadtests.compare.runs import arguments, read, run
from tests.loadtests.servers import fake_server


@pytest.mark.long
def test_a_slower_server_is_found(tmp_path: Path) -> None:
    # One image at a time: 20 ms each, or 40.
    with fake_server(lambda _: 0.02, serial=True) as fast, fake_server(lambda _: 0.04, serial=True) as slow:
        arms = f"m@{fast.url},m@{slow.url}"
        ended = run(*arguments(arms, tmp_path, "--rounds", "5", "--load", "0.3,0.5", "--budget-minutes", "10"))
        assert ended.returncode == 0, ended.stderr
    document = read(tmp_path)
    rows = {(row["arm"], row["load"], row["metric"]): row for row in document["rows"]}
    rates = {(block["arm"], block["round"]): block["loads"]["saturated"]["throughput"] for block in document["blocks"]}
    ratios = [rates[f"m@{slow.url}", number] / rates[f"m@{fast.url}", number] for number in range(5)]
    assert median(ratios) < 0.75
    change = rows[f"m@{slow.url}", "saturated", "images_per_second"]["change"]
    # A busy machine may upset one or two of the five rounds, and so the verdict.
    if max(ratios) < 0.75:
        assert change["verdict"] == "worse"
        assert change["low"] < change["estimate"] < change["high"] < 1
    assert change["verdict"] != "better"
    p50 = [rows[f"m@{server.url}", "moderate", "p50_ms"]["value"] for server in (fast, slow)]
    assert p50[0] < p50[1]
    # Memory of a server at a URL is unknown, and none is made up.
    assert rows[f"m@{slow.url}", None, "peak_mb"]["value"] is None


@pytest.mark.long
def test_a_server_that_fails_on_the_way_is_reported_and_not_averaged_away(tmp_path: Path) -> None:
    # It answers its errors as quickly as its answers.
    first = tmp_path / "blocks" / "Block-0001"
    sick = fake_server(lambda _: 0.03, status=lambda number: 500 if first.is_file() and number % 5 == 0 else 200)
    with fake_server(lambda _: 0.03) as well, sick as ill:
        ended = run(*arguments(f"m@{well.url},m@{ill.url}", tmp_path, "--seconds", "3"))
    assert ended.returncode == 0, ended.stderr
    document = read(tmp_path)
    arms = {arm["label"]: arm for arm in document["arms"]}
    assert arms[f"m@{well.url}"]["errors"] == 0
    assert arms[f"m@{ill.url}"]["errors"] > 20
    by_round = {block["round"]: block for block in document["blocks"] if block["arm"].endswith(ill.url)}
    assert by_round[0]["loads"]["high"]["errors"] == 0
    # A fifth of the second round was not answered: no percentile above the 80th is.
    assert by_round[1]["loads"]["high"]["p95_ms"] is None
    assert by_round[1]["loads"]["high"]["unanswered"] == pytest.approx(0.2, abs=0.05)
    assert any(ill.url in caveat and "not answered" in caveat for caveat in document["caveats"])
