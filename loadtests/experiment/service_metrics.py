"""Where the service's time went: its histogram of stages, read from `/metrics` before and after a load."""

from prometheus_client.parser import text_string_to_metric_families

from loadtests.experiment.http_get import get

_METRIC = "stridevit_stage_duration_seconds"

StageTotals = dict[str, tuple[float, float]]
"""(seconds, images) by stage, over all models since the server's start."""


def stage_totals(url: str) -> StageTotals:
    """What `/metrics` says now; empty for a server without it."""
    try:
        text = get(url + "/metrics", timeout=10).decode("utf-8")
        families = list(text_string_to_metric_families(text))
    except (OSError, ValueError):
        return {}
    seconds: dict[str, float] = {}
    images: dict[str, float] = {}
    for sample in (sample for family in families if family.name == _METRIC for sample in family.samples):
        into = {f"{_METRIC}_sum": seconds, f"{_METRIC}_count": images}.get(sample.name)
        if into is not None:
            stage = sample.labels["stage"]
            into[stage] = into.get(stage, 0.0) + sample.value
    return {stage: (seconds[stage], images[stage]) for stage in seconds.keys() & images.keys()}


def mean_stages_ms(before: StageTotals, after: StageTotals) -> dict[str, float]:
    """Mean milliseconds per image in each stage, of the images between two readings."""
    means = {}
    for stage, (seconds, images) in after.items():
        earlier = before.get(stage, (0.0, 0.0))
        if images > earlier[1]:
            means[stage] = (seconds - earlier[0]) / (images - earlier[1]) * 1000
    return means
