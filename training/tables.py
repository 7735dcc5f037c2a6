"""What `evaluate` and `describe` show: tables for people, records for programs."""

import math
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from training.describe import ATTENTION_PARTS, Description
from training.evaluate import Evaluation
from training.runs import ModelCard


def evaluation_record(card: ModelCard, split: str, result: Evaluation) -> dict[str, Any]:
    """An evaluation as JSON takes it."""
    labels = card.labels
    return {
        "run": card.name,
        "dataset": card.dataset,
        "split": split,
        "n": result.n,
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss,
        "classes": [
            {"index": index, "label": label, "top1": None if math.isnan(share) else share}
            for index, (label, share) in enumerate(zip(labels, result.by_class(), strict=True))
        ],
        "confusions": [
            {"label": labels[label], "answered": labels[answer], "images": count}
            for label, answer, count in result.worst_pairs(20)
        ],
    }


def class_table(result: Evaluation, labels: Sequence[str]) -> Table:
    """Top-1 of every class, worst first."""
    table = Table("class", "top-1")
    shares = zip(result.by_class(), labels, strict=True)
    for share, label in sorted(shares, key=lambda row: (math.isnan(row[0]), row)):
        table.add_row(escape(label), "no image" if math.isnan(share) else f"{share:.1%}")
    return table


def confusion_table(result: Evaluation, labels: Sequence[str], count: int) -> Table:
    """The pairs that are confused most often."""
    table = Table("label", "answered", "images", title="confused most often")
    for label, answer, images in result.worst_pairs(count):
        table.add_row(escape(labels[label]), escape(labels[answer]), str(images))
    return table


def description_table(described: Sequence[Description]) -> Table:
    """One row a variant of the same preset and image size."""
    spec = described[0].architecture
    height, width = spec.image_shape
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=f"{spec.preset}, {width} × {height} px, {described[0].tokens} patches, rank {spec.rank}, for one image",
        caption="MACs: matrix products and convolutions, equal to torch's FlopCounterMode; elementwise: values made by "
        "norms, softmax, GELU, gates and sums; scores: float32 of one layer, if written out",
    )
    table.add_column("variant")
    for name in ("K/V tokens", "parameters", "MACs", "in attention", "elementwise", "scores"):
        table.add_column(name, justify="right")
    for one in described:
        table.add_row(
            one.architecture.variant,
            str(one.kv_tokens),
            f"{one.parameters:,}",
            _count(one.macs_total),
            _count(sum(one.macs[part] for part in ATTENTION_PARTS)),
            _count(one.elementwise_total),
            f"{one.attention_score_bytes / 2**20:,.2f} MiB",
        )
    return table


def _count(number: int) -> str:
    return f"{number / 1e9:,.3f} G" if number >= 10**9 else f"{number / 1e6:,.2f} M"
