"""What LoadGen wrote: its summary with the verdict, word by word, and its log of answers."""

import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loadtests.generator.payloads import Label

_VALUE = re.compile(r"(?P<name>\S.*?)\s*:\s*(?P<value>\S.*)")
_VERDICT = "Result is"
_PARAMETERS = "Test Parameters Used"
_NANOSECONDS = "(ns)"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """`mlperf_log_summary.txt`."""

    verdict: str | None = None
    """`VALID` or `INVALID`; None in a run for accuracy, of which LoadGen gives none."""
    reasons: tuple[str, ...] = ()
    """The lines below the verdict, as they are."""
    values: dict[str, str] = field(default_factory=dict)
    """What was measured, under LoadGen's own names."""
    parameters: dict[str, str] = field(default_factory=dict)
    """The settings that were in force, under LoadGen's own names."""
    remarks: tuple[str, ...] = ()
    """The closing lines, of warnings and errors."""

    def number(self, name: str) -> float | None:
        """A value as a number, in ms where LoadGen gives ns; None where there is none under this name."""
        text = self.values.get(name)
        if text is None:
            return None
        return float(text) / 1e6 if name.endswith(_NANOSECONDS) else float(text)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Of the answers in `mlperf_log_accuracy.json` to images with a label."""

    answered: int
    correct: int

    @property
    def top1(self) -> float | None:
        """None where nothing was answered."""
        return self.correct / self.answered if self.answered else None


def parse_summary(text: str) -> Summary:
    """Read a summary: sections below titles between bars, of lines `name : value`; below the verdict its reasons."""
    verdict: str | None = None
    reasons: list[str] = []
    values: dict[str, str] = {}
    parameters: dict[str, str] = {}
    remarks: list[str] = []
    lines = text.splitlines()
    title, below_verdict = "", False
    for number, line in enumerate(lines):
        said = line.strip()
        is_bar = said != "" and set(said) == {"="}
        if is_bar:
            below_verdict = False
        elif said and number + 1 < len(lines) and set(lines[number + 1].strip()) == {"="}:
            title = said
        elif said.startswith(_VERDICT):
            verdict, below_verdict = said.partition(":")[2].strip(), True
        elif said and below_verdict:
            reasons.append(line.rstrip())
        elif match := _VALUE.fullmatch(said):
            (parameters if title == _PARAMETERS else values)[match["name"]] = match["value"]
        elif said:
            remarks.append(said)
    return Summary(
        verdict=verdict, reasons=tuple(reasons), values=values, parameters=parameters, remarks=tuple(remarks)
    )


def accuracy_of(log: Path, labels: Sequence[Label], classes: Sequence[str]) -> Accuracy:
    """Compare the logged class indices with the images' labels, indices or names; `classes` are the model's names.

    An image that failed was logged without an answer and does not count; nor does one without a label, or one whose
    label is a name where the model's names are not known (there are none of a family).
    """
    answered = correct = 0
    for entry in json.loads(log.read_text(encoding="utf-8")):
        label, answer = labels[entry["qsl_idx"]], bytes.fromhex(entry["data"])
        if label is None or not answer or (isinstance(label, str) and not classes):
            continue
        (index,) = struct.unpack("=i", answer)
        answered += 1
        correct += label in (index, classes[index] if index < len(classes) else None)
    return Accuracy(answered=answered, correct=correct)
