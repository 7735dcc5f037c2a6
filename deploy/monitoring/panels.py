"""The panels of the dashboard: what each asks of Prometheus, and what its answer means."""

from dataclasses import dataclass
from typing import Final

JOB: Final = "stridevit"
"""The job that the alerts expect: `job_name` of a scrape job, and what the chart's ServiceMonitor makes."""

_OURS = 'job=~"$job",instance=~"$instance"'
_RATE = "[$__rate_interval]"
_AGREE = ',top1="agree"'
_ANSWERS = 'route=~"/v1/classify|/v2/.+/infer|/hf/.+"'


def _counted(metric: str, by: str, more: str = "") -> str:
    return f"sum by ({by}) (rate({metric}{{{_OURS}{more}}}{_RATE}))"


def _mean(histogram: str, by: str) -> str:
    return f"{_counted(f'{histogram}_sum', by)} / {_counted(f'{histogram}_count', by)}"


def _quantile(share: float) -> str:
    buckets = _counted("stridevit_request_duration_seconds_bucket", "le, route", f",{_ANSWERS}")
    return f"histogram_quantile({share}, {buckets})"


def _compared(more: str = "") -> str:
    return _counted("stridevit_rollout_compared_total", "kind, rollout", more)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A graph over time: one expression of PromQL, the unit in Grafana's words, and the names of its lines."""

    title: str
    expression: str
    legend: str
    unit: str
    meaning: str


PANELS: Final = (
    Panel(
        title="Images per second, by outcome",
        expression=_counted("stridevit_images_total", "outcome"),
        legend="{{outcome}}",
        unit="ops",
        meaning="`ok`, or the code of the error.",
    ),
    Panel(
        title="Refused or ended per second, by reason",
        expression=_counted("stridevit_rejections_total", "reason"),
        legend="{{reason}}",
        unit="ops",
        meaning="Empty while nothing is refused. `images`, `bytes`, `deadline` and `lag` are overload.",
    ),
    Panel(
        title="Answered per second, by status",
        expression=_counted("stridevit_requests_total", "status", f",{_ANSWERS}"),
        legend="{{status}}",
        unit="reqps",
        meaning="Requests for inference; 5xx are the service's fault, 4xx the client's, 429 is a refusal.",
    ),
    Panel(
        title="p50 of a request, by route",
        expression=_quantile(0.5),
        legend="{{route}}",
        unit="s",
        meaning="From the first byte of the head to the end of the answer, refusals included.",
    ),
    Panel(
        title="p99 of a request, by route",
        expression=_quantile(0.99),
        legend="{{route}}",
        unit="s",
        meaning="The same, for the slowest of a hundred.",
    ),
    Panel(
        title="Time of an image, by stage (mean)",
        expression=_mean("stridevit_stage_duration_seconds", "stage"),
        legend="{{stage}}",
        unit="s",
        meaning="Decoding, waiting for the engine, computing, and the whole request.",
    ),
    Panel(
        title="Work ahead",
        expression=f"sum by (instance) (stridevit_predicted_drain_seconds{{{_OURS}}})",
        legend="{{instance}}",
        unit="s",
        meaning="Predicted time until all accepted work is done. The autoscaler of the chart follows it.",
    ),
    Panel(
        title="Models that a family chose, per second",
        expression=_counted("stridevit_choices_total", "family, model"),
        legend="{{family}}: {{model}}",
        unit="reqps",
        meaning="What the load costs in accuracy: a family that answers with its second or third model is near its "
        "limit, before anything is refused.",
    ),
    Panel(
        title="Images in a batch (mean)",
        expression=_mean("stridevit_batch_size", "model"),
        legend="{{model}}",
        unit="short",
        meaning="Larger batches under load are the scheduler at work.",
    ),
    Panel(
        title="Predicted finish, as a share of the actual time (mean)",
        expression=_mean("stridevit_predicted_finish_ratio", "instance"),
        legend="{{instance}}",
        unit="percentunit",
        meaning="1: the cost model is right. Far below: something else takes the cores. Above: it is cautious.",
    ),
    Panel(
        title="Memory",
        expression=f"sum by (instance) (process_resident_memory_bytes{{{_OURS}}})",
        legend="{{instance}}",
        unit="bytes",
        meaning="Resident memory of the process.",
    ),
    Panel(
        title="Models that take traffic",
        expression=f"count by (model) (stridevit_model_info{{{_OURS}}})",
        legend="{{model}}",
        unit="short",
        meaning="By model, over all instances and versions.",
    ),
    Panel(
        title="Lag of the event loop (worst)",
        expression=f"max by (instance) (stridevit_event_loop_lag_seconds{{{_OURS}}})",
        legend="{{instance}}",
        unit="s",
        meaning="Above 0.5 s something else takes the cores, or a thread holds the interpreter.",
    ),
    Panel(
        title="Candidate and primary with the same top-1",
        expression=f"{_compared(_AGREE)} / {_compared()}",
        legend="{{kind}} {{rollout}}",
        unit="percentunit",
        meaning="Of the images that both have answered. Empty without `--shadow` and `--canary`.",
    ),
    Panel(
        title="Time of candidate and primary (mean)",
        expression=_mean("stridevit_rollout_duration_seconds", "kind, rollout, arm"),
        legend="{{kind}} {{rollout}}: {{arm}}",
        unit="s",
        meaning="Of whole requests (canary), or of the engine for images that both compute in turn (shadow).",
    ),
)
