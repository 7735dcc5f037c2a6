"""What the service predicts, against what happens: when an accepted request is answered, and when to retry.

An idle service gets twice the requests that it can answer within the deadline, in half of that time, and then one such
request every few milliseconds. A refusal says after how long such a request would be accepted (`retry_after_ms`); the
first one that is accepted later shows the true time. Refusals before the end of the burst are left out: the requests
after them take the places that they were promised. How long accepted requests take, against the prediction, comes from
the service's own metric.
"""

import json
import os
import time
from collections.abc import Collection, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from loadtests.experiment.model import Arm
from loadtests.experiment.server import Server
from loadtests.generator.open_loop import OpenLoop, encoded
from loadtests.generator.readers import Payload
from loadtests.generator.request_encoder import target
from loadtests.report.rendering import median

_PAUSE_SECONDS = 1.0
_PROBE_SECONDS = 0.01
_LEAST_SECONDS = 0.03
"""Shorter times until a retry are not judged: the probes do not tell them apart."""
_MOST_REQUESTS = 1000
_RATIO = "stridevit_predicted_finish_ratio"


def estimates(
    arm: Arm,
    server: Server,
    payloads: Sequence[Payload],
    *,
    deadline_ms: float,
    bursts: int,
    cores: Collection[int] = (),
) -> dict[str, Any]:
    """Send the bursts, from the given cores.

    Returns the number of refusals that can be judged, the median relative error of their `Retry-After`, and the median
    of predicted ÷ actual finish.
    """
    where = target(payloads, protocol="v1", model=arm.model, host=server.url, deadline_ms=deadline_ms)
    url = urlsplit(server.url)
    requests = [encoded(where.path, url.netloc, request.headers, request.body) for request in where.requests]
    address = (url.hostname or "127.0.0.1", url.port or 80)
    burst = min(_MOST_REQUESTS, max(4, round(2 * deadline_ms / _image_ms(server, arm.model))))
    wave = deadline_ms / 1000 / 2
    probes = [wave + _PROBE_SECONDS * number for number in range(1, round(4 * wave / _PROBE_SECONDS))]
    dues = [*(wave * number / burst for number in range(burst)), *probes]
    before, errors = _ratios(server), list[float]()
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(cores) or own)
    try:
        for _ in range(bursts):
            loop = OpenLoop(address, requests, in_flight=2 * _MOST_REQUESTS, keep=True, keep_refusals=True)
            loop.run(iter(dues))
            errors += errors_of(loop, burst)
            time.sleep(_PAUSE_SECONDS)
    finally:
        os.sched_setaffinity(0, own)
    after = _ratios(server)
    counts = {edge: count - before.get(edge, 0.0) for edge, count in after.items()}
    return {"refusals": len(errors), "retry_after_error": median(errors), "predicted_finish": median_of(counts)}


def _image_ms(server: Server, model: str) -> float:
    """What an image costs at best; for a family, with its fastest member."""
    models = server.ask("/v1/models")
    names = models["families"].get(model, [model])
    costs = [server.model(name)["batch_ms"] for name in names]
    return min(float(ms) / int(size) for batches in costs for size, ms in batches.items())


def errors_of(loop: OpenLoop, burst: int) -> list[float]:
    """For each later refusal, how far its time until a retry is from the true one, as a fraction of the latter."""
    # In the order in which they were sent: the burst first.
    sent = sorted(zip(loop.samples, loop.refusals, strict=True), key=lambda pair: pair[0].due_s)
    accepted = np.array([sample.due_s for sample, _ in sent[burst:] if sample.status == 200])
    found: list[float] = []
    for sample, body in sent[burst:]:
        if sample.status != 429:
            continue
        refused_at = sample.due_s + sample.latency_ms / 1000
        later = accepted[accepted > refused_at]
        said = json.loads(body)["retry_after_ms"] / 1000
        if len(later) and (true := float(later[0]) - refused_at) >= _LEAST_SECONDS:
            found.append(abs(said - true) / true)
    return found


def _ratios(server: Server) -> dict[float, float]:
    """Cumulative counts of the metric by the upper edges of its buckets."""
    samples = server.metric(_RATIO)
    return {float(sample.labels["le"]): sample.value for sample in samples if sample.name == f"{_RATIO}_bucket"}


def median_of(cumulative: dict[float, float]) -> float | None:
    """The median of a histogram, interpolated within its bucket; None of an empty one."""
    edges = sorted(edge for edge in cumulative if np.isfinite(edge))
    total = cumulative.get(float("inf"), 0.0)
    if not total:
        return None
    return float(np.interp(total / 2, [0.0, *(cumulative[edge] for edge in edges)], [0.0, *edges]))
