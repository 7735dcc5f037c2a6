"""The attention variants against slow, obvious references."""

import math

import pytest
import torch
from torch import Tensor

from training.attention import CompressedAttention, ConvolutionalSRA, LocalSRA, attention_layer
from training.variants import parse_variant

B, D, r, H = 2, 16, 6, 2
GRIDS = [(4, 4), (5, 3), (1, 7)]


def layer(name: str, grid: tuple[int, int]) -> CompressedAttention:
    torch.manual_seed(0)
    made = attention_layer(parse_variant(name), grid=grid, rank=r)(D, num_heads=H).eval()
    assert isinstance(made, CompressedAttention)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made.requires_grad_(False)


def tokens(grid: tuple[int, int], width: int) -> Tensor:
    return torch.randn(B, grid[0] * grid[1], width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("R", [1, 2, 3, 4])
def test_lsra_reduce_is_a_softmax_weighted_mean_of_each_block(grid: tuple[int, int], R: int) -> None:
    attention = layer(f"lsra-r{R}", grid)
    assert isinstance(attention, LocalSRA)
    c_BNr = tokens(grid, r)
    N = grid[0] * grid[1]
    expected = torch.empty(B, math.ceil(N / R), r)
    for b in range(B):
        for block, start in enumerate(range(0, N, R)):
            members = [c_BNr[b, n] for n in range(start, min(start + R, N))]
            weights = [
                math.exp(float(member @ attention.gate_weight + attention.gate_bias[position]))
                for position, member in enumerate(members)
            ]
            expected[b, block] = sum(w * m for w, m in zip(weights, members, strict=True)) / sum(weights)
    torch.testing.assert_close(attention.reduce(c_BNr), expected)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("R", [1, 2, 3, 4])
def test_csra_reduce_is_a_strided_depthwise_convolution(grid: tuple[int, int], R: int) -> None:
    attention = layer(f"csra-r{R}", grid)
    assert isinstance(attention, ConvolutionalSRA)
    c_BNr = tokens(grid, r)
    (h, w), kernel, bias = grid, attention.conv.weight, attention.conv.bias
    assert bias is not None
    expected = []
    for top in range(0, h, R):
        for left in range(0, w, R):
            total = bias.expand(B, r).clone()
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    y, x = top + dy, left + dx
                    if 0 <= y < h and 0 <= x < w:
                        total += c_BNr[:, y * w + x] * kernel[:, 0, dy + 1, dx + 1]
            expected.append(total)
    torch.testing.assert_close(attention.reduce(c_BNr), torch.stack(expected, dim=1))


@pytest.mark.parametrize("name", ["lsra-r2", "lsra-r4", "csra-r2", "csra-r4"])
def test_forward_is_attention_over_the_reduced_latent(name: str) -> None:
    grid = (5, 3)
    attention = layer(name, grid)
    x_BND = tokens(grid, D)
    c = attention.norm(attention.reduce(attention.latent(x_BND)))
    k, v = attention.kv(c).chunk(2, dim=-1)
    q = attention.q(x_BND)
    heads = []
    for head in range(H):
        part = slice(head * D // H, (head + 1) * D // H)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(D / H)
        heads.append(scores.softmax(dim=-1) @ v[..., part])
    expected = attention.proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(x_BND), expected)


def test_initial_gate_pools_by_the_mean() -> None:
    attention = attention_layer(parse_variant("lsra-r4"), grid=(4, 4), rank=r)(D, num_heads=H)
    assert isinstance(attention, LocalSRA)
    c_BNr = tokens((4, 4), r)
    torch.testing.assert_close(attention.reduce(c_BNr), c_BNr.view(B, 4, 4, r).mean(dim=2))


@pytest.mark.parametrize("name", ["mha", "lsra-r2", "lsra-r5", "csra-r2", "csra-r3"])
def test_gradients_reach_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    attention = attention_layer(parse_variant(name), grid=(5, 3), rank=r)(D, num_heads=H, qkv_bias=True)
    attention(tokens((5, 3), D)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in attention.parameters())
    silent = [name for name, parameter in attention.named_parameters() if not parameter.grad.abs().max() > 0]  # type: ignore[union-attr]
    assert silent == []


def test_masks_and_indivisible_widths_are_refused() -> None:
    attention = layer("csra-r2", (4, 4))
    with pytest.raises(ValueError, match="mask"):
        attention(tokens((4, 4), D), is_causal=True)
    with pytest.raises(ValueError, match="not divisible"):
        attention_layer(parse_variant("csra-r2"), grid=(4, 4), rank=r)(D, num_heads=3)
