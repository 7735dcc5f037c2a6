"""Results as strict JSON, which has no infinity: what is not finite becomes null."""

import json
import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any


def write_json(document: Any, path: Path) -> None:
    """Write an indented file that ends with a newline."""
    path.write_text(json.dumps(to_json(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def to_json(value: Any) -> Any:
    """Dataclasses as objects, tuples as lists, paths and the like as text, numbers that are not finite as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(name): to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str | None) else str(value)
