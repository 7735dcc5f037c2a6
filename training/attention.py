"""The attention variants: standard MHA, L-SRA and C-SRA.

Shape suffixes: B batch · N tokens (h×w patches, after a class token if there is one) · M key/value tokens · D width ·
r rank · H heads · d = D/H · R tokens in a block.

Both compressed variants share one frame and differ only in `reduce`, so that a comparison isolates it:

    Q = X·Wq (B,N,D)   C = X·Wc (B,N,r)   C' = LayerNorm(reduce(C)) (B,M,r)
    K = C'·Wk, V = C'·Wv (B,M,D)          Y = softmax(QKᵀ/√d)·V·Wo

`reduce` pools patches; a class token's latent stays as it is, so that the class token remains a key and a value.

The constructors take what timm's `Block` passes to its `attn_layer`; `attention_layer` binds the rest.
"""

import functools

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from timm.layers import Attention, use_fused_attn
from torch import Tensor, nn

from training.variants import Variant


class CompressedAttention(nn.Module):
    """The shared frame: full-length queries over keys and values made from a shorter low-rank latent.

    A subclass sets `grid`, `rank` and `reduction` (see `attention_layer`) and implements `reduce`.
    """

    grid: tuple[int, int]
    rank: int
    reduction: int
    prefix: int = 0
    """Number of class tokens, which come first in the sequence."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        qk_norm: bool = False,
        scale_norm: bool = False,
        norm_layer: type[nn.Module] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim {dim} is not divisible by num_heads {num_heads}")
        if qk_norm or scale_norm:
            raise ValueError("compressed attention has no qk_norm or scale_norm")
        factory = {"device": device, "dtype": dtype}
        norm = norm_layer or nn.LayerNorm
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.fused_attn = use_fused_attn()
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.latent = nn.Linear(dim, self.rank, bias=qkv_bias, **factory)
        self.norm = norm(self.rank, **factory)
        self.kv = nn.Linear(self.rank, 2 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def reduce(self, c_BNr: Tensor) -> Tensor:
        """Pool the latent of patches (B,h·w,r) over neighbours."""
        raise NotImplementedError

    def latents(self, x_BND: Tensor) -> Tensor:
        """What keys and values are made from: (B,N,D) -> (B,M,r)."""
        c_BNr = self.latent(x_BND)
        if not self.prefix:
            return self.norm(self.reduce(c_BNr))  # type: ignore[no-any-return]
        pooled = self.reduce(c_BNr[:, self.prefix :])
        c_BMr: Tensor = self.norm(torch.cat([c_BNr[:, : self.prefix], pooled], dim=1))
        return c_BMr

    def forward(self, x_BND: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend from all N tokens to M pooled ones: (B,N,D) -> (B,N,D)."""
        if attn_mask is not None or is_causal:
            raise ValueError("compressed attention takes no mask: pooled tokens have no position to mask")
        B, N, D = x_BND.shape
        q_BHNd = self.q(x_BND).view(B, N, self.num_heads, -1).transpose(1, 2)
        c_BMr = self.latents(x_BND)
        kv_2BHMd = self.kv(c_BMr).view(B, c_BMr.shape[1], 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        k_BHMd, v_BHMd = kv_2BHMd.unbind(0)
        dropout = self.attn_drop if self.training else 0.0
        if self.fused_attn:
            y_BHNd = F.scaled_dot_product_attention(q_BHNd, k_BHMd, v_BHMd, dropout_p=dropout)
        else:
            score_BHNM = (q_BHNd * q_BHNd.shape[-1] ** -0.5) @ k_BHMd.transpose(-2, -1)
            y_BHNd = F.dropout(score_BHNM.softmax(dim=-1), dropout) @ v_BHMd
        y_BND = y_BHNd.transpose(1, 2).reshape(B, N, D)
        out: Tensor = self.proj_drop(self.proj(y_BND))
        return out


class ConvolutionalSRA(CompressedAttention):
    """C-SRA: a depthwise 3×3 convolution of stride R over the grid of the latent."""

    def __init__(self, dim: int, num_heads: int = 8, **kwargs: object) -> None:
        super().__init__(dim, num_heads, **kwargs)  # type: ignore[arg-type]
        self.conv = nn.Conv2d(self.rank, self.rank, kernel_size=3, stride=self.reduction, padding=1, groups=self.rank)

    def reduce(self, c_BNr: Tensor) -> Tensor:
        """(B,h·w,r) -> (B, ceil(h/R)·ceil(w/R), r)."""
        B, _, r = c_BNr.shape
        c_Brhw = c_BNr.transpose(1, 2).reshape(B, r, *self.grid).contiguous()
        if c_BNr.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # The backward pass of a depthwise bf16 convolution takes a CPU 25 times as long as the float32 one.
            with torch.autocast("cpu", enabled=False):
                pooled_Brhw = self.conv(c_Brhw.float())
        else:
            pooled_Brhw = self.conv(c_Brhw)
        pooled_BMr: Tensor = pooled_Brhw.flatten(2).transpose(1, 2)
        return pooled_BMr


class LocalSRA(CompressedAttention):
    """L-SRA: blocks of R consecutive tokens, each pooled to one by a content-weighted softmax.

    The gate starts at zero, which makes the first forward pass a mean over each block.
    """

    padded_MR: Tensor

    def __init__(self, dim: int, num_heads: int = 8, **kwargs: object) -> None:
        super().__init__(dim, num_heads, **kwargs)  # type: ignore[arg-type]
        self.gate_weight = nn.Parameter(torch.zeros(self.rank))
        self.gate_bias = nn.Parameter(torch.zeros(self.reduction))
        N = self.grid[0] * self.grid[1]
        blocks = -(-N // self.reduction)
        slots_MR = torch.arange(blocks * self.reduction).view(blocks, self.reduction)
        self.register_buffer("padded_MR", slots_MR >= N, persistent=False)

    def reduce(self, c_BNr: Tensor) -> Tensor:
        """(B,N,r) -> (B, ceil(N/R), r); padded slots get no weight."""
        B, N, r = c_BNr.shape
        M, R = self.padded_MR.shape
        padding = M * R - N
        c_BMRr = (F.pad(c_BNr, (0, 0, 0, padding)) if padding else c_BNr).view(B, M, R, r)
        logit_BMR = (c_BMRr @ self.gate_weight + self.gate_bias).float()
        if padding:
            logit_BMR = logit_BMR.masked_fill(self.padded_MR, float("-inf"))
        weight_BMR = logit_BMR.softmax(dim=-1).to(c_BMRr.dtype)
        return (weight_BMR.unsqueeze(2) @ c_BMRr).squeeze(2)


@functools.cache
def attention_layer(variant: Variant, *, grid: tuple[int, int], rank: int, prefix: int = 0) -> type[nn.Module]:
    """The class that timm's `attn_layer` wants for `variant` on a `grid` (h, w) of patches with `rank` r."""
    if variant.kind == "mha":
        layer: type[nn.Module] = Attention
        return layer
    frame = ConvolutionalSRA if variant.kind == "csra" else LocalSRA
    return type(
        frame.__name__, (frame,), {"grid": grid, "rank": rank, "reduction": variant.reduction, "prefix": prefix}
    )
