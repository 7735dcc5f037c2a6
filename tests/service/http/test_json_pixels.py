"""Pixels read from JSON text agree with a general parser, for every text."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.errors import BadRequest
from service.http import json_pixels
from service.http.json_pixels import PLACEHOLDER, count_up_to, read_pixels, without_pixels


def flat(array: Any) -> list[Any]:
    return [value for item in array for value in flat(item)] if isinstance(array, list) else [array]


def reference(array: Any) -> list[Any] | None:
    """The pixels of an array according to a general parser; None if it is not one."""
    values = flat(array)
    if not all(type(value) in (int, float) and 0 <= value <= 255 and value == int(value) for value in values):
        return None
    try:
        regular = np.array(array)
    except ValueError:
        return None
    return [int(value) for value in values] if values and 1 <= regular.ndim <= 8 else None


def check(text: str) -> None:
    array = json.loads(text)
    expected = reference(array)
    shape = (max(1, len(flat(array))),)
    if expected is None:
        with pytest.raises(BadRequest, match=f"^here: must be {shape[0]} whole numbers from 0 to 255"):
            read_pixels(text.encode(), shape, "here")
    else:
        assert read_pixels(text.encode(), shape, "here").tolist() == expected


VALUES = st.one_of(
    st.integers(-1, 300),
    st.integers(0, 255),
    st.integers(0, 255).map(float),
    st.booleans(),
    st.none(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text("[1, ]"),
)


@given(
    st.recursive(VALUES, lambda inner: st.lists(inner, max_size=4), max_leaves=12),
    st.sampled_from([None, 1]),
)
@example([[1, 2], [3]], None)
@example([[1], 2], None)
@example([1, [2, 3]], None)
@example([[[1, 2], [3, 4]], [5, 6]], None)
@example([[1, 2], [3], [4, 5, 6]], None)
@example([[]], None)
@example([[], 1], None)
@example(["1,2", 3], None)
@example(["[", 3], None)
@example([{"a": 1, "b": [2]}], None)
@example([10**30], None)
@example([1e300], None)
@example([-0.0], None)
def test_reads_exactly_what_a_general_parser_takes_for_pixels(value: Any, indent: int | None) -> None:
    check(json.dumps([value], indent=indent))
    check(json.dumps(value, indent=indent))


@settings(max_examples=50)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 2**32), st.sampled_from([None, 1]))
def test_reads_nested_arrays_of_any_regular_shape(shape: list[int], seed: int, indent: int | None) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    for values in (pixels, pixels.astype(float)):
        read = read_pixels(json.dumps(values.tolist(), indent=indent).encode(), tuple(shape), "here")
        np.testing.assert_array_equal(read, pixels)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2, 256]", "number 2: Expected `int` <= 255"),
        ("[[1, 1.5], [2, 3]]", "number 1: Expected `float` that's a multiple of 1"),
        ("[-1, 2]", "number 0: Expected `int` >= 0"),
        ("[1, null]", "number 1: Expected `int | float`, got `null`"),
        ('["1", 2]', "number 0: Expected `int | float`, got `str`"),
        ("[1, true]", "number 1: Expected `int | float`, got `bool`"),
        ("[[1, 2], [3]]", "the lists of one level must be equally long"),
        ("[" * 9 + "1" + "]" * 9, "the lists of one level must be equally long"),
        ("[1, 2, 3]", "got 3"),
        ("[]", "got 0"),
        ("null", "whole numbers"),
        ('"[1]"', "whole numbers"),
        ("{}", "whole numbers"),
    ],
)
def test_faults_are_named_with_their_place(text: str, message: str) -> None:
    array = json.loads(text)
    size = len(flat(array)) if "got 3" not in message and isinstance(array, list) else 2
    with pytest.raises(BadRequest, match=r"^inputs\.0\.data: must be ") as caught:
        read_pixels(text.encode(), (max(1, size),), "inputs.0.data")
    assert message in str(caught.value)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 7, 64])
def test_chunks_split_no_number(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, *, nested: bool) -> None:
    monkeypatch.setattr(json_pixels, "_CHUNK_BYTES", chunk_bytes)
    shape = (3, 5, 2)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    text = json.dumps((pixels if nested else pixels.ravel()).tolist())
    np.testing.assert_array_equal(read_pixels(text.encode(), shape, "here"), pixels)
    wrong = pixels.ravel().tolist()
    wrong[17] = 256
    with pytest.raises(BadRequest, match="number 17: "):
        read_pixels(json.dumps(wrong).encode(), (math.prod(shape),), "here")


@pytest.mark.parametrize(
    "text",
    ["[1]2", "[1,2]]", "[[1,2]", "[1][2]", "[[1]2,[3]]", "[[1],2[3]]", "1,2", "[1,]", "[,1]", "[1 2]", "[[1],[2]]3"],
)
def test_what_is_not_json_is_refused_without_a_general_parser(text: str) -> None:
    for size in (1, 2, 3):
        with pytest.raises(BadRequest):
            read_pixels(text.encode(), (size,), "here")


def test_a_count_is_checked_before_any_number_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []

    def spy(text: bytes, marks: bytes, limit: int) -> int:
        counted.append(limit)
        return count_up_to(text, marks, limit)

    monkeypatch.setattr(json_pixels, "count_up_to", spy)
    monkeypatch.setattr(json_pixels, "_is_regular", lambda _: pytest.fail("it went on"))
    with pytest.raises(BadRequest, match="got more"):
        read_pixels(b"[" + b"1," * 1_000_000 + b"1]", (3072,), "here")
    assert counted == [3072]
    assert count_up_to(b"," * 10_000_000, b",", 3072) < 1_000_000, "it stops early"


@pytest.mark.parametrize(
    ("text", "outline", "numbers"),
    [
        ('{"data": [1, 2]}', '{"data": @}', "[1, 2]"),
        ('{"data":[[1],[2]] , "a": 1}', '{"data":@ , "a": 1}', "[[1],[2]]"),
        ('{"a": [3], "data" : [1.0]}', '{"a": [3], "data" : @}', "[1.0]"),
        ('{"data": ["QUJD"]}', None, None),
        ('{"data": [1, null]}', None, None),
        ('{"data": [1], "b": {"data": [2]}}', None, None),
        ('{"data": [1], "b": 7.01701411834604692e-77}', None, None),
        ('{"data": [1', '{"data": [1', None),
        ('{"data": {}}', None, None),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 1000])
def test_only_the_pixels_are_left_out_of_what_is_parsed(
    monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, text: str, outline: str | None, numbers: str | None
) -> None:
    monkeypatch.setattr(json_pixels, "_CHUNK_BYTES", chunk_bytes)
    got, array = without_pixels(text.encode())
    assert got.decode() == (text if outline is None else outline.replace("@", PLACEHOLDER.decode()))
    assert array == (numbers.encode() if numbers else None)
