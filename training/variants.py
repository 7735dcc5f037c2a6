"""The names of the attention variants: `mha`, `lsra-rR`, `csra-rR`.

`R` applies per side of the grid for C-SRA and along the sequence for L-SRA, so equal `R` does not mean equal
compression: compare variants by `kv_tokens`.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["mha", "lsra", "csra"]

REGISTERED = ("mha", "lsra-r2", "lsra-r4", "csra-r2", "csra-r4")
"""The variants in tables and in timm's registry; any other R works too."""

_NAME = re.compile(r"(?P<kind>lsra|csra)-r(?P<reduction>[1-9]\d{0,3})")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What an attention layer does to its keys and values."""

    kind: Kind
    reduction: int = 1
    """R: the stride of C-SRA's convolution, the block size of L-SRA; 1 for MHA."""

    def __str__(self) -> str:
        return "mha" if self.kind == "mha" else f"{self.kind}-r{self.reduction}"

    @property
    def stride(self) -> int | None:
        """Stride of the depthwise convolution over the grid; None unless C-SRA."""
        return self.reduction if self.kind == "csra" else None

    @property
    def block_size(self) -> int | None:
        """Number of consecutive tokens pooled to one; None unless L-SRA."""
        return self.reduction if self.kind == "lsra" else None

    def kv_tokens(self, grid: tuple[int, int]) -> int:
        """Key/value tokens M for the h·w patch tokens of `grid`."""
        height, width = grid
        match self.kind:
            case "mha":
                return height * width
            case "lsra":
                return math.ceil(height * width / self.reduction)
            case "csra":
                return math.ceil(height / self.reduction) * math.ceil(width / self.reduction)


def parse_variant(name: str) -> Variant:
    """Parse a variant's name. Raises ValueError with the accepted forms."""
    if name == "mha":
        return Variant(kind="mha")
    if match := _NAME.fullmatch(name):
        kind: Kind = "lsra" if match["kind"] == "lsra" else "csra"
        return Variant(kind=kind, reduction=int(match["reduction"]))
    raise ValueError(
        f"unknown variant {name!r}: use mha, lsra-rR or csra-rR with a whole number R >= 1, such as csra-r2"
    )
