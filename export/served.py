"""The model as it is served: what `Classifier` computes, shaped for an inference runtime, all variants alike.

Shape suffixes as in training/attention.py; P is the patch size. What is done once here, instead of for every image:

- the normalisation of pixels is folded into the patch embedding, and its bias into the positions;
- matrices stand as (in, out), so that a product needs no transposition;
- L-SRA's gate is one more column of the latent's matrix, and its pooling one batched product. A last block that is not
  full is pooled by itself: ONNX Runtime has no CUDA kernel for `Pad` at opset 23.

Keys and values are one product. Attention is the standard operator on 4-D tensors where the opset has it, and else its
parts with the scale folded into the queries. (The operator takes 3-D tensors too, and Reshape and Transpose take uint8:
TensorRT does not promise either.) `python -m export profile --forms unshaped,shaped` compares.
"""

import copy

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from training.attention import CompressedAttention, ConvolutionalSRA, LocalSRA
from training.models import Classifier, StrideViT


class _Product(nn.Module):
    """x @ weight + bias, with weight (in, out)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().float().contiguous())
        self.register_buffer("bias", bias.detach().float().contiguous())

    @classmethod
    def of(cls, layer: nn.Module | Tensor) -> "_Product":
        """The product that a linear layer computes."""
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"{type(layer).__name__} is no linear layer")
        return cls(layer.weight.t(), layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return x @ self.weight + self.bias


class _Attend(nn.Module):
    """Scaled dot-product attention and the output projection."""

    def __init__(self, heads: int, projection: nn.Linear, *, operator: bool) -> None:
        super().__init__()
        self.heads, self.operator = heads, operator
        self.projection = _Product.of(projection)

    def forward(self, q_BND: Tensor, k_BMD: Tensor, v_BMD: Tensor) -> Tensor:
        B, N, D = q_BND.shape
        q_BHNd, k_BHMd, v_BHMd = (
            x.view(B, -1, self.heads, D // self.heads).transpose(1, 2) for x in (q_BND, k_BMD, v_BMD)
        )
        if self.operator:
            y_BHNd = torch.onnx.ops.attention(q_BHNd, k_BHMd, v_BHMd)[0]
        else:
            y_BHNd = (q_BHNd @ k_BHMd.transpose(-2, -1)).softmax(dim=-1) @ v_BHMd
        y_BND: Tensor = self.projection(y_BHNd.transpose(1, 2).reshape(B, N, D))
        return y_BND


class _ServedMHA(nn.Module):
    """Standard attention, its queries, keys and values one product."""

    def __init__(self, trained: Attention, *, operator: bool) -> None:
        super().__init__()
        width = trained.proj.in_features
        scale = torch.ones(3 * width)
        if not operator:
            scale[:width] = trained.scale
        self.qkv = _Product(trained.qkv.weight.t() * scale, trained.qkv.bias * scale)
        self.attend = _Attend(trained.num_heads, trained.proj, operator=operator)

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B,N,D) -> (B,N,D)."""
        q_BND, k_BND, v_BND = self.qkv(x_BND).split(x_BND.shape[-1], dim=-1)
        y_BND: Tensor = self.attend(q_BND, k_BND, v_BND)
        return y_BND


class _ServedSRA(nn.Module):
    """Attention over pooled keys and values."""

    def __init__(self, trained: CompressedAttention, *, operator: bool) -> None:
        super().__init__()
        scale = 1.0 if operator else (trained.q.out_features // trained.num_heads) ** -0.5
        self.q = _Product(trained.q.weight.t() * scale, trained.q.bias * scale)
        if isinstance(trained, LocalSRA):
            self.pool: nn.Module = _LocalPool(trained)
        elif isinstance(trained, ConvolutionalSRA):
            self.pool = _ConvolutionalPool(trained)
        else:
            raise TypeError(f"no served form of {type(trained).__name__}")
        self.norm = trained.norm
        self.kv = _Product.of(trained.kv)
        self.attend = _Attend(trained.num_heads, trained.proj, operator=operator)

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B,N,D) -> (B,N,D)."""
        k_BMD, v_BMD = self.kv(self.norm(self.pool(x_BND))).split(x_BND.shape[-1], dim=-1)
        y_BND: Tensor = self.attend(self.q(x_BND), k_BMD, v_BMD)
        return y_BND


class _ConvolutionalPool(nn.Module):
    """C-SRA's latent and its `reduce`: (B,N,D) -> (B,M,r)."""

    def __init__(self, trained: ConvolutionalSRA) -> None:
        super().__init__()
        self.latent = _Product.of(trained.latent)
        self.conv, self.grid = trained.conv, trained.grid

    def forward(self, x_BND: Tensor) -> Tensor:
        c_BrN = self.latent(x_BND).transpose(1, 2)
        pooled_Brhw: Tensor = self.conv(c_BrN.reshape(*c_BrN.shape[:2], *self.grid))
        return pooled_Brhw.flatten(2).transpose(1, 2)


class _LocalPool(nn.Module):
    """L-SRA's latent and its `reduce`: (B,N,D) -> (B,M,r). The latent's last column is the gate's logit."""

    gate_bias: Tensor

    def __init__(self, trained: LocalSRA) -> None:
        super().__init__()
        weight_Dr, bias_r, gate_r = trained.latent.weight.t(), trained.latent.bias, trained.gate_weight
        self.latent = _Product(
            torch.cat([weight_Dr, (weight_Dr @ gate_r).unsqueeze(1)], dim=1),
            torch.cat([bias_r, (bias_r @ gate_r).unsqueeze(0)]),
        )
        self.register_buffer("gate_bias", trained.gate_bias.detach().clone())
        tokens = trained.grid[0] * trained.grid[1]
        self.rank, self.block = trained.rank, trained.reduction
        self.rest = tokens % self.block
        self.whole = tokens - self.rest

    def forward(self, x_BND: Tensor) -> Tensor:
        c_BNr = self.latent(x_BND)
        if not self.rest:
            return self._blocks(c_BNr, self.block)
        whole_BNr, rest_BNr = c_BNr.split([self.whole, self.rest], dim=1)
        rest_B1r = self._blocks(rest_BNr, self.rest)
        return torch.cat([self._blocks(whole_BNr, self.block), rest_B1r], dim=1) if self.whole else rest_B1r

    def _blocks(self, c_BNr: Tensor, size: int) -> Tensor:
        """Each `size` tokens as one, weighted by the softmax of their gates in float32."""
        B, N, _ = c_BNr.shape
        c_BMRr, logit_BMR1 = torch.split(c_BNr.view(B, N // size, size, -1), [self.rank, 1], dim=-1)
        logit_BM1R = logit_BMR1.transpose(-2, -1) + self.gate_bias[:size]
        weight_BM1R = logit_BM1R.float().softmax(dim=-1).to(c_BNr.dtype)
        pooled_BMr: Tensor = (weight_BM1R @ c_BMRr).squeeze(2)
        return pooled_BMr


class _ServedBlock(nn.Module):
    """One transformer block in evaluation mode: no drop-path, no dropout."""

    def __init__(self, trained: nn.Module, *, operator: bool) -> None:
        super().__init__()
        if not isinstance(trained, Block):
            raise TypeError(f"no served form of a {type(trained).__name__}")
        self.norm1, self.norm2 = trained.norm1, trained.norm2
        if isinstance(trained.attn, CompressedAttention):
            self.attention: nn.Module = _ServedSRA(trained.attn, operator=operator)
        elif isinstance(trained.attn, Attention):
            self.attention = _ServedMHA(trained.attn, operator=operator)
        else:
            raise TypeError(f"no served form of {type(trained.attn).__name__}")
        self.fc1, self.fc2 = _Product.of(trained.mlp.fc1), _Product.of(trained.mlp.fc2)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.attention(self.norm1(x_BND))
        y_BND: Tensor = x_BND + self.fc2(F.gelu(self.fc1(self.norm2(x_BND))))
        return y_BND


class Served(nn.Module):
    """uint8 images (B,H,W,3) -> logits and probabilities, float32 (B,classes).

    `operator` uses the standard `Attention`. With `half`, weights and activations between the patch embedding and the
    head are float16; the embedding of raw pixels, L-SRA's softmax, and the probabilities stay float32, and the standard
    says that `LayerNormalization` computes in float32 inside.
    """

    def __init__(self, classifier: Classifier, *, operator: bool, half: bool = False) -> None:
        super().__init__()
        # What is shared with the trained model may become half precision here.
        model = copy.deepcopy(classifier.model)
        if not isinstance(model, StrideViT):
            raise TypeError(f"no served form of a {type(model).__name__}")
        weight_D3PP = model.get_parameter("patch_embed.proj.weight").double()
        mean, std = classifier.mean.double(), classifier.std.double()
        bias_D = model.get_parameter("patch_embed.proj.bias").double() - (weight_D3PP * (mean / std)).sum(dim=(1, 2, 3))
        self.embed = _Product(
            (weight_D3PP / std).permute(2, 3, 1, 0).flatten(0, 2), model.get_buffer("pos_embed").double() + bias_D
        )
        self.patch, self.grid = model.spec.patch_size, model.spec.grid
        self.dtype = torch.float16 if half else torch.float32
        trunk = nn.Sequential(*(_ServedBlock(block, operator=operator) for block in model.blocks), model.norm)
        self.trunk = trunk.to(self.dtype)
        self.fc_norm, self.head = model.fc_norm.to(self.dtype), model.head.to(self.dtype)

    def forward(self, image_BHW3: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and probabilities."""
        h, w = self.grid
        P = self.patch
        patches = image_BHW3.float().view(-1, h, P, w, P * 3).transpose(2, 3).reshape(-1, h * w, P * P * 3)
        x_BND = self.trunk(self.embed(patches).to(self.dtype))
        logits: Tensor = self.head(self.fc_norm(x_BND.mean(dim=1))).float()
        return logits, logits.softmax(dim=-1)
