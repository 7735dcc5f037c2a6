"""Sources for timm classifiers, so that a user's present model can be the baseline of a comparison."""

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from export.graph import ExportError
from export.sources import ExportSource, TorchSource, known_facts, with_data
from service.manifest import Preprocessing
from training.folder_recipe import slug
from training.initial import SourceError, as_stridevit, timm_model, timm_preprocessing
from training.models import NormalizedModel, count_parameters
from training.runs import git_commit

IMAGENET = "imagenet"


def timm_source(
    name: str,
    *,
    weights: Path | None = None,
    labels: tuple[str, ...] = (),
    data: str | None = None,
    family: str | None = None,
    random: bool = False,
) -> ExportSource:
    """The model that timm calls `name`, with its published weights, those in a safetensors file, or `random` ones.

    A plain Vision Transformer is rewritten for inference like our `mha`; anything else is traced as it is in timm.
    Without `labels`, they are ImageNet's. Raises SourceError or ExportError.
    """
    model = timm_model(name, weights, pretrained=not random)
    prepared = timm_preprocessing(model)
    names, synsets = (labels, ()) if labels else imagenet_labels(model, name)
    if len(names) != (classes := getattr(model, "num_classes", 0)):
        raise ExportError(
            f"timm:{name} has {classes} classes, but there are {len(names)} labels: name the right --labels"
        )
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    facts: dict[str, Any] = {"params": count_parameters(model), "macs": _count_macs(model, prepared.crop)}
    with contextlib.suppress(SourceError):
        model = as_stridevit(model, name)
        facts |= known_facts(model.spec, NormalizedModel(model, mean=prepared.mean, std=prepared.std))
    source = TorchSource(
        family=family or (slug(name, otherwise="model") if labels else IMAGENET),
        **facts | {"model": slug(name, otherwise="model"), "architecture": name.partition(".")[0]},
        preprocessing=Preprocessing.model_validate(prepared.model_dump()),
        labels=names,
        weights_sha256=hashlib.sha256(save(state)).hexdigest(),
        git_commit=git_commit(),
        random=random,
        classifier=NormalizedModel(model, mean=prepared.mean, std=prepared.std).eval(),
    )
    return with_data(source, data, synsets)


def imagenet_labels(model: nn.Module, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Descriptions and WordNet ids of the classes of an ImageNet model. Raises ExportError for any other model."""
    subset = infer_imagenet_subset(model)
    if subset is None:
        raise ExportError(f"the classes of timm:{name} are not ImageNet's: name a file of --labels, one per line")
    info = ImageNetInfo(subset)
    synsets = tuple(info.label_names())  # type: ignore[no-untyped-call]
    described = [info.index_to_description(index) for index in range(len(synsets))]
    # Two pairs of classes have the same description.
    unique = (
        text if described.count(text) == 1 else f"{text} ({synset})"
        for text, synset in zip(described, synsets, strict=True)
    )
    return tuple(unique), synsets


def _count_macs(model: nn.Module, side: int) -> int:
    """Multiply-accumulates for one image, matrix products and convolutions only."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, side, side))
    return int(counter.get_total_flops()) // 2
