"""The metrics and the status of several workers, merged into one.

A counter never goes backwards when a worker dies: what it had counted is kept. Counters and histograms are always added
up, so they have no label for the worker; a gauge has one, unless only its sum is meaningful.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from service.status import Report

_ADDED: Final = frozenset(
    f"stridevit_{name}"
    for name in ("pending_images", "pending_bytes", "queue_depth", "open_connections", "key_requests_in_work")
)
"""Gauges of which only the sum is of interest."""
_SAME: Final = frozenset({"stridevit_model_info"})
"""Gauges that are the same in each worker."""
_OF_PROCESS: Final = "process_"
"""Counters of a process have a label for the worker, too: a sum over restarts would be meaningless."""

_Key = tuple[str, tuple[tuple[str, str], ...]]


class Family:
    """A metric of all workers."""

    def __init__(self, name: str, text: str, kind: str) -> None:
        self.name, self.text, self.kind = name, text, kind
        self.values: defaultdict[_Key, float] = defaultdict(float)

    def metric(self) -> Metric:
        """The metric as prometheus_client represents it."""
        found = Metric(self.name, self.text, self.kind)
        found.samples = [Sample(name, dict(labels), value) for (name, labels), value in self.values.items()]
        return found


class Totals:
    """The metrics of workers that have ended, which still count."""

    def __init__(self) -> None:
        self._families: dict[str, Family] = {}

    def keep(self, last: str, folder: Path, pid: int, worker: str) -> None:
        """Keep the counts of a worker: as it last gave them, and as it left them in the files of its process."""
        families: dict[str, Family] = {}
        add(families, text_string_to_metric_families(last), worker)
        left: dict[str, Family] = {}
        files = sorted(str(file) for kind in ("counter", "histogram") for file in folder.glob(f"{kind}_{pid}.db"))
        if files:
            add(left, _files(files), worker)
        for name, family in families.items():
            if family.kind in ("counter", "histogram") and not name.startswith(_OF_PROCESS):
                # The files are exact up to the last moment; not everything is counted in them.
                source = left.get(name, family)
                into = self._families.setdefault(name, Family(name, family.text, family.kind))
                for key, value in source.values.items():
                    into.values[key] += value

    def value(self, sample: str, **labels: str) -> float:
        """What was counted with these labels, whatever the other labels."""
        return sum(value for found, value in self.values(sample) if labels.items() <= found.items())

    def values(self, sample: str) -> Iterator[tuple[dict[str, str], float]]:
        """Each series of a sample."""
        for family in self._families.values():
            for (name, labels), value in family.values.items():
                if name == sample:
                    yield dict(labels), value

    def merged(self, texts: Mapping[str, str], more: Iterable[Metric] = ()) -> bytes:
        """One exposition of all: the `texts` of live workers, by name, and `more` as it is."""
        families = {name: Family(name, family.text, family.kind) for name, family in self._families.items()}
        for name, kept in self._families.items():
            families[name].values.update(kept.values)
        requests = CounterMetricFamily(
            "stridevit_worker_requests", "HTTP requests answered by each worker that runs.", labels=["worker"]
        )
        for worker, text in texts.items():
            parsed = list(text_string_to_metric_families(text))
            add(families, parsed, worker)
            count = sum(s.value for family in parsed for s in family.samples if s.name == "stridevit_requests_total")
            requests.add_metric([worker], count)
        return generate_latest(_Given([*(family.metric() for family in families.values()), requests, *more]))


class _Given(Collector):
    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return iter(self._metrics)


def _files(files: Sequence[str]) -> list[Metric]:
    return list(MultiProcessCollector.merge(files))  # type: ignore[no-untyped-call]


def add(families: dict[str, Family], metrics: Iterable[Metric], worker: str) -> None:
    """Add the metrics of a worker to those of all."""
    for metric in metrics:
        family = families.setdefault(metric.name, Family(metric.name, metric.documentation, metric.type))
        labelled = metric.name.startswith(_OF_PROCESS) or (
            metric.type not in ("counter", "histogram") and metric.name not in _ADDED | _SAME
        )
        for sample in metric.samples:
            labels = {**sample.labels, "worker": worker} if labelled else sample.labels
            key = sample.name, tuple(sorted(labels.items()))
            if metric.name in _SAME:
                family.values[key] = sample.value
            else:
                family.values[key] += sample.value


def merged_status(reports: Sequence[Report], totals: Totals, *, limit: int, uptime_s: float) -> Report:
    """The state of all workers, as one. `limit`: how many images may be pending."""
    parts = [report.members for report in reports]
    drains = [part["drain_s"] for part in parts if part["drain_s"] is not None]
    refusals: defaultdict[str, int] = defaultdict(int)
    for labels, value in totals.values("stridevit_rejections_total"):
        refusals[labels["reason"]] += int(value)
    for part in parts:
        for reason, count in part["refusals"].items():
            refusals[reason] += count
    members: dict[str, Any] = {
        "time": max(part["time"] for part in parts),
        "uptime_s": round(uptime_s, 3),
        "window_s": max(part["window_s"] for part in parts),
        "ready": any(part["ready"] for part in parts),
        "images_per_s": round(sum(part["images_per_s"] for part in parts), 2),
        "queue": {"waiting": sum(part["queue"]["waiting"] for part in parts), "limit": limit},
        "drain_s": max(drains, default=None),
        "memory_mb": round(sum(part["memory_mb"] for part in parts), 1),
        "lanes": sum(part["lanes"] for part in parts),
        "threads": sum(part["threads"] for part in parts),
        "device": ", ".join(sorted({part["device"] for part in parts})),
        "refusals": dict(refusals),
    }
    return Report(members=members, models=_models(reports, totals), choices=_choices(reports, totals))


def _models(reports: Sequence[Report], totals: Totals) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for report in reports:
        for row in report.models:
            if (found := rows.get(row["name"])) is None:
                kept = totals.value("stridevit_images_total", model=row["name"], outcome="ok")
                rows[row["name"]] = {**row, "images": row["images"] + int(kept)}
                continue
            for name in ("images", "images_per_s", "waiting", "memory_mb"):
                found[name] = round(found[name] + row[name], 2)
            found["times"] = _added(found["times"], row["times"])
            if found["state"] == "ready":
                found["state"] = row["state"]
            found["version"] = min((v for v in (found["version"], row["version"]) if v is not None), default=None)
    return list(rows.values())


def _choices(reports: Sequence[Report], totals: Totals) -> dict[str, dict[str, int]]:
    chosen: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    for labels, value in totals.values("stridevit_choices_total"):
        chosen[labels["model"]][labels["family"]] += int(value)
    for report in reports:
        for model, of in report.choices.items():
            for family, count in of.items():
                chosen[model][family] += count
    return {model: dict(of) for model, of in chosen.items()}


def _added(one: Sequence[int], other: Sequence[int]) -> list[int]:
    if not one or not other:
        return list(one or other)
    return [a + b for a, b in zip(one, other, strict=True)]
