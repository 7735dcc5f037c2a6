"""Names of variants and what they leave of the keys and values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.variants import Variant, parse_variant

SIDES = st.integers(1, 40)
REDUCTIONS = st.integers(1, 9)


@given(kind=st.sampled_from(["lsra", "csra"]), reduction=REDUCTIONS)
def test_name_and_variant_are_one_to_one(kind: str, reduction: int) -> None:
    name = f"{kind}-r{reduction}"
    variant = parse_variant(name)
    assert str(variant) == name
    assert (variant.stride, variant.block_size) == ((reduction, None) if kind == "csra" else (None, reduction))


@pytest.mark.parametrize(
    "name", ["", "mha-r2", "csra", "csra-r0", "csra-r", "lsra-r2x", "CSRA-R2", "csra-r-1", "csra-r02"]
)
def test_other_names_are_refused_with_the_accepted_forms(name: str) -> None:
    with pytest.raises(ValueError, match=r"use mha, lsra-rR or csra-rR"):
        parse_variant(name)


@given(height=SIDES, width=SIDES, reduction=REDUCTIONS)
def test_kv_tokens_are_the_number_of_windows(height: int, width: int, reduction: int) -> None:
    grid = (height, width)
    blocks = range(0, height * width, reduction)
    windows = [(row, column) for row in range(0, height, reduction) for column in range(0, width, reduction)]
    assert Variant(kind="mha").kv_tokens(grid) == height * width
    assert Variant(kind="lsra", reduction=reduction).kv_tokens(grid) == len(blocks)
    assert Variant(kind="csra", reduction=reduction).kv_tokens(grid) == len(windows)
