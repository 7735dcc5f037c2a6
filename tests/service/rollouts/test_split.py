"""What the flags say, and which images belong to a share."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.rollouts.split import Split, parse_split, parse_splits


@pytest.mark.parametrize(
    ("text", "primary", "candidate", "version", "share"),
    [
        ("cifar100-csra-r2@6=5%", "cifar100-csra-r2", "cifar100-csra-r2", 6, 0.05),
        ("cifar100-csra-r4=0.1", None, "cifar100-csra-r4", None, 0.1),
        ("cifar100:cifar100-csra-r4=100%", "cifar100", "cifar100-csra-r4", None, 1.0),
        ("cifar100-mha:cifar100-csra-r2@6=1e-3", "cifar100-mha", "cifar100-csra-r2", 6, 0.001),
    ],
)
def test_a_share_is_read(text: str, primary: str | None, candidate: str, version: int | None, share: float) -> None:
    split = parse_split("canary", text)
    assert (split.primary, split.candidate, split.version) == (primary, candidate, version)
    assert split.share == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a", r"write \[PRIMARY:\]CANDIDATE"),
        ("a=", r"write \[PRIMARY:\]CANDIDATE"),
        ("=5%", r"write \[PRIMARY:\]CANDIDATE"),
        ("a@x=5%", r"write \[PRIMARY:\]CANDIDATE"),
        ("../a=5%", r"write \[PRIMARY:\]CANDIDATE"),
        ("a=five", "the share 'five' is not a number"),
        ("a=nan", "above 0 and at most 1"),
        ("a=0", "above 0 and at most 1"),
        ("a=-5%", "above 0 and at most 1"),
        ("a=5", "above 0 and at most 1"),
        ("a=101%", "above 0 and at most 1"),
        ("a@0=5%", "versions count from 1"),
        ("a:a=5%", "the candidate is the primary itself: name another model, or a version as in a@2"),
    ],
)
def test_what_is_no_share_is_refused_with_the_fix(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_split("shadow", text)


def test_a_candidate_has_one_share_and_there_are_few() -> None:
    with pytest.raises(ValueError, match="named twice"):
        parse_splits("canary", ["a=5%", "b:a=6%"])
    with pytest.raises(ValueError, match="at most 4"):
        parse_splits("canary", [f"a{number}=5%" for number in range(5)])


def split(share: float, candidate: str = "b") -> Split:
    return Split(kind="canary", primary="a", candidate=candidate, version=None, share=share)


@settings(max_examples=60)
@given(
    share=st.floats(0.001, 1),
    candidate=st.text("abc", min_size=1, max_size=5),
    start=st.integers(0, 10**6),
    length=st.integers(0, 40),
)
def test_the_share_is_kept_whatever_the_images_are(share: float, candidate: str, start: int, length: int) -> None:
    """Also of images that differ in a few bytes: within five standard deviations."""
    images = [b"\xff" * length + number.to_bytes(8, "big") for number in range(start, start + 2000)]
    taken = sum(split(share, candidate).takes([image]) for image in images)
    assert abs(taken - 2000 * share) <= 5 * math.sqrt(2000 * share * (1 - share)) + 1


@given(image=st.binary(max_size=50), small=st.floats(0.001, 1), large=st.floats(0.001, 1))
def test_a_retry_has_the_same_arm_and_a_larger_share_only_adds(image: bytes, small: float, large: float) -> None:
    small, large = sorted((small, large))
    taken = split(small).takes([image])
    assert taken == split(small).takes([bytes(bytearray(image))])
    assert not taken or split(large).takes([image])


def test_pixels_count_by_their_values_wherever_they_lie_in_memory() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
    elsewhere = np.repeat(pixels, 2, axis=1)[:, ::2]
    for share in np.linspace(0.01, 1, 50):
        assert split(float(share)).takes([pixels]) == split(float(share)).takes([elsewhere])


def test_candidates_and_kinds_have_shares_of_their_own() -> None:
    images = [number.to_bytes(4, "big") for number in range(1000)]
    one, other = ([split(0.5, name).takes([image]) for image in images] for name in ("b", "c"))
    assert 300 < sum(a != b for a, b in zip(one, other, strict=True)) < 700
