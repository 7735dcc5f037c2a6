"""What LoadGen wrote: its summary with the verdict, verbatim, and its log of answers."""

import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtests.generator.readers import Label
from loadtests.mlperf.plan import Scenario
from loadtests.report.rendering import sentences

HEADLINES: dict[Scenario, str] = {
    "SingleStream": "90.0th percentile latency (ns)",
    "Offline": "Samples per second",
    "Server": "Completed samples per second",
}
"""LoadGen's name of each scenario's metric."""
_RATES = {**HEADLINES, "SingleStream": "QPS w/ loadgen overhead"}
_PERCENTILES = {f"p{rank}_ms": f"{rank}.00 percentile latency (ns)" for rank in (50, 90, 95, 99)}

_TITLE = re.compile(r"^=+\n(.*)\n=+\n", re.MULTILINE)
_VERDICT = re.compile(r"^Result is *: *(.*)\n((?:(?!=).*\n)*)", re.MULTILINE)
"""The verdict, with all lines below it until the next title."""
_VALUE = re.compile(r"^(\S.*?) *: *(\S.*)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """`mlperf_log_summary.txt`, under LoadGen's own names."""

    verdict: str | None = None
    """`VALID` or `INVALID`; None in a run for accuracy, for which LoadGen gives none."""
    reasons: list[str] = field(default_factory=list)
    """The lines below the verdict, verbatim."""
    values: dict[str, str] = field(default_factory=dict)
    """What was measured."""
    parameters: dict[str, str] = field(default_factory=dict)
    """The settings in force."""
    remarks: list[str] = field(default_factory=list)
    """The closing lines about warnings and errors."""

    def number(self, name: str) -> float | None:
        """A measured value, in ms where LoadGen gives ns; None if there is none of this name."""
        text = self.values.get(name)
        return None if text is None else float(text) / (1e6 if name.endswith("(ns)") else 1)


def parse_summary(text: str) -> Summary:
    """Read a summary: titles between bars, sections of lines `name : value`, and reasons below the verdict."""
    verdict, reasons = found.groups() if (found := _VERDICT.search(text)) else (None, "")
    measured, *titled = _TITLE.split(_VERDICT.sub("", text))
    sections = dict(zip(titled[::2], titled[1::2], strict=True))
    parameters = sections.pop("Test Parameters Used", "")
    measured += "".join(sections.values())
    return Summary(
        verdict=verdict,
        reasons=[line.rstrip() for line in reasons.splitlines() if line.strip()],
        values=dict(_VALUE.findall(measured)),
        parameters=dict(_VALUE.findall(parameters)),
        remarks=[line for line in (measured + parameters).splitlines() if line and not _VALUE.match(line)],
    )


def figures(scenario: Scenario, summary: Summary) -> dict[str, Any]:
    """The verdict, rate and percentiles, each None if LoadGen gives none."""
    percentiles = {name: summary.number(key) for name, key in _PERCENTILES.items()}
    return {"verdict": summary.verdict, "samples_per_second": summary.number(_RATES[scenario]), **percentiles}


def unmet(scenario: Scenario, summary: Summary, rules: dict[str, float]) -> list[str]:
    """The settings in which a run fell short of MLPerf's own for image classification; none in AccuracyOnly mode."""
    used = {name: float(value) for name, value in summary.parameters.items()}
    return sentences("mlperf_unmet.txt.j2", scenario=scenario, used=used, rules=rules) if used else []


def top1(log: Path | None, labels: Sequence[Label], classes: Sequence[str]) -> dict[str, Any]:
    """Counts of `correct` answers and of answers to `labelled` images in `mlperf_log_accuracy.json`, and `top1`.

    Labels are indices or names; `classes` are the model's names. Not counted are images that failed (logged without an
    answer), have no label, or whose label is a name while the model's names are unknown (a family has none).
    """
    labelled = correct = 0
    for entry in json.loads(log.read_bytes()) if log else ():
        label, answer = labels[entry["qsl_idx"]], bytes.fromhex(entry["data"])
        if label is None or not answer or (isinstance(label, str) and not classes):
            continue
        (index,) = struct.unpack("=i", answer)
        labelled += 1
        correct += label in (index, classes[index] if index < len(classes) else None)
    return {"correct": correct, "labelled": labelled, "top1": correct / labelled if labelled else None}
