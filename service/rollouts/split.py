"""Which traffic a rollout splits, and which images of it belong to the candidate's share.

    [PRIMARY:]CANDIDATE=SHARE        cifar100-csra-r2@6=5%, cifar100:cifar100-csra-r4=0.1

CANDIDATE is a model, or with `@` one version of it. PRIMARY is the model or the family whose traffic is split: requests
that name it, or that name no model if it is the default. If omitted, it is the candidate's model for a version, and the
candidate's family for a model. Requests that name a version are never split.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from service.manifest import NAME_PATTERN

Kind = Literal["shadow", "canary"]

MAX_ROLLOUTS = 4
"""Most rollouts of a kind: each has a line in the status, which is small."""

_FORM = "write [PRIMARY:]CANDIDATE[@VERSION]=SHARE, such as cifar100-csra-r2@6=5% or cifar100:cifar100-csra-r4=0.1"
_SPLIT = re.compile(rf"(?:({NAME_PATTERN}):)?({NAME_PATTERN})(?:@([0-9]{{1,9}}))?=([^=]+)")
_RANGE = 1 << 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A share of the traffic to one model or family, for a candidate."""

    kind: Kind
    candidate: str
    version: int | None
    """Of the candidate; None for the newest."""
    share: float
    """Above 0 and at most 1."""
    primary: str | None
    """None until the candidate's family is known."""

    @property
    def title(self) -> str:
        """The candidate as it is written."""
        return self.candidate if self.version is None else f"{self.candidate}@{self.version}"

    def takes(self, images: Iterable[bytes | npt.NDArray[np.uint8]]) -> bool:
        """Whether a request with these images, or an image alone, belongs to the share.

        It depends on the images only, so that a retry gets the same arm, in every process. What a small share takes, a
        larger one takes too.
        """
        if self.share >= 1:
            return True
        salt = f"{self.kind} {self.primary}:{self.title}".encode()
        digest = hashlib.blake2b(digest_size=8, key=hashlib.blake2b(salt, digest_size=16).digest())
        for image in images:
            digest.update(image if isinstance(image, bytes) else np.ascontiguousarray(image).data)
        return int.from_bytes(digest.digest(), "big") < self.share * _RANGE


def parse_split(kind: Kind, text: str) -> Split:
    """The split that a flag or a setting describes. Raises ValueError that names the fix."""
    found = _SPLIT.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not a share of a model's traffic: {_FORM}")
    primary, candidate, version, share = found.groups()
    number = None if version is None else int(version)
    if number == 0:
        raise ValueError(f"{text!r}: versions count from 1")
    if number is not None and primary is None:
        primary = candidate
    if number is None and primary == candidate:
        raise ValueError(
            f"{text!r}: the candidate is the primary itself: name another model, or a version as in {candidate}@2"
        )
    return Split(kind=kind, candidate=candidate, version=number, share=_share(text, share), primary=primary)


def parse_splits(kind: Kind, texts: Iterable[str]) -> tuple[Split, ...]:
    """All of one kind. Raises ValueError also for a candidate that is named twice, and for too many."""
    found = tuple(parse_split(kind, text) for text in texts)
    for split in found:
        if sum(other.title == split.title for other in found) > 1:
            raise ValueError(f"{split.title!r} is named twice: give each candidate one share")
    if len(found) > MAX_ROLLOUTS:
        raise ValueError(f"{len(found)} shares are given, and at most {MAX_ROLLOUTS} are allowed")
    return found


def _share(text: str, share: str) -> float:
    try:
        value = float(share[:-1]) / 100 if share.endswith("%") else float(share)
    except ValueError:
        raise ValueError(f"{text!r}: the share {share!r} is not a number: {_FORM}") from None
    if not 0 < value <= 1:
        raise ValueError(f"{text!r}: the share must be above 0 and at most 1 (100%)")
    return value
