"""Metrics and status of several workers, added up."""

import json
import os
import subprocess
import sys
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from service.status import Report, written
from service.workers.merge import Totals, merged_status
from tests.processes import ROOT

TEXT = """\
# HELP stridevit_requests_total HTTP requests answered.
# TYPE stridevit_requests_total counter
stridevit_requests_total{{route="/v1/classify",status="200"}} {count}
# HELP stridevit_request_duration_seconds Time.
# TYPE stridevit_request_duration_seconds histogram
stridevit_request_duration_seconds_bucket{{le="0.1"}} {count}
stridevit_request_duration_seconds_bucket{{le="+Inf"}} {count}
stridevit_request_duration_seconds_count {count}
stridevit_request_duration_seconds_sum 1.5
# HELP stridevit_pending_images Images.
# TYPE stridevit_pending_images gauge
stridevit_pending_images {count}
# HELP stridevit_predicted_drain_seconds Seconds.
# TYPE stridevit_predicted_drain_seconds gauge
stridevit_predicted_drain_seconds {count}
# HELP stridevit_model_info Models.
# TYPE stridevit_model_info gauge
stridevit_model_info{{model="a"}} 1
# HELP process_cpu_seconds_total Seconds.
# TYPE process_cpu_seconds_total counter
process_cpu_seconds_total {count}
"""
COUNTING = """
import sys
from service.metrics import Metrics
metrics = Metrics()
for _ in range(7):
    metrics.requests("/v1/classify", "POST", 200).inc()
    metrics.request_seconds("/v1/classify").observe(0.002)
print(metrics.render().decode(), flush=True)
metrics.requests("/v1/classify", "POST", 200).inc()
metrics.request_seconds("/v1/classify").observe(0.2)
import os, signal
print(os.getpid(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def series(text: bytes) -> dict[str, float]:
    """Values by name and labels."""
    return {
        f"{sample.name}{json.dumps(sample.labels, sort_keys=True)}": sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def text(count: float) -> str:
    return TEXT.format(count=count)


def test_counters_and_histograms_are_added_up_and_gauges_have_their_worker() -> None:
    found = series(Totals().merged({"0": text(3), "1": text(4)}))
    assert found['stridevit_requests_total{"route": "/v1/classify", "status": "200"}'] == 7
    assert found['stridevit_request_duration_seconds_bucket{"le": "0.1"}'] == 7
    assert found["stridevit_request_duration_seconds_sum{}"] == 3
    assert found["stridevit_pending_images{}"] == 7
    assert found['stridevit_predicted_drain_seconds{"worker": "1"}'] == 4
    assert found['stridevit_model_info{"model": "a"}'] == 1
    assert found['process_cpu_seconds_total{"worker": "0"}'] == 3
    assert found['stridevit_worker_requests_total{"worker": "1"}'] == 4


def test_counters_do_not_go_backwards_when_a_worker_dies(tmp_path: Path) -> None:
    totals = Totals()
    before = series(totals.merged({"0": text(3), "1": text(4)}))
    totals.keep(text(3), tmp_path, 1, "0")
    after = series(totals.merged({"0": text(0), "1": text(4)}))
    counters = [name for name in before if "_total" in name or "_seconds_" in name]
    counters = [name for name in counters if not name.startswith(("process_", "stridevit_worker"))]
    assert {name: after[name] for name in counters} == {
        name: before[name] + (1.5 if "_sum" in name else 0) for name in counters
    }
    assert after["stridevit_pending_images{}"] == 4


def test_a_killed_worker_s_counts_are_exact_up_to_its_last_moment(tmp_path: Path) -> None:
    counting = subprocess.run(
        [sys.executable, "-c", COUNTING],
        cwd=ROOT,
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        check=False,
        capture_output=True,
        text=True,
    )
    last, _, pid = counting.stdout.rstrip().rpartition("\n")
    totals = Totals()
    totals.keep(last, tmp_path, int(pid), "0")
    found = series(totals.merged({}))
    assert found['stridevit_requests_total{"method": "POST", "route": "/v1/classify", "status": "200"}'] == 8
    bucket = 'stridevit_request_duration_seconds_bucket{"le": "%s", "route": "/v1/classify"}'
    assert (found[bucket % "0.0025"], found[bucket % "0.25"]) == (7, 8)
    # Once more as a live worker that has the same series: they fit each other.
    both = series(totals.merged({"0": last}))
    assert both[bucket % "+Inf"] == 15


def report(images: int, times: list[int], **members: object) -> Report:
    return Report(
        members={
            "time": 1.0,
            "uptime_s": 5.0,
            "window_s": 4.0,
            "ready": True,
            "images_per_s": 2.0,
            "queue": {"waiting": 1, "limit": 256},
            "drain_s": 0.5,
            "memory_mb": 100.0,
            "lanes": 1,
            "threads": 2,
            "device": "cpu",
            "refusals": {"images": 2},
            **members,
        },
        models=[
            {
                "name": "a",
                "version": 1,
                "state": "ready",
                "images": images,
                "images_per_s": 2.0,
                "waiting": 1,
                "memory_mb": 10.0,
                "times": times,
            }
        ],
        choices={"a": {"family": images}},
    )


def test_the_status_of_all_is_their_sum_and_percentiles_are_those_of_all_requests() -> None:
    fast, slow = [10] * 14, [0] * 9 + [30] * 5
    merged = merged_status([report(3, fast), report(5, slow, drain_s=None)], Totals(), limit=256, uptime_s=9.0)
    found = json.loads(written(merged))
    assert (found["images_per_s"], found["queue"], found["drain_s"]) == (4.0, {"waiting": 2, "limit": 256}, 0.5)
    assert (found["threads"], found["refusals"], found["uptime_s"]) == (4, {"images": 4}, 9.0)
    assert found["choices"] == {"family": {"a": 8}}
    (model,) = found["models"]
    assert (model["images"], model["waiting"], model["memory_mb"]) == (8, 2, 20.0)
    # Of 40 requests 30 took between half a second and a second.
    assert model["p50_ms"] > 500
    alone = json.loads(written(report(3, fast)))["models"][0]
    assert alone["p50_ms"] <= 1


def test_counts_of_the_status_include_the_workers_that_died(tmp_path: Path) -> None:
    totals = Totals()
    lines = [
        "# TYPE stridevit_images_total counter",
        'stridevit_images_total{model="a",outcome="ok"} 40',
        'stridevit_images_total{model="a",outcome="bad-image"} 9',
        "# TYPE stridevit_rejections_total counter",
        'stridevit_rejections_total{reason="images"} 6',
    ]
    totals.keep("\n".join(lines) + "\n", tmp_path, 1, "0")
    found = json.loads(written(merged_status([report(2, [])], totals, limit=1, uptime_s=1)))
    assert found["models"][0]["images"] == 42
    assert found["refusals"] == {"images": 8}
