"""Compressed attention fitted to trained multi-head attention, so that little training remains.

Per block, from the teacher's inputs X to attention on some train images (docs/retrofit.md has the derivation):

    queries, everything outside attention: the teacher's weights as they are
    Wc   the r-2 directions of X that carry most of [X·Wk, X·Wv], by singular values, each scaled to variance 1
    conv / gate: the mean of a window (C-SRA: or its centre), the mean of a block (L-SRA)
    Wk', Wv'  least squares from LayerNorm(reduce(X·Wc)) to the keys and values pooled over the same window
    Wo'  least squares from the student's weighted values to what the teacher's attention adds

LayerNorm subtracts the mean over the r channels and divides by their deviation. So the directions are spread over the
channels by an orthonormal matrix whose columns sum to zero, which leaves the mean at zero; and a constant part keeps
the deviation from depending much on the token.

Shape suffixes are those of training/attention.py; k counts directions. All of it is computed on the CPU.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from timm.layers import Attention
from torch import Tensor, nn

from training.attention import CompressedAttention, ConvolutionalSRA
from training.augment import evaluation_batches
from training.data import Images
from training.initial import Source, SourceError, Taken, take
from training.models import NormalizedModel, StrideViT
from training.recipes import Fit
from training.runs import Preprocessing

_BATCH = 128
_RIDGE = 1e-4
"""Added to the diagonal of each normal equation, as a share of its mean."""


def retrofit(
    student: StrideViT, source: Source, teacher: NormalizedModel, fit: Fit, images: Images, preprocessing: Preprocessing
) -> Taken:
    """Give `student` the weights of `source`, and fit its attention to that of `teacher` on train images.

    Raises SourceError if the two differ in more than attention, or if the rank leaves no direction.
    """
    _check_equal_outside_attention(student, source)
    taken = take(student, source)
    if fit.start == "seed":
        return taken
    fitted = _fit_blocks(student, teacher.model, _tokens(teacher, images, fit, preprocessing), fit)
    return Taken(
        taken=tuple(name for name in taken.taken if name not in fitted),
        fitted=(*taken.fitted, *fitted),
        made=tuple(name for name in taken.made if name not in fitted),
        left=tuple(name for name in taken.left if "attn.qkv" not in name),
    )


@torch.no_grad()
def _fit_blocks(student: StrideViT, teacher: nn.Module, h_BND: Tensor, fit: Fit) -> list[str]:
    """Fit block after block; returns the names of the fitted weights.

    Each block gets the output of the student's own earlier blocks, and is fitted to the output of the teacher's block.
    """
    fitted = []
    was_training = student.training
    student.eval()
    own_BND = h_BND
    blocks: Any = zip(student.blocks, teacher.blocks, strict=True)  # type: ignore[arg-type]
    for number, (own, other) in enumerate(blocks):
        if isinstance(own.attn, CompressedAttention):
            own_input_BND, input_BND = _batched(own.norm1, own_BND), _batched(other.norm1, h_BND)
            fit_attention(own.attn, other.attn, own_input_BND, input_BND, fit)
            if fit.output:
                _fit_output(own.attn, own_input_BND, h_BND + _batched(other.attn, input_BND) - own_BND)
            fitted += [f"blocks.{number}.attn.{name}" for name in own.attn.state_dict()]
        own_BND, h_BND = _batched(own, own_BND), _batched(other, h_BND)
    student.train(was_training)
    return fitted


@torch.no_grad()
def fit_attention(student: CompressedAttention, teacher: Attention, own_BND: Tensor, x_BND: Tensor, fit: Fit) -> None:
    """Set all weights of `student`: its keys and values for `own_BND` become `teacher`'s pooled ones for `x_BND`."""
    D = x_BND.shape[-1]
    weight_3DD, bias_3D = teacher.qkv.weight.double(), teacher.qkv.bias.double()
    student.q.weight.copy_(weight_3DD[:D])
    student.q.bias.copy_(bias_3D[:D])
    student.proj.load_state_dict(teacher.proj.state_dict())
    _fit_latent(student, weight_3DD[D:].t(), own_BND, fit)
    _set_pooling(student, fit)
    nn.init.ones_(student.norm.get_parameter("weight"))
    nn.init.zeros_(student.norm.get_parameter("bias"))
    c_BMr = _batched(student.latents, own_BND).double()
    # Pool before projecting: the two commute.
    pooled_BM2D = (_pooling(student, fit) @ x_BND.double()) @ weight_3DD[D:].t() + bias_3D[D:]
    weight_r2D, bias_2D = _least_squares(c_BMr.flatten(0, 1), pooled_BM2D.flatten(0, 1))
    student.kv.weight.copy_(weight_r2D.t())
    student.kv.bias.copy_(bias_2D)


def _fit_output(student: CompressedAttention, own_BND: Tensor, wanted_BND: Tensor) -> None:
    """Set the output projection so that attention adds `wanted_BND` to the tokens."""
    before: list[Tensor] = []
    hook = student.proj.register_forward_hook(lambda _, inputs, __: before.append(inputs[0]))
    try:
        _batched(student, own_BND)
    finally:
        hook.remove()
    y_TD = torch.cat(before).double().flatten(0, 1)
    weight_DD, bias_D = _least_squares(y_TD, wanted_BND.double().flatten(0, 1))
    student.proj.weight.copy_(weight_DD.t())
    student.proj.bias.copy_(bias_D)


def _batched(layer: Callable[[Tensor], Tensor], x_BND: Tensor) -> Tensor:
    return torch.cat([layer(part) for part in torch.split(x_BND, _BATCH)])


def _fit_latent(student: CompressedAttention, weight_D2D: Tensor, x_BND: Tensor, fit: Fit) -> None:
    """Wc and its bias: r-2 whitened directions, and a constant part that is orthogonal to them and of mean zero."""
    D, r = weight_D2D.shape[0], student.rank
    constant = fit.constant > 0
    directions = min(D, r - 1 - constant)
    if directions < 1:
        raise SourceError(f"rank {r} leaves no room for keys and values: use --set rank={max(4, D // 24)}")
    x_TD = x_BND.double().flatten(0, 1)
    mean_D = x_TD.mean(dim=0)
    covariance_DD = torch.cov(x_TD.t())
    if fit.start == "weights":
        covariance_DD = torch.eye(D, dtype=torch.float64) * covariance_DD.diagonal().mean()
    variance_D, axes_DD = torch.linalg.eigh(covariance_DD)
    deviation_D = variance_D.clamp(min=variance_D.max() * 1e-8).sqrt()
    root_DD = axes_DD * deviation_D  # covariance = root @ root.T
    left_Dk = torch.linalg.svd(root_DD.t() @ weight_D2D, full_matrices=False)[0]
    directions_Dk = (axes_DD / deviation_D) @ left_Dk[:, :directions]
    spread_rr = _zero_sum_basis(r)
    latent_Dr = directions_Dk @ spread_rr[:, :directions].t()
    bias_r = -(mean_D @ latent_Dr)
    if constant:
        bias_r += fit.constant * directions**0.5 * spread_rr[:, -1]
    student.latent.weight.copy_(latent_Dr.t())
    student.latent.bias.copy_(bias_r)


def _set_pooling(student: CompressedAttention, fit: Fit) -> None:
    if isinstance(student, ConvolutionalSRA):
        student.conv.weight.copy_(_kernel(fit.kernel).expand_as(student.conv.weight))
        student.conv.bias.zero_()  # type: ignore[union-attr]
        return
    for name in ("gate_weight", "gate_bias"):
        student.get_parameter(name).zero_()


def _kernel(name: str) -> Tensor:
    """(3,3), summing to 1."""
    kernel = torch.zeros(3, 3)
    # A window of stride 2 begins one patch before its block: the block is its last two rows and columns.
    window = {"mean": slice(None), "block": slice(1, None), "centre": slice(1, 2)}[name]
    kernel[window, window] = 1.0
    return kernel / kernel.sum()


def _pooling(student: CompressedAttention, fit: Fit) -> Tensor:
    """(M,N): weights of the mean that `reduce` takes for each pooled token, without padding; class tokens are kept."""
    h, w = student.grid
    if isinstance(student, ConvolutionalSRA):
        places = torch.eye(h * w, dtype=torch.float64).view(h * w, 1, h, w)
        kernel = _kernel(fit.kernel).double()[None, None]
        share_MN = F.conv2d(places, kernel, stride=student.reduction, padding=1).flatten(1).t()
    else:
        R = student.reduction
        share_MN = (torch.arange(h * w) // R == torch.arange(-(-h * w // R))[:, None]).double()
    class_MN = torch.eye(student.prefix, dtype=torch.float64)
    mean_MN: Tensor = torch.block_diag(class_MN, share_MN / share_MN.sum(dim=1, keepdim=True))  # type: ignore[no-untyped-call]
    return mean_MN


def _least_squares(x_TD: Tensor, y_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (D,E) and bias (E,) that minimise |x·weight + bias − y|², slightly damped."""
    x_mean, y_mean = x_TD.mean(dim=0), y_TE.mean(dim=0)
    x_TD = x_TD - x_mean
    gram_DD = x_TD.t() @ x_TD
    gram_DD += _RIDGE * gram_DD.diagonal().mean() * torch.eye(len(gram_DD), dtype=gram_DD.dtype)
    weight_DE = torch.linalg.solve(gram_DD, x_TD.t() @ (y_TE - y_mean))
    return weight_DE, y_mean - x_mean @ weight_DE


def _zero_sum_basis(r: int) -> Tensor:
    """(r, r-1) with orthonormal columns, each of which sums to zero: the Helmert matrix."""
    columns = torch.zeros(r, r - 1, dtype=torch.float64)
    for k in range(1, r):
        columns[:k, k - 1] = 1.0
        columns[k, k - 1] = -k
        columns[:, k - 1] /= (k * (k + 1)) ** 0.5
    return columns


@torch.no_grad()
def _tokens(teacher: NormalizedModel, images: Images, fit: Fit, preprocessing: Preprocessing) -> Tensor:
    """The inputs of `teacher`'s first block for some of `images`: (n,N,D)."""
    rows = _spread(len(images), fit.images)
    seen: list[Tensor] = []
    hook = teacher.model.blocks[0].register_forward_pre_hook(  # type: ignore[index,union-attr]
        lambda _, inputs: seen.append(inputs[0])
    )
    batches = evaluation_batches(
        images.take(rows),
        resize=preprocessing.resize,
        crop=preprocessing.crop,
        interpolation=preprocessing.interpolation,
        batch_size=_BATCH,
    )
    try:
        for batch, _ in batches:
            teacher(batch)
    finally:
        hook.remove()
    return torch.cat(seen)


def _spread(available: int, wanted: int) -> npt.NDArray[np.int64]:
    """Rows of `wanted` images, spread evenly over all available ones, as class folders are sorted by class."""
    return np.unique(np.linspace(0, available - 1, min(wanted, available)).round().astype(np.int64))


def _check_equal_outside_attention(student: StrideViT, source: Source) -> None:
    spec, own = source.architecture, student.spec
    if spec is None or spec.variant != "mha":
        raise SourceError(f"{source.name} is no trained multi-head attention: name an `mha` run or timm:NAME")
    wanted = spec.model_copy(update={"variant": own.variant, "rank": own.rank, "preset": own.preset})
    if wanted != own:
        differing = [name for name, value in own if getattr(wanted, name) != value]
        raise SourceError(f"{source.name} differs from the student in {', '.join(differing)}")
