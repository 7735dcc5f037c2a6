"""Trained weights to start from: of a finished run, of a file, or of a timm model.

    runs/x                     a finished run of ours
    model.safetensors          weights under timm's names, as timm saves them and the Hugging Face hub holds them
    timm:vit_small_patch16_224 the model of that name with its published weights, from the hub or its local cache

Nothing is unpickled: a file in another format than safetensors is refused.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from timm.data import resolve_model_data_config
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from training.models import PRESETS, Architecture, NormalizedModel, Preset, StrideViT, resized_positions
from training.recipes import Recipe
from training.runs import Preprocessing, load_final

TIMM = "timm:"


class SourceError(Exception):
    """The weights cannot be read or do not fit; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """Trained weights, and what is known about the model that they belong to."""

    name: str
    weights: dict[str, Tensor]
    sha256: str
    architecture: Architecture | None = None
    """None for a bare file."""
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] = ()
    """Empty if the source does not name its classes."""

    @property
    def identity(self) -> dict[str, str]:
        """What a resumed run must share with the first one."""
        return {"name": self.name, "sha256": self.sha256}

    def classifier(self) -> NormalizedModel:
        """The trained model, in evaluation mode. Raises SourceError for a bare file."""
        if self.architecture is None or self.preprocessing is None:
            raise SourceError(f"{self.name} holds weights without an architecture: name a run or timm:NAME")
        model = StrideViT(self.architecture)
        model.load_state_dict(self.weights)
        return NormalizedModel(model, mean=self.preprocessing.mean, std=self.preprocessing.std).eval()


def open_source(name: str, weights: Path | None = None) -> Source:
    """Read the weights that `name` stands for (see the module); `weights` replaces those that timm would fetch.

    Raises SourceError, or RunError for a run that is not finished.
    """
    if name.startswith(TIMM):
        return _from_timm(name.removeprefix(TIMM), weights)
    if weights is not None:
        raise SourceError(f"a file of weights goes with timm:NAME, not with {name}")
    path = Path(name)
    if path.is_file():
        state = read_weights(path)
        return Source(name=name, weights=state, sha256=_digest(state))
    if not path.is_dir():
        raise SourceError(f"{name} is no run, no file and does not begin with {TIMM}")
    classifier, card = load_final(path)
    return Source(
        name=name,
        weights=classifier.model.state_dict(),
        sha256=card.weights_sha256,
        architecture=card.architecture,
        preprocessing=card.preprocessing,
        labels=card.labels,
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises SourceError."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise SourceError(
            f"{path} is not a safetensors file ({error}): other formats may run code when they are read; convert it "
            "with safetensors.torch.save_file where you trust it"
        ) from error


def timm_model(name: str, weights: Path | None = None, *, pretrained: bool = True) -> nn.Module:
    """The model that timm calls `name`, in evaluation mode, with its published weights or those in a safetensors file.

    Its weights are random with neither `weights` nor `pretrained`. Raises SourceError for an unknown name, weights that
    cannot be fetched, and weights that do not fit.
    """
    state = read_weights(weights) if weights is not None else None
    known: dict[str, Any] = {}
    if name.startswith("local-dir:"):
        raise SourceError(f"timm:{name} would read a folder by itself: name its file with --weights FILE.safetensors")
    if state is not None and (head := _head(name, state)) is not None:
        known["num_classes"] = len(head)
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained and state is None, **known)
    except RuntimeError as error:
        raise SourceError(_timm_failure(name, error)) from error
    except Exception as error:  # the hub's client raises many kinds, from several packages
        raise SourceError(
            f"the weights of timm:{name} cannot be fetched ({_first_line(error)}): check the connection, or download "
            "model.safetensors yourself and name it with --weights"
        ) from error
    if state is not None:
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise SourceError(f"{weights} does not fit timm:{name} ({reason})") from error
    return model.eval()


def timm_preprocessing(model: nn.Module) -> Preprocessing:
    """What timm does to an image before this model. Raises SourceError if our preprocessing cannot do the same."""
    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    _, height, width = config["input_size"]
    if height != width:
        raise SourceError(f"the model takes images of {width} × {height}, but only square ones are prepared")
    if config["interpolation"] not in ("bicubic", "bilinear"):
        raise SourceError(f"the model wants images resized by {config['interpolation']}, not bicubic or bilinear")
    if (mode := config.get("crop_mode", "center")) != "center":
        raise SourceError(f"the model wants the crop mode {mode!r}, but the service takes the centre of an image")
    if len(config["mean"]) != 3:
        raise SourceError(f"the model takes {len(config['mean'])} channels, not 3")
    # timm floors the size before the crop, as transforms_imagenet_eval does.
    return Preprocessing(
        resize=int(height / config["crop_pct"]),
        crop=height,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
    )


def as_architecture(model: nn.Module, name: str) -> Architecture:
    """The architecture of a timm model that is a plain Vision Transformer. Raises SourceError for any other."""
    if foreign := _foreign_parts(model):
        raise SourceError(f"timm:{name} is not a Vision Transformer of our kind: it has {foreign}")
    assert isinstance(model, VisionTransformer)  # noqa: S101 (for mypy: _foreign_parts has checked it)
    block: Any = model.blocks[0]
    size = model.patch_embed.img_size
    sizes = {
        "patch_size": model.patch_embed.patch_size[0],
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / model.embed_dim,
    }
    return Architecture(
        preset=_preset(sizes) or name,
        variant="mha",
        img_size=size[0] if size[0] == size[1] else size,
        rank=_rank(sizes, model.embed_dim),
        num_classes=model.num_classes,
        positions="learned",
        pool="token" if model.has_class_token else "avg",
        **sizes,
    )


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Names of weights: taken from the source (as they are, or fitted), newly initialised, and left in the source."""

    taken: tuple[str, ...]
    fitted: tuple[str, ...]
    made: tuple[str, ...]
    left: tuple[str, ...]

    def lines(self) -> list[str]:
        """What to tell the user."""
        parts = {"taken": self.taken, "fitted": self.fitted, "made anew": self.made, "left": self.left}
        return [f"weights {part} ({len(names)}): {_listed(names)}" for part, names in parts.items() if names]


def adapted(recipe: Recipe, source: Source, given: Collection[str]) -> Recipe:
    """`recipe` for a run that starts from `source`: with its sizes and preprocessing, except for the keys in `given`.

    For a bare file, only the kind of positions is known, and whether there is a class token.
    """
    spec, prepared = source.architecture, source.preprocessing
    known: dict[str, Any] = {
        "positions": "learned" if "pos_embed" in source.weights else "sincos",
        "pool": "token" if "cls_token" in source.weights else "avg",
    }
    if spec is not None:
        known |= {"preset": spec.preset, "img_size": spec.img_size, "positions": spec.positions, "pool": spec.pool}
    if prepared is not None:
        known["crop_pct"] = prepared.crop / prepared.resize
    values = recipe.model_dump() | {name: value for name, value in known.items() if name not in given}
    return Recipe.model_validate(values)


def take(model: StrideViT, source: Source, labels: tuple[str, ...] = ()) -> Taken:
    """Copy every weight of equal name and shape into `model`, and adapt those that differ only in size.

    Learned positions are resized to the model's grid; a class token's position goes with the class token; the norm
    before the head counts as the same weight, although its name differs before and after pooling; a head for other
    classes, by number or by `labels`, is newly initialised.
    Raises SourceError if no block takes anything.
    """
    own, given = model.state_dict(), dict(source.weights)
    norm, other = ("norm", "fc_norm") if model.spec.class_tokens else ("fc_norm", "norm")
    renamed = {f"{other}.{part}": f"{norm}.{part}" for part in ("weight", "bias")}
    given = {renamed.get(name, name): tensor for name, tensor in given.items()}
    other_classes = bool(labels and source.labels and labels != source.labels)
    chosen: dict[str, Tensor] = {}
    fitted = []
    for name, tensor in own.items():
        if name not in given or (other_classes and name.startswith("head.")):
            continue
        if name == "pos_embed" and given[name].shape != tensor.shape:
            try:
                chosen[name] = resized_positions(given[name], model.spec, class_token="cls_token" in given)
            except ValueError as error:
                raise SourceError(f"{source.name}: {error}: models with more tokens are not supported") from error
            fitted.append(name)
        elif given[name].shape == tensor.shape:
            chosen[name] = given[name]
    if not any(name.startswith("blocks.") for name in chosen):
        raise SourceError(
            f"no block of {source.name} fits {model.spec.preset} ({model.spec.variant}): choose the preset of its size"
        )
    model.load_state_dict({**own, **chosen})
    return Taken(
        taken=tuple(name for name in chosen if name not in fitted),
        fitted=tuple(fitted),
        made=tuple(name for name in own if name not in chosen),
        left=tuple(name for name in given if name not in chosen),
    )


def as_stridevit(model: nn.Module, name: str) -> StrideViT:
    """Convert a timm model to ours, with equal outputs. Raises SourceError if it is no plain Vision Transformer."""
    ours = StrideViT(as_architecture(model, name))
    state = model.state_dict()
    if "cls_token" in state and state["pos_embed"].shape[1] == ours.spec.tokens - 1:
        # timm's no_embed_class: the class token has no position.
        state["pos_embed"] = torch.nn.functional.pad(state["pos_embed"], (0, 0, 1, 0))
    try:
        ours.load_state_dict(state)
    except RuntimeError as error:
        raise SourceError(f"timm:{name} has other weights than a Vision Transformer of ours") from error
    return ours.eval()


def _from_timm(name: str, weights: Path | None) -> Source:
    model = timm_model(name, weights)
    ours = as_stridevit(model, name)
    state = ours.state_dict()
    return Source(
        name=f"{TIMM}{name}",
        weights=state,
        sha256=_digest(state),
        architecture=ours.spec,
        preprocessing=timm_preprocessing(model),
    )


def _foreign_parts(model: nn.Module) -> str:
    """What keeps `model` from being a StrideViT with multi-head attention; empty if nothing does."""
    if type(model) is not VisionTransformer:
        return f"the class {type(model).__name__}"
    block: Any = model.blocks[0]
    if type(block) is not Block:
        return f"blocks of the class {type(block).__name__}"
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    pools = {"token": True, "avg": False}
    own_modules = {
        "patch_embed",
        "pos_drop",
        "patch_drop",
        "norm_pre",
        "blocks",
        "norm",
        "fc_norm",
        "head_drop",
        "head",
    }
    problems = {
        f"the pooling {model.global_pool} {'with' if model.has_class_token else 'without'} a class token": pools.get(
            model.global_pool
        )
        is not model.has_class_token,
        "register tokens": model.num_reg_tokens,
        "no learned positions": model.pos_embed is None,
        "a norm before the blocks": not isinstance(model.norm_pre, nn.Identity),
        "layer scale": not isinstance(block.ls1, nn.Identity),
        "normalised queries and keys": type(block.attn) is not Attention
        or not isinstance(block.attn.q_norm, nn.Identity),
        "queries without bias": type(block.attn) is Attention and block.attn.qkv.bias is None,
        "an MLP with another activation than GELU": getattr(getattr(block.mlp, "act", None), "approximate", None)
        != "none",
        "norms with another epsilon": any(norm.eps != _EPSILON for norm in norms),
        "the last norm at another place": isinstance(model.fc_norm, nn.Identity) is not model.has_class_token,
        "no linear head": not isinstance(model.head, nn.Linear),
        "patches that are not square": len(set(model.patch_embed.patch_size)) != 1,
        "other modules": any(name not in own_modules for name, _ in model.named_children()),
    }
    return ", ".join(problem for problem, found in problems.items() if found)


_EPSILON = 1e-6
"""Epsilon of the norms in timm's Vision Transformer."""


def _preset(sizes: Mapping[str, Any]) -> str | None:
    return next((name for name, preset in PRESETS.items() if sizes.items() <= preset._asdict().items()), None)


def _rank(sizes: Mapping[str, Any], width: int) -> int:
    """The preset's rank, else a twenty-fourth of the width, rounded down to a multiple of 8, as in `vit-s16`."""
    name = _preset(sizes)
    preset: Preset | None = PRESETS[name] if name else None
    return preset.rank if preset else max(8, width // 24 // 8 * 8)


def _digest(state: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(save({name: state[name].contiguous() for name in sorted(state)})).hexdigest()


def _head(name: str, state: Mapping[str, Tensor]) -> Tensor | None:
    """The weight of the classifier, under the name that timm knows for this model."""
    config = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    names = config.classifier if config else None
    first = names if isinstance(names, str) else names[0] if names else "head"
    return state.get(f"{first}.weight")


def _timm_failure(name: str, error: Exception) -> str:
    close = timm.list_models(f"*{name.partition('.')[0]}*")[:3]
    hint = f": did you mean {', '.join(close)}?" if close else ": `timm.list_models()` lists the names"
    return f"timm has no model {name!r} ({_first_line(error)}){hint}"


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def _listed(names: tuple[str, ...], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
