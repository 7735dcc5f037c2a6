"""Where a server says that its time went: the service's own histogram of stages, read before and after a load."""

from prometheus_client.parser import text_string_to_metric_families

from loadtests.experiment.http_get import get

_METRIC = "stridevit_stage_duration_seconds"

Totals = dict[str, tuple[float, float]]
"""(seconds, images) by stage, since the server's start and over all its models."""


def totals(url: str) -> Totals:
    """What `/metrics` says now; empty for a server without it."""
    try:
        text = get(url + "/metrics", timeout=10).decode("utf-8")
        families = list(text_string_to_metric_families(text))
    except (OSError, ValueError):
        return {}
    seconds: dict[str, float] = {}
    images: dict[str, float] = {}
    for family in families:
        if family.name == _METRIC:
            for sample in family.samples:
                into = {f"{_METRIC}_sum": seconds, f"{_METRIC}_count": images}.get(sample.name)
                if into is not None:
                    stage = sample.labels["stage"]
                    into[stage] = into.get(stage, 0.0) + sample.value
    return {stage: (seconds[stage], images[stage]) for stage in seconds.keys() & images.keys()}


def between(before: Totals, after: Totals) -> dict[str, float]:
    """Mean milliseconds of an image in each stage."""
    means = {}
    for stage, (seconds, images) in after.items():
        earlier = before.get(stage, (0.0, 0.0))
        if images > earlier[1]:
            means[stage] = (seconds - earlier[0]) / (images - earlier[1]) * 1000
    return means
