"""Where the service's time went: its histogram of stages, read from `/metrics` before and after a load."""

from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families

from loadtests.experiment.http_get import get

_METRIC = "stridevit_stage_duration_seconds"

StageTotals = dict[tuple[str, str], float]
"""Seconds (`sum`) and images (`count`) by stage, over all models since the server's start."""


def stage_totals(url: str) -> StageTotals:
    """What `/metrics` says now; empty for a server without it."""
    try:
        families = list(text_string_to_metric_families(get(url + "/metrics", timeout=10).decode("utf-8")))
    except (OSError, ValueError):
        return {}
    totals: StageTotals = defaultdict(float)
    for sample in (sample for family in families if family.name == _METRIC for sample in family.samples):
        totals[sample.labels["stage"], sample.name.removeprefix(f"{_METRIC}_")] += sample.value
    return totals


def mean_stages_ms(before: StageTotals, after: StageTotals) -> dict[str, float]:
    """Mean milliseconds per image in each stage, of the images between two readings."""
    between = {name: total - before.get(name, 0.0) for name, total in after.items()}
    return {
        stage: between[stage, "sum"] / images * 1000
        for (stage, kind), images in between.items()
        if kind == "count" and images > 0
    }
