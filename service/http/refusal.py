"""An answer in place of the application's."""

from collections.abc import Callable
from typing import NamedTuple

from starlette.types import Scope


class Refusal(NamedTuple):
    """An answer that is known from a request's head."""

    status: int
    lines: bytes
    """Of its head, each with its end; without those that say how the connection goes on."""
    body: bytes


Refuse = Callable[[Scope], Refusal | None]
"""Gives the answer to a request that is refused by its head, None for all others."""
