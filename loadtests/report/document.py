"""results.json of a comparison: written with every block, and read back for `--against`."""

import json
import math
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.errors import LoadTestError
from loadtests.experiment.json_files import to_json
from loadtests.experiment.model import Arm, Block, CapacitySearch, Comparison, ComparisonPlan
from loadtests.generator.load_result import LoadResult
from loadtests.report.verdicts import Counts, Findings, Row, model_info
from loadtests.statistics import MIN_BEYOND, percentile

SCHEMA_VERSION = 3
"""Version 1 had a single closed loop; version 2 had other names, by which it is still read."""
_RANKS = (50, 95, 99)
_RENAMED = {
    "classes": "num_classes",
    "image_size": "img_size",
    "late": "late_arrivals",
    "offered": "offered_rate",
    "parameters": "params",
    "searches": "capacity_searches",
    "shares": "load_fractions",
    "twin_of": "repeat_of",
    "unsent": "unsent_arrivals",
    "users": "connections",
    "why_not": "reason",
}
"""Fields of version 2."""


class ResultsError(LoadTestError):
    """A results.json that cannot be used; the message says which and what to do."""


def as_document(comparison: Comparison, findings: Findings, caveats: list[str]) -> dict[str, Any]:
    """All that is known, as strict JSON: `rows` has one entry for each arm, load and metric.

    What is infinite is null: a row says so by `unanswered: true`, a load by the share of its requests.
    """
    labels = [arm.label for arm in comparison.plan.arms]
    infos = {label: model_info(comparison, label) for label in labels}
    document = {
        "schema_version": SCHEMA_VERSION,
        **comparison.facts(),
        "plan": comparison.plan,
        "rates": comparison.rates,
        "arms": [{**to_json(counts.arm), **_counts(counts)} for counts in findings.counts],
        "metrics": findings.metrics,
        "rows": [_row(row) for row in findings.rows],
        "caveats": caveats,
        "capacity_searches": comparison.capacity_searches,
        "blocks": [block_document(block) for block in comparison.blocks],
        "info": {label: {name: value for name, value in infos[label].items() if name != "labels"} for label in labels},
    }
    strict: dict[str, Any] = to_json(document)
    return strict


def _counts(counts: Counts) -> dict[str, Any]:
    return {field.name: getattr(counts, field.name) for field in fields(counts) if field.name != "arm"}


def _row(row: Row) -> dict[str, Any]:
    return {
        "arm": row.arm,
        "load": row.metric.load,
        "metric": row.metric.name,
        "value": row.value,
        "smallest": row.smallest,
        "largest": row.largest,
        "unanswered": row.value is not None and math.isinf(row.value),
        "change": {"kind": row.metric.kind, **to_json(row.change)} if row.change else None,
    }


def block_document(block: Block) -> dict[str, Any]:
    """A block without its model's facts, and its loads without latencies."""
    values = {field.name: getattr(block, field.name) for field in fields(block) if field.name not in {"info", "loads"}}
    return {**values, "loads": {name: _load(load) for name, load in block.loads.items()}}


def _load(load: LoadResult) -> dict[str, Any]:
    kept = [field.name for field in fields(load) if field.name not in {"latencies_ms", "percentiles_ms", "trace"}]
    requests = len(load.latencies_ms)
    return {
        **{name: getattr(load, name) for name in kept},
        **{f"p{rank}_ms": percentile(load.latencies_ms, rank) for rank in _RANKS},
        "requests": requests,
        "answered": load.answered,
        "unanswered": 1 - load.answered / requests if requests else 0.0,
    }


def write_samples(comparison: Comparison, path: Path) -> None:
    """The latencies of every block, failed ones too, as compressed npz; keys are `round-label-load`, rounds from 0."""
    arrays = {
        f"{block.round}-{block.arm}-{name}": load.latencies_ms
        for block in comparison.blocks
        for name, load in block.loads.items()
    }
    np.savez_compressed(path, allow_pickle=False, **arrays)


def read_results(path: Path) -> Comparison:
    """The comparison that an earlier `compare` wrote, with percentiles in place of latencies. Raises ResultsError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(
            f"cannot read {path}: {error.strerror}; give the results.json of an earlier compare"
        ) from error
    except ValueError as error:
        raise ResultsError(f"{path} is not JSON ({error}); give the results.json of an earlier compare") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version not in {2, SCHEMA_VERSION}:
        raise ResultsError(
            f"{path} is not a results.json of compare in version 2 or {SCHEMA_VERSION} (its schema_version is "
            f"{version}): measure the old state again with `python -m loadtests compare`"
        )
    try:
        return from_document(_renamed(document) if version == 2 else document)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ResultsError(f"{path} is not laid out as compare writes it ({error!r})") from error


def from_document(document: dict[str, Any]) -> Comparison:
    """Raises KeyError, TypeError, AttributeError or ValueError if the document is not laid out as it is written."""
    plan = _known(ComparisonPlan, document["plan"])
    arms = tuple(_arm(arm) for arm in plan["arms"])
    for name in ("load_fractions", "service_arguments"):
        plan[name] = tuple(plan[name])
    plan |= {"arms": arms, "repository": Path(plan["repository"]), "data": Path(plan["data"]) if plan["data"] else None}
    finished = document.get("finished")
    return Comparison(
        plan=ComparisonPlan(**plan),
        command=document.get("command", ""),
        environment=document["environment"],
        payloads=document.get("payloads", ""),
        rates=document.get("rates", {}),
        blocks=[_read_block(block, document.get("info", {})) for block in document["blocks"]],
        capacity_searches=[_search(search) for search in document.get("capacity_searches", [])],
        ended_early=document.get("ended_early"),
        finished=datetime.fromisoformat(finished) if finished else None,
    )


def _arm(values: dict[str, Any]) -> Arm:
    settings = tuple((name, value) for name, value in values.get("settings", ()))
    return Arm(**{**_known(Arm, values), "settings": settings})


def _search(values: dict[str, Any]) -> CapacitySearch:
    probes = tuple((rate, latency_ms) for rate, latency_ms in values["probes"])
    return CapacitySearch(**{**_known(CapacitySearch, values), "probes": probes})


def _read_block(values: dict[str, Any], infos: dict[str, Any]) -> Block:
    loads = {name: _read_load(load) for name, load in values["loads"].items()}
    return Block(**{**_known(Block, values), "loads": loads, "info": infos.get(values["arm"]) or {}})


def _read_load(values: dict[str, Any]) -> LoadResult:
    # A percentile is null where it is infinite, and where too few samples lie beyond it.
    percentiles = {}
    for rank in _RANKS:
        value, beyond = values[f"p{rank}_ms"], values.get("requests", 0) * (100 - rank) / 100
        percentiles[f"p{rank}_ms"] = math.inf if value is None and beyond >= MIN_BEYOND else value
    mode = values.get("mode") or ("open" if values.get("offered_rate") is not None else "closed")
    known = {**_known(LoadResult, values), "mode": mode, "percentiles_ms": percentiles}
    return LoadResult(**known, latencies_ms=np.empty(0))


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """The fields that a dataclass has today."""
    return {field.name: values[field.name] for field in fields(kind) if field.name in values}


def _renamed(value: Any) -> Any:
    """A document of version 2 by today's names."""
    if isinstance(value, dict):
        return {_RENAMED.get(name, name): _renamed(item) for name, item in value.items()}
    return [_renamed(item) for item in value] if isinstance(value, list) else value
