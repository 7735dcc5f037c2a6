"""What a model costs, from its architecture alone: parameters, multiply-accumulates, attention memory.

The formulas are written out to show where the variants differ; tests compare them with torch's FlopCounterMode
(`models.count_macs_by_torch`). Letters as in training/attention.py.
"""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from training.models import Architecture, Record, StrideViT, count_parameters
from training.variants import parse_variant

CHANNELS = 3
FLOAT32_BYTES = 4
ATTENTION_PARTS = ("queries", "keys and values", "reduce", "attention", "projection")
"""The parts of `macs_by_part` in which variants may differ."""


class Description(Record):
    """One variant of one preset. All counts are for one image."""

    architecture: Architecture
    params: int
    tokens: int
    """N, patches and the class token if there is one."""
    kv_tokens: int
    """M, keys and values of each attention layer."""
    macs: int
    """Multiply-accumulates of matrix products and convolutions."""
    macs_by_part: dict[str, int]
    elementwise: int
    """Values computed by all other operations."""
    elementwise_by_operation: dict[str, int]
    attention_score_bytes: int
    """Float32 scores of one layer, H·N·M values, if stored in full; fused kernels hold only part of them."""


def describe(spec: Architecture) -> Description:
    """All costs of `spec`."""
    macs, elementwise = count_macs(spec), _elementwise(spec)
    return Description(
        architecture=spec,
        params=count_parameters(StrideViT(spec)),
        tokens=spec.tokens,
        kv_tokens=spec.kv_tokens,
        macs=sum(macs.values()),
        macs_by_part=macs,
        elementwise=sum(elementwise.values()),
        elementwise_by_operation=elementwise,
        attention_score_bytes=spec.num_heads * spec.tokens * spec.kv_tokens * FLOAT32_BYTES,
    )


def count_macs(spec: Architecture) -> dict[str, int]:
    """Multiply-accumulates of one image by part, matrix products and convolutions only."""
    N, M, D, r = spec.tokens, spec.kv_tokens, spec.embed_dim, spec.rank
    pooled = M - spec.class_tokens
    variant = parse_variant(spec.variant)
    match variant.kind:
        case "mha":
            keys_values, reduce = 2 * N * D * D, 0
        case "csra":
            keys_values, reduce = N * D * r + 2 * M * r * D, pooled * r * 3 * 3
        case "lsra":
            keys_values, reduce = N * D * r + 2 * M * r * D, pooled * variant.reduction * r
    return {
        "patches": (N - spec.class_tokens) * CHANNELS * spec.patch_size**2 * D,
        "queries": spec.depth * N * D * D,
        "keys and values": spec.depth * keys_values,
        "reduce": spec.depth * reduce,
        "attention": spec.depth * 2 * N * M * D,
        "projection": spec.depth * N * D * D,
        "mlp": spec.depth * 2 * N * D * int(D * spec.mlp_ratio),
        "head": D * spec.num_classes,
    }


def _elementwise(spec: Architecture) -> dict[str, int]:
    N, M, D, r = spec.tokens, spec.kv_tokens, spec.embed_dim, spec.rank
    variant = parse_variant(spec.variant)
    gate = (M - spec.class_tokens) * variant.reduction if variant.kind == "lsra" else 0
    return {
        "layer norm": spec.depth * (2 * N * D + (M * r if variant.kind != "mha" else 0)) + D,
        "softmax": spec.depth * (spec.num_heads * N * M + gate),
        "gate logits": spec.depth * gate * r,
        "gelu": spec.depth * N * int(D * spec.mlp_ratio),
        "residual and positions": (2 * spec.depth + 1) * N * D,
    }


def cost_table(described: Sequence[Description]) -> Table:
    """One row per variant; all have the same preset and image size."""
    spec = described[0].architecture
    height, width = spec.image_shape
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=f"{spec.preset}, {width} × {height} px, {described[0].tokens} tokens, rank {spec.rank}, for one image",
        caption="MACs: matrix products and convolutions, equal to torch's FlopCounterMode; elementwise: values of "
        "norms, softmax, GELU, gates and sums; scores: float32, one layer, if stored in full",
    )
    table.add_column("variant")
    for name in ("K/V tokens", "parameters", "MACs", "in attention", "elementwise", "scores"):
        table.add_column(name, justify="right")
    for one in described:
        table.add_row(
            one.architecture.variant,
            str(one.kv_tokens),
            f"{one.params:,}",
            _count(one.macs),
            _count(sum(one.macs_by_part[part] for part in ATTENTION_PARTS)),
            _count(one.elementwise),
            f"{one.attention_score_bytes / 2**20:,.2f} MiB",
        )
    return table


def _count(number: int) -> str:
    return f"{number / 1e9:,.3f} G" if number >= 10**9 else f"{number / 1e6:,.2f} M"
