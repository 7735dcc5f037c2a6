"""The model rewritten for inference: what `NormalizedModel` computes, in operators that suit a runtime.

Shape suffixes are those of training/attention.py; P is the patch size and T = B·N the tokens of a batch. Outside
attention all tokens of a batch are the rows of one matrix, so that a matrix product and its bias are one `Gemm`.

- Pixel normalisation is folded into the patch embedding, and the embedding's bias into the position embedding.
- In the compressed variants all heads attend to the latents themselves where that is less work: the projections to keys
  and values are folded into the products before and after attention. Otherwise one product computes keys and values.
- L-SRA's gate is one more column of the latent projection, and its pooling one batched product; an incomplete last
  block is pooled by itself, as ONNX Runtime has no CUDA kernel for `Pad` at opset 23.
- A class token is kept out of the pooling, and alone goes through the last norm and the head.
- The MLP can be split along its hidden layer and the parts summed: the same arithmetic with a smaller intermediate.
- Attention is the standard operator on 4-D tensors where the opset has it, else its decomposition with the scale
  folded into the queries. TensorRT supports neither the operator on 3-D tensors nor uint8 in Reshape and Transpose.

`stridevit export profile --forms unshaped,shaped` compares this form with the one torch's exporter writes by itself.
"""

import copy

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from training.attention import CompressedAttention, ConvolutionalSRA, LocalSRA
from training.models import NormalizedModel, StrideViT

MLP_PARTS = 2
"""Parts of the MLP in fp32. int8 has one, since quantisation skips a product that adds to another one; so has fp16,
since one large product is faster on a GPU at small batches."""


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
        """The matrix product of a linear layer."""
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"{type(layer).__name__} is not a linear layer")
        return cls(layer.weight.t(), layer.bias)

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """(T, in) -> (T, out); `plus` (T, out) replaces the bias."""
        return torch.addmm(self.bias if plus is None else plus, x, self.weight)


class _Attend(nn.Module):
    """Scaled dot-product attention and the output projection."""

    def __init__(self, heads: int, tokens: int, projection: nn.Linear, *, operator: bool) -> None:
        super().__init__()
        self.heads, self.tokens, self.operator = heads, tokens, operator
        self.projection = _Product.of(projection)

    def forward(self, q_TD: Tensor, k_BMD: Tensor, v_BMD: Tensor) -> Tensor:
        D = q_TD.shape[-1]
        q_BHNd = self._by_head(q_TD.view(-1, self.tokens, D))
        k_BHMd, v_BHMd = self._by_head(k_BMD), self._by_head(v_BMD)
        y_BHNd = _attention(q_BHNd, k_BHMd, v_BHMd, operator=self.operator)
        y_TD: Tensor = self.projection(y_BHNd.transpose(1, 2).reshape(-1, D))
        return y_TD

    def _by_head(self, x_BMD: Tensor) -> Tensor:
        return x_BMD.view(-1, x_BMD.shape[1], self.heads, x_BMD.shape[2] // self.heads).transpose(1, 2)


def _attention(q_BHNd: Tensor, k_BHMd: Tensor, v_BHMd: Tensor, *, operator: bool) -> Tensor:
    """(B,H,N,d), by the standard operator, which scales the scores, or by its decomposition, which does not."""
    if operator:
        y_BHNd: Tensor = torch.onnx.ops.attention(q_BHNd, k_BHMd, v_BHMd)[0]
        return y_BHNd
    return (q_BHNd @ k_BHMd.transpose(-2, -1)).softmax(dim=-1) @ v_BHMd


class _MHA(nn.Module):
    """Multi-head attention with queries, keys and values in one product: (T,D) -> (T,D)."""

    def __init__(self, trained: Attention, tokens: int, *, operator: bool) -> None:
        super().__init__()
        self.tokens = tokens
        width = trained.proj.in_features
        scale = torch.ones(3 * width)
        if not operator:
            scale[:width] = trained.scale
        self.qkv = _Product(trained.qkv.weight.t() * scale, trained.qkv.bias * scale)
        self.attend = _Attend(trained.num_heads, tokens, trained.proj, operator=operator)

    def forward(self, x_TD: Tensor) -> Tensor:
        D = x_TD.shape[-1]
        q_TD, k_TD, v_TD = torch.split(self.qkv(x_TD), D, dim=-1)
        y_TD: Tensor = self.attend(q_TD, k_TD.view(-1, self.tokens, D), v_TD.view(-1, self.tokens, D))
        return y_TD


class _SRA(nn.Module):
    """Attention over pooled keys and values: (T,D) -> (T,D)."""

    def __init__(self, trained: CompressedAttention, tokens: int, *, operator: bool) -> None:
        super().__init__()
        scale = 1.0 if operator else (trained.q.out_features // trained.num_heads) ** -0.5
        self.q = _Product(trained.q.weight.t() * scale, trained.q.bias * scale)
        self.latents = _Latents(trained, tokens)
        self.kv = _Product.of(trained.kv)
        self.attend = _Attend(trained.num_heads, tokens, trained.proj, operator=operator)

    def forward(self, x_TD: Tensor) -> Tensor:
        c_BMr = self.latents(x_TD)
        M, r = c_BMr.shape[1:]
        k, v = torch.split(self.kv(c_BMr.reshape(-1, r)), x_TD.shape[-1], dim=-1)
        y_TD: Tensor = self.attend(self.q(x_TD), k.view(-1, M, k.shape[-1]), v.view(-1, M, v.shape[-1]))
        return y_TD


class _LatentSRA(nn.Module):
    """The same function with the latents themselves as the keys and values of all heads: (T,D) -> (T,D).

    The score of a head is (x·Wq + bq)·(c·Wk + bk)ᵀ. bk adds the same constant to all scores of a query, which does not
    change their softmax. The rest is x'·cᵀ with x' = x·(Wq·Wkᵀ) + bq·Wkᵀ, which has r columns instead of d.
    Likewise a weighted mean of c·Wv + bv, times Wo, is the weighted mean of c, times Wv·Wo, plus bv·Wo. DeepSeek-V2
    (arXiv:2405.04434) absorbs the projections of its latents in the same way. As all heads have the same keys and
    values, their queries are just more rows.
    """

    def __init__(self, trained: CompressedAttention, tokens: int, *, operator: bool) -> None:
        super().__init__()
        heads, operator_scale = trained.num_heads, trained.rank**-0.5 if operator else 1.0
        width, d = trained.q.in_features, trained.q.out_features // heads
        scale = d**-0.5 / operator_scale  # the operator scales by the head width that it sees
        q_HdD = trained.q.weight.double().view(heads, d, width)
        k_Hdr, v_Hdr = trained.kv.weight.double().view(2, heads, d, trained.rank)
        o_HdD = trained.proj.weight.double().t().reshape(heads, d, width)
        weight_DHr = torch.einsum("hdD,hdr->Dhr", q_HdD, k_Hdr) * scale
        bias_Hr = torch.einsum("hd,hdr->hr", trained.q.bias.double().view(heads, d), k_Hdr) * scale
        weight_HrD = torch.einsum("hdr,hdD->hrD", v_Hdr, o_HdD)
        value_bias = trained.kv.bias.double().view(2, heads, d)[1]
        bias_D = trained.proj.bias.double() + torch.einsum("hd,hdD->D", value_bias, o_HdD)
        self.heads, self.tokens, self.rank, self.operator = heads, tokens, trained.rank, operator
        self.q = _Product(weight_DHr.flatten(1), bias_Hr.flatten())
        self.latents = _Latents(trained, tokens)
        self.projection = _Product(weight_HrD.flatten(0, 1), bias_D)

    @staticmethod
    def pays(trained: CompressedAttention) -> bool:
        """Whether it certainly is less work: queries and weighted means have r·H columns instead of D."""
        return trained.num_heads * trained.rank < trained.q.out_features

    def forward(self, x_TD: Tensor) -> Tensor:
        c_B1Mr = self.latents(x_TD).unsqueeze(1)
        # Split into as many runs of consecutive rows as there are heads, which a runtime can compute in parallel.
        q_BHNr = self.q(x_TD).view(-1, self.heads, self.tokens, self.rank)
        # Matrix products broadcast over heads by themselves.
        c_BHMr = c_B1Mr.expand(-1, self.heads, -1, -1) if self.operator else c_B1Mr
        y_BHNr = _attention(q_BHNr, c_BHMr, c_BHMr, operator=self.operator)
        y_TD: Tensor = self.projection(y_BHNr.reshape(-1, self.heads * self.rank))
        return y_TD


class _Latents(nn.Module):
    """The pooled, normalised latents: (T,D) -> (B,M,r)."""

    def __init__(self, trained: CompressedAttention, tokens: int) -> None:
        super().__init__()
        self.tokens, self.prefix, self.rank = tokens, trained.prefix, trained.rank
        if isinstance(trained, LocalSRA):
            self.product = _latent_with_gate(trained)
            self.pool: nn.Module = _LocalPool(trained)
        elif isinstance(trained, ConvolutionalSRA):
            self.product = _Product.of(trained.latent)
            self.pool = _ConvolutionalPool(trained)
        else:
            raise TypeError(f"no inference form of {type(trained).__name__}")
        self.norm = trained.norm

    def forward(self, x_TD: Tensor) -> Tensor:
        c_Tr = self.product(x_TD)
        c_BNr = c_Tr.view(-1, self.tokens, c_Tr.shape[-1])
        if self.prefix:
            class_BPr, patch_BNr = torch.split(c_BNr, [self.prefix, self.tokens - self.prefix], dim=1)
            c_BMr = torch.cat([class_BPr[..., : self.rank], self.pool(patch_BNr)], dim=1)
        else:
            c_BMr = self.pool(c_BNr)
        normed_BMr: Tensor = self.norm(c_BMr)
        return normed_BMr


class _ConvolutionalPool(nn.Module):
    """C-SRA's `reduce`: (B,N,r) -> (B,M,r)."""

    def __init__(self, trained: ConvolutionalSRA) -> None:
        super().__init__()
        self.conv, self.grid = trained.conv, trained.grid

    def forward(self, c_BNr: Tensor) -> Tensor:
        c_BrN = c_BNr.transpose(1, 2)
        pooled_Brhw: Tensor = self.conv(c_BrN.reshape(-1, c_BrN.shape[1], *self.grid))
        return pooled_Brhw.flatten(2).transpose(1, 2)


class _LocalPool(nn.Module):
    """L-SRA's `reduce`: (B,N,r+1) -> (B,M,r). The last column is the gate logit."""

    gate_bias: Tensor

    def __init__(self, trained: LocalSRA) -> None:
        super().__init__()
        self.register_buffer("gate_bias", trained.gate_bias.detach().clone())
        tokens = trained.grid[0] * trained.grid[1]
        self.rank, self.block = trained.rank, trained.reduction
        self.rest = tokens % self.block
        self.whole = tokens - self.rest

    def forward(self, c_BNr: Tensor) -> Tensor:
        if not self.rest:
            return self._blocks(c_BNr, self.block)
        whole_BNr, rest_BNr = torch.split(c_BNr, [self.whole, self.rest], dim=1)
        rest_B1r = self._blocks(rest_BNr, self.rest)
        return torch.cat([self._blocks(whole_BNr, self.block), rest_B1r], dim=1) if self.whole else rest_B1r

    def _blocks(self, c_BNr: Tensor, size: int) -> Tensor:
        """Pool every `size` tokens to one, weighted by the float32 softmax of their gate logits."""
        _, N, columns = c_BNr.shape
        c_BMRr, logit_BMR1 = torch.split(c_BNr.view(-1, N // size, size, columns), [self.rank, 1], dim=-1)
        logit_BM1R = logit_BMR1.transpose(-2, -1) + self.gate_bias[:size]
        weight_BM1R = logit_BM1R.float().softmax(dim=-1).to(c_BNr.dtype)
        return (weight_BM1R @ c_BMRr).squeeze(2)


def _latent_with_gate(trained: LocalSRA) -> _Product:
    """(T,D) -> (T,r+1): the latent, and each token's gate logit without the bias of its position in the block."""
    weight_Dr, bias_r, gate_r = trained.latent.weight.t(), trained.latent.bias, trained.gate_weight
    return _Product(
        torch.cat([weight_Dr, (weight_Dr @ gate_r).unsqueeze(1)], dim=1),
        torch.cat([bias_r, (bias_r @ gate_r).unsqueeze(0)]),
    )


class _MLP(nn.Module):
    """The MLP, split along its hidden layer into `parts`: (T,D) -> (T,D)."""

    def __init__(self, trained: Mlp, parts: int) -> None:
        super().__init__()
        into, out = _Product.of(trained.fc1), _Product.of(trained.fc2)
        self.into = nn.ModuleList(map(_Product, into.weight.chunk(parts, dim=1), into.bias.chunk(parts)))
        # Only the first part adds the bias; the others add to its sum.
        self.out = nn.ModuleList(_Product(rows, out.bias) for rows in out.weight.chunk(parts))

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.out[0](F.gelu(self.into[0](x_TD)))
        for into, out in zip(self.into[1:], self.out[1:], strict=True):
            y_TD = out(F.gelu(into(x_TD)), plus=y_TD)
        return y_TD


class _Block(nn.Module):
    """One transformer block in evaluation mode, without drop-path and dropout: (T,D) -> (T,D)."""

    def __init__(self, trained: nn.Module, tokens: int, *, operator: bool, mlp_parts: int) -> None:
        super().__init__()
        if not isinstance(trained, Block) or not isinstance(trained.mlp, Mlp):
            raise TypeError(f"no inference form of {trained}")
        self.norm1, self.norm2 = trained.norm1, trained.norm2
        match trained.attn:
            case CompressedAttention():
                form = _LatentSRA if _LatentSRA.pays(trained.attn) else _SRA
                self.attention: nn.Module = form(trained.attn, tokens, operator=operator)
            case Attention():
                self.attention = _MHA(trained.attn, tokens, operator=operator)
            case other:
                raise TypeError(f"no inference form of {other}")
        self.mlp = _MLP(trained.mlp, mlp_parts)

    def forward(self, x_TD: Tensor) -> Tensor:
        x_TD = x_TD + self.attention(self.norm1(x_TD))
        y_TD: Tensor = x_TD + self.mlp(self.norm2(x_TD))
        return y_TD


class InferenceModel(nn.Module):
    """uint8 images (B,H,W,3) -> logits and probabilities, float32 (B,classes).

    `operator` uses the standard `Attention` operator. With `half`, weights and activations between the patch embedding
    and the head are float16; the patch embedding, L-SRA's softmax and the probabilities stay float32, and the ONNX
    standard makes `LayerNormalization` compute in float32.
    """

    embedding: Tensor
    positions_ND: Tensor

    def __init__(self, classifier: NormalizedModel, *, operator: bool, half: bool, mlp_parts: int) -> None:
        super().__init__()
        # A copy, since the modules reused from the trained model may be converted to float16.
        model = copy.deepcopy(classifier.model)
        if not isinstance(model, StrideViT):
            raise TypeError(f"no inference form of a {type(model).__name__}")
        weight_D3PP = model.get_parameter("patch_embed.proj.weight").double()
        mean, std = classifier.mean.double(), classifier.std.double()
        bias_D = model.get_parameter("patch_embed.proj.bias").double() - (weight_D3PP * (mean / std)).sum(dim=(1, 2, 3))
        self.register_buffer("embedding", (weight_D3PP / std).permute(2, 3, 1, 0).flatten(0, 2).float().detach())
        positions_ND = getattr(model, "pos_embed")[0].detach().double()  # noqa: B009 (a weight or a buffer)
        self.class_tokens = model.spec.class_tokens
        positions_ND[self.class_tokens :] += bias_D
        if self.class_tokens:
            positions_ND[0] += model.get_parameter("cls_token")[0, 0]
        self.register_buffer("positions_ND", positions_ND.float().detach())
        self.patch, self.grid = model.spec.patch_size, model.spec.grid
        self.dtype = torch.float16 if half else torch.float32
        tokens = len(self.positions_ND)
        blocks = (_Block(block, tokens, operator=operator, mlp_parts=mlp_parts) for block in model.blocks)
        self.trunk = nn.Sequential(*blocks).to(self.dtype)
        norm = model.norm if self.class_tokens else model.fc_norm
        self.fc_norm, self.head = norm.to(self.dtype), model.head.to(self.dtype)

    def forward(self, image_BHW3: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and probabilities."""
        h, w = self.grid
        P, (N, D) = self.patch, self.positions_ND.shape
        patches = image_BHW3.float().view(-1, h, P, w, P * 3).transpose(2, 3).reshape(-1, h * w, P * P * 3)
        x_BND = patches @ self.embedding
        if self.class_tokens:
            # A row of zeros for each image, without an operator on shapes.
            x_BND = torch.cat([x_BND[:, :1] * 0, x_BND], dim=1)
        x_BND = x_BND + self.positions_ND
        x_BND = self.trunk(x_BND.to(self.dtype).reshape(-1, D)).view(-1, N, D)
        pooled_BD = torch.split(x_BND, [1, N - 1], dim=1)[0].squeeze(1) if self.class_tokens else x_BND.mean(dim=1)
        logits: Tensor = self.head(self.fc_norm(pooled_BD)).float()
        return logits, logits.softmax(dim=-1)
