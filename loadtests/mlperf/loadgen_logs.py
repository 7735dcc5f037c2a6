"""What LoadGen wrote: its summary with the verdict, word by word, and its log of answers."""

import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loadtests.generator.readers import Label

_VALUE = re.compile(r"(?P<name>\S.*?)\s*:\s*(?P<value>\S.*)")
_BAR = re.compile(r"\s*=+\s*")
_VERDICT = "Result is"
_PARAMETERS = "Test Parameters Used"


@dataclass(kw_only=True)
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
    summary, lines = Summary(), text.splitlines()
    title, below_verdict = "", False
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        said = line.strip()
        if _BAR.fullmatch(line):
            below_verdict = False
        elif said and _BAR.fullmatch(following):
            title = said
        elif said.startswith(_VERDICT):
            summary.verdict, below_verdict = said.partition(":")[2].strip(), True
        elif said and below_verdict:
            summary.reasons.append(line.rstrip())
        elif match := _VALUE.fullmatch(said):
            (summary.parameters if title == _PARAMETERS else summary.values)[match["name"]] = match["value"]
        elif said:
            summary.remarks.append(said)
    return summary


def count_correct(log: Path, labels: Sequence[Label], classes: Sequence[str]) -> tuple[int, int]:
    """How many of the answers in `mlperf_log_accuracy.json` are right, and how many there are to labelled images.

    Labels are indices or names; `classes` are the model's names. Not counted are images that failed (logged without an
    answer), have no label, or whose label is a name while the model's names are unknown (a family has none).
    """
    answered = correct = 0
    for entry in json.loads(log.read_text(encoding="utf-8")):
        label, answer = labels[entry["qsl_idx"]], bytes.fromhex(entry["data"])
        if label is None or not answer or (isinstance(label, str) and not classes):
            continue
        (index,) = struct.unpack("=i", answer)
        answered += 1
        correct += label in (index, classes[index] if index < len(classes) else None)
    return correct, answered
