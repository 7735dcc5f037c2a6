"""The payloads in the order in which they are sent, on disk between the processes of a measurement."""

import json
from collections.abc import Sequence
from pathlib import Path

from loadtests.generator.readers import Payload

IMAGES = "images"
"""Subfolder of the image files alone, named by number."""
_ORDER = "order.json"


def save(payloads: Sequence[Payload], folder: Path) -> None:
    """Write `images/00000`, `images/00001`, ... and their names and labels as `order.json`."""
    (folder / IMAGES).mkdir()
    for number, payload in enumerate(payloads):
        (folder / IMAGES / f"{number:05d}").write_bytes(payload.data)
    (folder / _ORDER).write_text(json.dumps([(payload.name, payload.label) for payload in payloads]), encoding="utf-8")


def load(folder: Path) -> list[Payload]:
    """What was saved, in the same order; empty if the folder was not filled by `save`."""
    order = json.loads((folder / _ORDER).read_text(encoding="utf-8")) if (folder / _ORDER).is_file() else []
    images = ((folder / IMAGES / f"{number:05d}").read_bytes() for number in range(len(order)))
    return [Payload(name, image, label) for (name, label), image in zip(order, images, strict=True)]
