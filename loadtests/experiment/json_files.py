"""Dataclasses with numpy arrays and paths on disk: as JSON for everyone, as MessagePack to be read back by type."""

from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

T = TypeVar("T")


def to_json(document: Any) -> bytes:
    """As indented, strict JSON, which has no infinity, so numbers that are not finite become null."""
    return msgspec.json.format(msgspec.json.encode(document, enc_hook=_plain), indent=1) + b"\n"


def from_json(document: Any, kind: type[T]) -> T:
    """The object that parsed JSON stands for; fields that `kind` does not know are ignored. Raises ValueError."""
    return msgspec.convert(document, kind, dec_hook=_restored)


def pack(value: Any) -> bytes:
    """As MessagePack, which has infinity."""
    return msgspec.msgpack.encode(value, enc_hook=_plain)


def unpack(packed: bytes, kind: type[T]) -> T:
    """What was packed, as a `kind`; where that is Any, tuples and arrays become lists, and paths text."""
    return msgspec.msgpack.decode(packed, type=kind, dec_hook=_restored)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def _restored(kind: type, value: Any) -> Any:
    return Path(value) if kind is Path else np.array(value)
