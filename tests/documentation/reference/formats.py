"""docs/manifest.md from its pydantic models, and docs/results-json.md from the dataclasses that it holds."""

import ast
import inspect
import itertools
import json
import re
import textwrap
from dataclasses import fields
from typing import Any

from loadtests.experiment import model
from loadtests.generator.load_result import LoadResult
from loadtests.report import document
from loadtests.report.findings import Change, Metric
from service.manifest import Manifest
from tests.documentation.reference import markdown
from tests.processes import ROOT

SAMPLE = ROOT / "docs" / "loadtests" / "vit-s16-384-latents" / "results.json"

_MANIFEST = """
`manifest.json` of a bundle, schema version 2, as the service reads it: an unknown field is an error. Bundles of version
1 are converted when they are read. What the fields are for is in [export.md](export.md#the-manifest).
"""
_RESULTS = """
What `stridevit compare` writes beside its report, schema version {version}. `limit`, `overload`, `soak` and `faults`
write the same `command`, `environment`, `plan` and `blocks`, with figures of their own in place of `rows`. Infinite
values are null. How a verdict is made is in [measuring.md](measuring.md#verdicts). An example is
[`results.json`](loadtests/vit-s16-384-latents/results.json) of a comparison at 384 px.
"""
_TOP = {
    "schema_version": "Version of this layout. `--against` refuses another one.",
    "command": "The command line.",
    "finished": "When the measurement ended, ISO 8601, UTC.",
    "ended_early": "Why it ended before its plan did, or null.",
    "environment": "Commit, processor, memory, system and versions of libraries.",
    "payloads": "What was sent, in words.",
    "plan": "[ComparisonPlan](#comparisonplan).",
    "rates": "Images per second of the two open loops.",
    "arms": "[Arm](#arm), each with its counts of requests and failures.",
    "metrics": "[Metric](#metric) in the order of the report.",
    "rows": "One entry for each arm and metric: [Row](#row).",
    "caveats": "What limits these figures, in sentences.",
    "capacity_searches": "[CapacitySearch](#capacitysearch), one for each arm and search.",
    "blocks": "[Block](#block), in the order in which they ran.",
    "info": "By label of the arm: what the server said of its model.",
}
_ROW = {
    "arm": "Label of the arm.",
    "value": "Median over the blocks; null if infinite.",
    "smallest": "Smallest value of a block.",
    "largest": "Largest value of a block.",
    "metric": "Name of the metric.",
    "load": "Name of the load, or null.",
    "unanswered": "Whether so many requests were not answered that the value is infinite.",
    "change": "Against the baseline: `kind`, and the fields of [Change](#change); null for the baseline.",
}


_LOAD = {
    "p50_ms": "Percentiles of the latencies, counted from the moment at which a request was due; null if infinite.",
    "p95_ms": "The same.",
    "p99_ms": "The same.",
    "requests": "Requests that were due in the measured window.",
    "answered": "Those of them that were answered with 200.",
    "unanswered": "The share of the others.",
}
_NEWER = {"part_cores", "counts"}
"""Fields of a load that came after the sample was written."""


def manifest_page() -> str:
    """The manifest, then its parts."""
    schema = Manifest.model_json_schema()
    parts = {"Manifest": schema, **schema.pop("$defs")}
    described = {name: _described(name, part) for name, part in parts.items()}
    return markdown.page("manifest.json", "service/manifest.py", _MANIFEST, *markdown.sections(described, level=2))


def results_page() -> str:
    """The top level, as the committed sample has it, then its parts."""
    sample = json.loads(SAMPLE.read_bytes())
    for known, described in ((sample, _TOP), (sample["rows"][0], _ROW)):
        if known.keys() != described.keys():
            raise ValueError(f"described and written fields differ: {known.keys() ^ described.keys()}")
    heads = ["name", "what it is"]
    top, row = (markdown.table(heads, ((f"`{k}`", v) for k, v in rows.items())) for rows in (_TOP, _ROW))
    classes = [model.ComparisonPlan, model.Arm, Metric, Change, model.Block, LoadResult, model.CapacitySearch]
    parts = [part for one in classes for part in (f"## {one.__name__}", (one.__doc__ or "").strip(), _dataclass(one))]
    loads = set(next(iter(sample["blocks"][0]["loads"].values())))
    kept = {one.name for one in fields(LoadResult)} - document._NOT_KEPT
    if loads | _NEWER != kept | _LOAD.keys():
        raise ValueError(f"described and written fields of a load differ: {(loads | _NEWER) ^ (kept | _LOAD.keys())}")
    text = _RESULTS.format(version=document.SCHEMA_VERSION)
    return markdown.page("results.json", "loadtests/", text, top, "## Row", row, *parts)


def _described(name: str, schema: markdown.Schema) -> markdown.Schema:
    """A schema with the texts that stand under the fields of its class."""
    import service.manifest

    texts = _texts(getattr(service.manifest, name))
    for field, value in schema.get("properties", {}).items():
        value.setdefault("description", texts.get(field, ""))
    return schema


def _dataclass(cls: Any) -> str:
    texts = _texts(cls)
    hidden = document._NOT_KEPT if cls is LoadResult else set()
    rows = [
        (f"`{one.name}`", f"`{_annotation(one.type)}`", texts.get(one.name, ""))
        for one in fields(cls)
        if one.name not in hidden
    ]
    rows += [(f"`{name}`", "`float | None`", what) for name, what in _LOAD.items() if cls is LoadResult]
    return markdown.table(["name", "type", "what it is"], rows)


def _annotation(annotation: object) -> str:
    shown = annotation.__name__ if isinstance(annotation, type) and "[" not in str(annotation) else str(annotation)
    return re.sub(r"\b(?:typing|pathlib|loadtests(?:\.\w+)+)\.(?=[A-Z])", "", shown)


def _texts(cls: type) -> dict[str, str]:
    """The strings under the fields of a class and of those that it extends."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(one)))
        except (OSError, TypeError):
            continue
        body = tree.body[0].body  # type: ignore[attr-defined]
        for field, below in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(field.target, ast.Name):
                value = below.value
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    found[field.target.id] = " ".join(value.value.split())
    return found
