"""The alerts, and the recorded rates that two of them share."""

from dataclasses import dataclass
from typing import Final, Literal

from deploy.monitoring.panels import JOB

OBJECTIVE_SECONDS: Final = 0.25
"""A bound of the buckets of `stridevit_request_duration_seconds`."""
OBJECTIVE_SHARE: Final = 0.99
"""The share of inference requests that are to be answered within OBJECTIVE_SECONDS, over 30 days."""
WINDOWS: Final = ("5m", "30m", "1h", "6h")
"""Windows over which the share of slow requests is recorded."""

_SERVICE = f'job="{JOB}"'
_ANSWERS = f'{_SERVICE},route=~"/v1/classify|/v2/.+/infer|/hf/.+"'
_OVERLOAD = 'reason=~"images|bytes|deadline|lag"'
_REFUSED = 0.05
_FAULTS = f"stridevit_model_faults_total{{{_SERVICE}}}"
_GROWTH = 1.3
_LEFT = 0.1


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A rate that is recorded under a name."""

    name: str
    expression: str


@dataclass(frozen=True, kw_only=True)
class Alert:
    """An alert: `page` wakes somebody up, `ticket` waits until morning. `lasting` is how long it must hold."""

    name: str
    severity: Literal["page", "ticket"]
    expression: str
    lasting: str
    summary: str
    action: str


def _slow(window: str) -> str:
    return f"{JOB}:slow_requests:ratio_rate{window}"


def _recorded(window: str) -> Recorded:
    bucket = f'stridevit_request_duration_seconds_bucket{{{_ANSWERS},le="{OBJECTIVE_SECONDS}"}}'
    count = f"stridevit_request_duration_seconds_count{{{_ANSWERS}}}"
    within = f"sum by (job) (rate({bucket}[{window}]))"
    return Recorded(name=_slow(window), expression=f"1 - {within} / sum by (job) (rate({count}[{window}]))")


def _burning(long: str, short: str, factor: float) -> str:
    """Both windows burn the budget `factor` times too fast: the long one is evidence, the short one ends the alert."""
    limit = round(factor * (1 - OBJECTIVE_SHARE), 6)
    return f"{_slow(long)} > {limit} and {_slow(short)} > {limit}"


def _mean_memory(earlier: str = "") -> str:
    return f"avg_over_time(process_resident_memory_bytes{{{_SERVICE}}}[30m]{earlier})"


def _on_trial(counter: str, **labels: str) -> str:
    matchers = "".join(f',{name}="{value}"' for name, value in labels.items())
    return f"sum by (job, kind, rollout) (increase(stridevit_rollout_{counter}_total{{{_SERVICE}{matchers}}}[10m]))"


_BY_CANDIDATE: Final = _on_trial("images", arm="candidate")
_BY_PRIMARY: Final = _on_trial("fallbacks")

RECORDED: Final = tuple(map(_recorded, WINDOWS))

ALERTS: Final = (
    Alert(
        name="ServiceDown",
        severity="page",
        expression=f"up{{{_SERVICE}}} == 0",
        lasting="1m",
        summary="{{ $labels.instance }} does not answer scrapes",
        action="Look at the container's state and log; exit status 70 is a hung engine, 137 mostly memory.",
    ),
    Alert(
        name="EngineNotAnswering",
        severity="page",
        expression=f"stridevit_engine_hung{{{_SERVICE}}} == 1",
        lasting="10s",
        summary="the engine of {{ $labels.instance }} hangs",
        action="The process ends by itself after hang_exit_seconds. Is it started again? What image did it hang on?",
    ),
    Alert(
        name="ModelUnavailable",
        severity="page",
        expression=f"count by (job, model) (last_over_time(stridevit_model_info{{{_SERVICE}}}[1h])) "
        f"unless count by (job, model) (stridevit_model_info{{{_SERVICE}}})",
        lasting="2m",
        summary="no instance serves {{ $labels.model }} any more",
        action="POST /v2/repository/index says why. After a deliberate unload it ends by itself within an hour.",
    ),
    Alert(
        name="ModelFault",
        severity="ticket",
        expression=f"sum by (job, model, kind) (increase({_FAULTS}[10m])) > 0 "
        # A model's first fault creates the series, so nothing increases; `up`: unless the instance itself is new.
        f"or sum by (job, model, kind) (({_FAULTS} unless {_FAULTS} offset 10m) "
        f"and on (job, instance) up{{{_SERVICE}}} offset 10m == 1) > 0",
        lasting="0s",
        summary="{{ $labels.model }} failed on images ({{ $labels.kind }})",
        action="Answered with 500: the model, not the load. Use another model or version.",
    ),
    Alert(
        name="ModelNotLoaded",
        severity="ticket",
        expression=f'increase(stridevit_model_loads_total{{{_SERVICE},outcome="failed"}}[1h]) > 0',
        lasting="0s",
        summary="{{ $labels.instance }} refused a version",
        action="POST /v2/repository/index says why. What served before goes on.",
    ),
    Alert(
        name="RepositoryUnreadable",
        severity="ticket",
        expression=f"stridevit_repository_readable{{{_SERVICE}}} == 0",
        lasting="5m",
        summary="{{ $labels.instance }} cannot list its repository",
        action="What serves goes on serving; new versions are not seen.",
    ),
    Alert(
        name="Refusals",
        severity="page",
        expression=f"sum by (job) (rate(stridevit_rejections_total{{{_SERVICE},{_OVERLOAD}}}[5m])) "
        f"> {_REFUSED} * sum by (job) (rate(stridevit_requests_total{{{_SERVICE}}}[5m]))",
        lasting="10m",
        summary=f"more than {_REFUSED:.0%} of requests are refused for want of time or room",
        action="Add replicas, or let clients ask for a family or a later deadline.",
    ),
    Alert(
        name="LatencyObjectiveBurningFast",
        severity="page",
        expression=_burning("1h", "5m", 14.4),
        lasting="2m",
        summary="2 % of a month's slow requests within an hour",
        action="Look at the work ahead, the stages and the lag of the event loop.",
    ),
    Alert(
        name="LatencyObjectiveBurningSlowly",
        severity="ticket",
        expression=_burning("6h", "30m", 6),
        lasting="15m",
        summary="5 % of a month's slow requests within six hours",
        action="The same; a trend rather than an accident.",
    ),
    Alert(
        name="MemoryGrowing",
        severity="ticket",
        expression=f"{_mean_memory()} > {_GROWTH} * {_mean_memory(' offset 6h')} "
        f"and on (job, instance) time() - process_start_time_seconds{{{_SERVICE}}} > 7 * 3600 "
        "unless on (job, instance) sum by (job, instance) "
        f"(increase(stridevit_model_loads_total{{{_SERVICE}}}[7h])) > 0",
        lasting="30m",
        summary="{{ $labels.instance }} takes 30 % more memory than six hours ago, and has loaded nothing",
        action="Plot it against the load. A leak is a bug: please report it with the log.",
    ),
    Alert(
        name="EventLoopLate",
        severity="ticket",
        expression=f"stridevit_event_loop_lag_seconds{{{_SERVICE}}} > 0.5",
        lasting="5m",
        summary="the event loop of {{ $labels.instance }} runs late",
        action="Something else takes the cores: look at CPU limits and neighbours.",
    ),
    Alert(
        name="CandidateFailing",
        severity="ticket",
        expression=f"{_BY_CANDIDATE} - {_on_trial('images', arm='candidate', outcome='ok')} > 0 "
        f"or {_on_trial('fallbacks', reason='model-fault')} > 0",
        lasting="0s",
        summary="the candidate of {{ $labels.kind }} {{ $labels.rollout }} failed on images",
        action="No client noticed: the primary answered. Look at the log, and do not raise the candidate's share.",
    ),
    Alert(
        name="CanaryLeftToPrimary",
        severity="ticket",
        expression=f"{_BY_PRIMARY} > {_LEFT} * ({_BY_PRIMARY} + {_BY_CANDIDATE})",
        lasting="10m",
        summary=f"the candidate of {{{{ $labels.rollout }}}} leaves more than {_LEFT:.0%} of its share to the primary",
        action="stridevit_rollout_fallbacks_total has the reason: not ready, late, no room, or it cannot take them.",
    ),
)
