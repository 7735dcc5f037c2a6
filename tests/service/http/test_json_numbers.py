"""Pixels lifted out of JSON text agree with a general parser, for every text."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.http import json_numbers
from service.http.json_numbers import lift_data


def flat(array: Any) -> list[Any]:
    return [value for item in array for value in flat(item)] if isinstance(array, list) else [array]


def reference(array: Any) -> np.ndarray[Any, Any] | None:
    """What may be lifted, decided by a general parser."""
    if not all(type(value) is int and 0 <= value <= 255 for value in flat(array)):
        return None
    try:
        values = np.array(array)
    except ValueError:
        return None
    return values.ravel() if values.size and 1 <= values.ndim <= 8 else None


def check(array: str) -> None:
    text = f'{{"a": "\\"data\\": [1]", "data": {array}, "b": [1, 2]}}'.encode()
    rest, numbers = lift_data(text)
    try:
        document = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError, match=r".*"):
            json.loads(rest)
        return
    if numbers is None:
        assert rest == text
        assert reference(document["data"]) is None or "-0" in array
        return
    assert json.loads(rest) == {**document, "data": [None]}
    expected = reference(document["data"])
    assert expected is not None
    np.testing.assert_array_equal(numbers, expected)


@given(
    st.recursive(
        st.one_of(st.integers(-1, 300), st.integers(0, 255), st.booleans(), st.none(), st.floats(), st.text("[1, ]")),
        lambda inner: st.lists(inner, max_size=4),
        max_leaves=12,
    ),
    st.sampled_from([None, 1]),
)
def test_lifts_exactly_what_a_general_parser_takes_for_pixels(value: Any, indent: int | None) -> None:
    check(json.dumps([value], indent=indent))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 2**32), st.sampled_from([None, 1]))
def test_lifts_nested_arrays_of_any_shape(shape: list[int], seed: int, indent: int | None) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    rest, numbers = lift_data(json.dumps({"data": pixels.tolist()}, indent=indent).encode())
    assert json.loads(rest) == {"data": [None]}
    np.testing.assert_array_equal(numbers, pixels.ravel())


@given(st.text("[]],,0123456789 \n-.e", max_size=20))
@example("[1,,2]")
@example("[1 2]")
@example("[1\n,\n2 ]")
@example("[01]")
@example("[00]")
@example("[1,]")
@example("[,1]")
@example("[[1],[2]")
@example("[1]],[2]")
@example("[1],[2]")
@example("[[1,2],[3]]")
@example("[[1],2]")
@example("[[1]2]")
@example("[1,[2]")
@example("[1[2]]")
@example("[[1]2,3]")
@example("[[1,2],[3],[4,5,6]]")
@example("[1000]")
@example("[256]")
@example("[[]]")
@example("[" * 9 + "1" + "]" * 9)
def test_text_that_is_not_an_array_of_pixels_is_left_to_the_parser(array: str) -> None:
    check(array)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 7, 64])
def test_chunks_cut_no_number(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, *, nested: bool) -> None:
    monkeypatch.setattr(json_numbers, "_CHUNK_BYTES", chunk_bytes)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 2), dtype=np.uint8)
    text = json.dumps({"data": (pixels if nested else pixels.ravel()).tolist()}).encode()
    rest, numbers = lift_data(text)
    assert rest == b'{"data": [null]}'
    np.testing.assert_array_equal(numbers, pixels.ravel())
    assert lift_data(text.replace(b", ", b", 0", 9))[1] is None


def test_two_members_named_data_are_left_to_the_parser() -> None:
    text = b'{"data": [1, 2], "other": {"data" : [3]}}'
    assert lift_data(text) == (text, None)
