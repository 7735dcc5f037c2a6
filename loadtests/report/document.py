"""results.json with every block: of a comparison, read back for `--against`; of the other experiments."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.errors import LoadTestError
from loadtests.experiment.json_files import from_json
from loadtests.experiment.model import Block, Comparison, Experiment
from loadtests.generator.load_result import LoadResult
from loadtests.report.findings import Findings, Row
from loadtests.report.rendering import write_report
from loadtests.report.verdicts import counts, model_info
from loadtests.statistics import MIN_BEYOND, percentile

SCHEMA_VERSION = 3
"""Version 2 had other names, version 1 a single closed loop."""
_EXPERIMENT_VERSION = 2
"""Version of the results of experiments other than comparisons."""
_PERCENTILES = {"p50_ms": 50, "p95_ms": 95, "p99_ms": 99}
_NOT_KEPT = {"latencies_ms", "percentiles_ms", "trace"}


class ResultsError(LoadTestError):
    """A results.json that cannot be used; the message says which and what to do."""


def as_document(comparison: Comparison, findings: Findings, caveats: list[str]) -> dict[str, Any]:
    """All that is known: `rows` has one entry for each arm, load and metric.

    Infinite values are null in the file: a row says so by `unanswered: true`, a load by its share of `unanswered`
    requests.
    """
    arms = comparison.plan.arms
    return {
        "schema_version": SCHEMA_VERSION,
        **comparison.facts(),
        "plan": comparison.plan,
        "rates": comparison.rates,
        "arms": [{**vars(arm), **counts(comparison, arm.label)} for arm in arms],
        "metrics": findings.metrics,
        "rows": [_row(row) for row in findings.rows],
        "caveats": caveats,
        "capacity_searches": comparison.capacity_searches,
        "blocks": [_block(block) for block in comparison.blocks],
        "info": {arm.label: model_info(comparison, arm.label) for arm in arms},
    }


def _row(row: Row) -> dict[str, Any]:
    metric, unanswered = row.metric, row.value == math.inf
    values = {name: getattr(row, name) for name in ("arm", "value", "smallest", "largest")}
    change = {"kind": metric.kind, **vars(row.change)} if row.change else None
    return {**values, "metric": metric.name, "load": metric.load, "unanswered": unanswered, "change": change}


def _block(block: Block) -> dict[str, Any]:
    """A block as it stands in results.json, with percentiles in place of latencies."""
    values = {name: value for name, value in vars(block).items() if name != "info"}
    return {**values, "loads": {name: _load(load) for name, load in block.loads.items()}}


def _load(load: LoadResult) -> dict[str, Any]:
    requests = len(load.latencies_ms)
    return {
        **{name: value for name, value in vars(load).items() if name not in _NOT_KEPT},
        **{name: percentile(load.latencies_ms, rank) for name, rank in _PERCENTILES.items()},
        "requests": requests,
        "answered": load.answered,
        "unanswered": 1 - load.answered / requests if requests else 0.0,
    }


def conditions(experiment: Experiment[Any], what: str) -> str:
    """The conditions for which the figures hold, in one sentence or two."""
    early = f" Ended early: {experiment.ended_early}." if experiment.ended_early else ""
    rounds = f"{experiment.plan.rounds} round{'s' * (experiment.plan.rounds > 1)}"
    return f"{what}; {rounds}; {experiment.payloads}.{early}"


def write_experiment(
    experiment: Experiment[Any], out: Path, *, template: str, figures: dict[str, Any], **context: Any
) -> None:
    """Write report.md and results.json, which begins with `figures` and ends with all blocks."""
    blocks = [{**_block(block), "info": block.info} for block in experiment.blocks]
    facts = {"schema_version": _EXPERIMENT_VERSION, **experiment.facts(), "plan": experiment.plan}
    write_report(
        out,
        document={**facts, **figures, "blocks": blocks},
        template=template,
        command=experiment.command,
        environment=experiment.environment | context.pop("versions", {}),
        failures=[f"{block.arm}, round {block.round + 1}: {block.failure}" for block in experiment.failures],
        **context,
    )


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
    advice = "give the results.json of an earlier compare"
    try:
        document = json.loads(path.read_bytes())
        version = document.get("schema_version") if isinstance(document, dict) else None
        if version == SCHEMA_VERSION:
            return from_document(document)
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror}; {advice}") from error
    except json.JSONDecodeError as error:
        raise ResultsError(f"{path} is not JSON ({error}); {advice}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ResultsError(f"{path} is not laid out as compare writes it ({error!r}); {advice}") from error
    raise ResultsError(
        f"{path} is not a results.json of compare in version {SCHEMA_VERSION} (its schema_version is {version}): "
        "measure the old state again with `stridevit compare`"
    )


def from_document(document: dict[str, Any]) -> Comparison:
    """Raises KeyError, TypeError, AttributeError or ValueError if the document is not laid out as it is written."""
    for block in document["blocks"]:
        block["info"] = document["info"].get(block["arm"], {})
        for load in block["loads"].values():
            load |= {"latencies_ms": [], "percentiles_ms": _percentiles(load)}
    return from_json(document, Comparison)


def _percentiles(load: dict[str, Any]) -> dict[str, float | None]:
    """The percentiles of a load; null is infinite unless too few samples lie beyond."""
    enough = {name: load["requests"] * (100 - rank) / 100 >= MIN_BEYOND for name, rank in _PERCENTILES.items()}
    return {name: math.inf if load[name] is None and enough[name] else load[name] for name in _PERCENTILES}
