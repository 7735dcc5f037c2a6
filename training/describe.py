"""What a model costs, from its architecture alone: parameters, multiply-accumulates, attention memory.

The formulas are written out, so that one can see where the variants differ; tests hold them against torch's
FlopCounterMode (`models.count_macs_by_torch`). Letters as in training/attention.py.
"""

from pydantic import BaseModel, ConfigDict

from training.models import Architecture, StrideViT, count_parameters
from training.variants import parse_variant

CHANNELS = 3
FLOAT32_BYTES = 4
ATTENTION_PARTS = ("queries", "keys and values", "reduce", "attention", "projection")
"""The parts of `Description.macs` in which variants may differ."""


class Description(BaseModel):
    """One variant of one preset. All counts are for one image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Architecture
    parameters: int
    tokens: int
    """N, patches."""
    kv_tokens: int
    """M, keys and values of each attention layer."""
    macs: dict[str, int]
    """Multiply-accumulates of matrix products and convolutions, by part."""
    macs_total: int
    elementwise: dict[str, int]
    """Elements that are not matrix products: one for each value that the operation makes."""
    elementwise_total: int
    attention_score_bytes: int
    """Float32 scores of one layer, H·N·M values, where they are written out; fused kernels keep only a part of them."""


def describe(spec: Architecture) -> Description:
    """Count everything about `spec`."""
    macs, elementwise = count_macs(spec), _elementwise(spec)
    height, width = spec.grid
    N, M = height * width, spec.kv_tokens
    return Description(
        architecture=spec,
        parameters=count_parameters(StrideViT(spec)),
        tokens=N,
        kv_tokens=M,
        macs=macs,
        macs_total=sum(macs.values()),
        elementwise=elementwise,
        elementwise_total=sum(elementwise.values()),
        attention_score_bytes=spec.num_heads * N * M * FLOAT32_BYTES,
    )


def count_macs(spec: Architecture) -> dict[str, int]:
    """Multiply-accumulates of one image by part, matrix products and convolutions only."""
    N, M, D, r = spec.grid[0] * spec.grid[1], spec.kv_tokens, spec.embed_dim, spec.rank
    variant = parse_variant(spec.variant)
    match variant.kind:
        case "mha":
            keys_values, reduce = 2 * N * D * D, 0
        case "csra":
            keys_values, reduce = N * D * r + 2 * M * r * D, M * r * 3 * 3
        case "lsra":
            keys_values, reduce = N * D * r + 2 * M * r * D, M * variant.reduction * r
    return {
        "patches": N * CHANNELS * spec.patch_size**2 * D,
        "queries": spec.depth * N * D * D,
        "keys and values": spec.depth * keys_values,
        "reduce": spec.depth * reduce,
        "attention": spec.depth * 2 * N * M * D,
        "projection": spec.depth * N * D * D,
        "mlp": spec.depth * 2 * N * D * _hidden(spec),
        "head": D * spec.num_classes,
    }


def _elementwise(spec: Architecture) -> dict[str, int]:
    N, M, D, r = spec.grid[0] * spec.grid[1], spec.kv_tokens, spec.embed_dim, spec.rank
    variant = parse_variant(spec.variant)
    gate = M * variant.reduction if variant.kind == "lsra" else 0
    return {
        "layer norm": spec.depth * (2 * N * D + (M * r if variant.kind != "mha" else 0)) + D,
        "softmax": spec.depth * (spec.num_heads * N * M + gate),
        "gate logits": spec.depth * gate * r,
        "gelu": spec.depth * N * _hidden(spec),
        "residual and positions": (2 * spec.depth + 1) * N * D,
    }


def _hidden(spec: Architecture) -> int:
    return int(spec.embed_dim * spec.mlp_ratio)
