"""Checks the shares in the settings against the models that were loaded, before anything is served."""

from collections.abc import Sequence
from dataclasses import replace

import structlog

from service.errors import NotReady, StartupError, UnknownModel
from service.models.model import Model
from service.models.registry import Registry
from service.rollouts.split import Split

log = structlog.get_logger()


def settled(splits: Sequence[Split], registry: Registry) -> list[Split]:
    """The same splits, each with its primary, after all models are loaded. Raises StartupError.

    A candidate that exists but cannot be loaded does not prevent the start: its share waits for it.
    """
    found: list[Split] = []
    for split in splits:
        settled_one = _settled(split, registry)
        if any((other.kind, other.primary) == (split.kind, settled_one.primary) for other in found):
            raise StartupError(f"{split.kind}: {settled_one.primary!r} has two candidates: give it one at a time")
        found.append(settled_one)
    return found


def _settled(split: Split, registry: Registry) -> Split:
    where = f"{split.kind} {split.title!r}"
    candidate = _candidate(split, registry, where)
    if split.primary is None:
        if candidate is None:
            raise StartupError(
                f"{where} cannot be loaded, so its family is unknown: see the log above, or write "
                f"PRIMARY:{split.title}=SHARE to serve without it meanwhile"
            )
        split = replace(split, primary=candidate.manifest.family)
        if split.primary not in registry.families:
            raise StartupError(
                f"{where}: no family {split.primary!r} serves, whose traffic it would share: write "
                f"PRIMARY:{split.title}=SHARE with the name of a model"
            )
    try:
        family, members = registry.candidates(split.primary)
    except (UnknownModel, NotReady) as error:
        raise StartupError(f"{where}: its primary: {error}") from None
    others = [model for model in members if model is not candidate]
    if not others:
        raise StartupError(
            f"{where}: the candidate is the primary itself, and no other model serves {split.primary!r}: name another "
            "model or version"
        )
    if candidate is not None and candidate.bundle.labels != others[0].bundle.labels:
        raise StartupError(
            f"{where} has other labels than {others[0].name!r}: their answers cannot be compared; name a candidate of "
            "the same labels"
        )
    if family is not None and split.version is None:
        registry.keep_apart(family.name, split.candidate)
    return split


def _candidate(split: Split, registry: Registry, where: str) -> Model | None:
    """The model, or None if it exists but cannot be loaded. Raises StartupError if there is none."""
    if candidate := registry.get(split.candidate, split.version):
        return candidate
    known = [e for e in registry.index if e.name == split.candidate and split.version in (None, e.version)]
    if not known:
        try:
            registry.find(split.candidate, split.version)
        except (UnknownModel, NotReady) as error:
            raise StartupError(f"{where}: {error}") from None
    log.warning("a candidate takes no traffic", rollout=where, reason=known[-1].reason or known[-1].state)
    return None
