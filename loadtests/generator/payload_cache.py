"""The payloads in the order in which they are sent, on disk between the processes of a measurement."""

import json
from collections.abc import Sequence
from pathlib import Path

from loadtests.generator.payloads import Payload

_ORDER = "order.json"
IMAGES = "images"
"""Folder of the image files alone, by number."""


def save(payloads: Sequence[Payload], folder: Path) -> None:
    """Write `images/00000`, `images/00001`, ... and `order.json`."""
    images = folder / IMAGES
    images.mkdir()
    for number, payload in enumerate(payloads):
        (images / f"{number:05d}").write_bytes(payload.data)
    listed = [{"name": payload.name, "label": payload.label} for payload in payloads]
    (folder / _ORDER).write_text(json.dumps(listed), encoding="utf-8")


def is_saved(folder: Path) -> bool:
    """Whether `save` has filled it."""
    return (folder / _ORDER).is_file()


def load(folder: Path) -> list[Payload]:
    """What was saved."""
    listed = json.loads((folder / _ORDER).read_text(encoding="utf-8"))
    return [
        Payload(one["name"], (folder / IMAGES / f"{number:05d}").read_bytes(), one["label"])
        for number, one in enumerate(listed)
    ]
