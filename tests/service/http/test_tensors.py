"""The wire format of /v2, against bytes written by hand from the protocol's documents."""

import base64
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import BadRequest, RequestError
from service.http.tensors import InferenceRequest, RequestedOutput, answer, parse

SHAPE = (2, 3, 3)
SIZE = 18
PIXELS = np.random.default_rng(0).integers(0, 256, (2, *SHAPE), dtype=np.uint8)
FLAT = PIXELS.ravel().tolist()
LABELS = ["cat", "dog:small", "Vögel"]
LOGITS = np.array([[0.5, 2.25, -1.0], [3.0, 1e-3, 3.0]], dtype=np.float32)
PROBABILITIES = np.array([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]], dtype=np.float32)
BOTH = (
    RequestedOutput(name="logits", binary=False, classification=0),
    RequestedOutput(name="probabilities", binary=False, classification=0),
)
ENCODED = [b"\x89PNG\r\n\x1a\n one", b"\xff\xd8\xff two"]


def ask(body: bytes | dict[str, Any], header_length: int | None = None) -> InferenceRequest:
    text = json.dumps(body).encode() if isinstance(body, dict) else body
    return parse(text, header_length=header_length, image_shape=SHAPE, max_images=4)


def pixels_of(asked: InferenceRequest) -> np.ndarray[Any, np.dtype[np.uint8]]:
    assert isinstance(asked.inputs.images, np.ndarray)
    assert asked.inputs.images.dtype == np.uint8
    return asked.inputs.images


def json_body(**changes: Any) -> dict[str, Any]:
    tensor = {"name": "image", "shape": [2, *SHAPE], "datatype": "UINT8", "data": PIXELS.ravel().tolist()}
    return {"inputs": [{key: value for key, value in {**tensor, **changes}.items() if value is not None}]}


def binary_body(data: bytes, **changes: Any) -> tuple[bytes, int]:
    """A request as tritonclient writes it: JSON, then binary data; and the length of the JSON."""
    body = json_body(data=None, parameters={"binary_data_size": len(data)}, **changes)
    text = json.dumps(body).encode()
    return text + data, len(text)


def strings(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def test_json_pixels_flat_or_nested_are_the_images() -> None:
    for data in (PIXELS.ravel().tolist(), PIXELS.tolist(), PIXELS.reshape(2, -1).tolist(), [1.0 * p for p in FLAT]):
        asked = ask(json_body(data=data))
        np.testing.assert_array_equal(pixels_of(asked), PIXELS)
        assert (asked.id, asked.outputs) == (None, BOTH)
        assert (asked.inputs.seconds, asked.inputs.priority) == (None, None)


def test_binary_pixels_are_a_view_of_the_body() -> None:
    body, length = binary_body(PIXELS.tobytes())
    pixels = pixels_of(ask(body, length))
    np.testing.assert_array_equal(pixels, PIXELS)
    assert np.shares_memory(pixels, np.frombuffer(body, dtype=np.uint8))


@pytest.mark.parametrize("shape", [[2], [2, 1]])
def test_encoded_images_come_as_binary_strings_or_as_base64_in_json(shape: list[int]) -> None:
    body, length = binary_body(strings(*ENCODED), datatype="BYTES", shape=shape)
    assert ask(body, length).inputs.images == ENCODED
    text = [base64.b64encode(image).decode() for image in ENCODED]
    assert ask(json_body(datatype="BYTES", shape=shape, data=text)).inputs.images == ENCODED
    if shape == [2, 1]:
        assert ask(json_body(datatype="BYTES", shape=shape, data=[[item] for item in text])).inputs.images == ENCODED


def test_raw_body_is_pixels_and_gets_binary_outputs() -> None:
    asked = ask(PIXELS.tobytes(), header_length=0)
    np.testing.assert_array_equal(pixels_of(asked), PIXELS)
    assert [(output.name, output.binary) for output in asked.outputs] == [("logits", True), ("probabilities", True)]
    for body in (b"", PIXELS.tobytes()[:-1], bytes(SIZE * 5)):
        with pytest.raises(BadRequest, match=r"n times 18 bytes|1 to 4 images"):
            ask(body, header_length=0)


def test_outputs_are_sent_as_the_request_says() -> None:
    outputs: list[dict[str, Any]] = [
        {"name": "probabilities", "parameters": {"classification": 2, "binary_data": False}},
        {"name": "logits"},
    ]
    asked = ask({**json_body(), "outputs": outputs, "parameters": {"binary_data_output": True}})
    assert asked.outputs == (
        RequestedOutput(name="probabilities", binary=False, classification=2),
        RequestedOutput(name="logits", binary=True, classification=0),
    )
    assert ask({**json_body(), "outputs": []}).outputs == BOTH
    assert ask({**json_body(), "outputs": None}).outputs == BOTH
    assert all(output.binary for output in ask({**json_body(), "parameters": {"binary_data_output": True}}).outputs)


def test_request_parameters_are_read_and_unknown_ones_ignored() -> None:
    parameters: dict[str, Any] = {"timeout": 2500, "priority": 1, "sequence_id": 7, "sequence_start": True}
    asked = ask({**json_body(), "id": "a", "parameters": {**parameters, "mine": "x", "other": 1.5, "flag": [False]}})
    assert (asked.id, asked.inputs.seconds, asked.inputs.priority) == ("a", 0.0025, None)
    assert ask({**json_body(), "parameters": {"timeout": 0, "priority": 2}}).inputs.seconds is None
    assert ask({**json_body(), "parameters": {"priority": 2}}).inputs.priority == "batch"
    assert ask({**json_body(), "model_name": "x", "unknown": [1]}).id is None


TENSOR = json_body()["inputs"][0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "empty"),
        (b"  ", "empty"),
        (b"{", "malformed inference request"),
        (b"[]", "malformed inference request"),
        (b"\xff\xfe", "malformed inference request"),
        (b"[" * 50_000, "malformed inference request"),
        (b'{"unknown": ' + b"[" * 100_000, "malformed inference request: maximum recursion depth"),
        (b'{"inputs": [' + b"{}," * 50_000 + b"{}]}", r"inputs\.0: Object missing required field `name`"),
        (b'{"inputs": [{"shape": [' + b"1," * 100_000 + b'1], "name": "x", "datatype": "y"}]}', r"inputs\.0\.shape"),
        (b'{"unknown": ' + b"[" * 200_000, "over 50,000 strings or other values"),
        (b'{"inputs": [' + b"{}," * 200_000 + b"{}]}", "over 50,000 strings or other values"),
        (b'{"inputs": [{"shape": [' + b"1," * 200_000 + b"1]}]}", "over 50,000 strings or other values"),
        (b'{"inputs": [], "data": [null' + b",1" * 200_000 + b"]}", "over 50,000 strings or other values"),
        (b'{"parameters": {' + b'"": 1,' * 60_000 + b'"": 1}, "inputs": []}', "over 50,000 strings"),
        (b'{"id": "\\ud800", "inputs": []}', "malformed inference request"),
        ({"inputs": []}, "got 0 inputs"),
        ({"inputs": [TENSOR, TENSOR]}, "got 2 inputs"),
        ({}, "Object missing required field `inputs`"),
        ({**json_body(), "id": 7}, "id: "),
        (json_body(name="img"), "got 'img' UINT8"),
        (json_body(name="x" * 10**6), "expected one input 'image'"),
        (json_body(datatype="FP32"), "got 'image' FP32"),
        (json_body(shape=[2, 3, 3, 3]), r"shape \[n,2,3,3\]"),
        (json_body(shape=[]), "expected one input"),
        (json_body(shape=[-1, *SHAPE]), r"inputs\.0\.shape\.0"),
        (json_body(shape=[2.0, *SHAPE]), r"inputs\.0\.shape\.0"),
        (json_body(shape=[2**70, *SHAPE]), r"inputs\.0\.shape\.0"),
        (json_body(shape=[0, *SHAPE], data=[]), "1 to 4 images; got 0"),
        (json_body(shape=[5, *SHAPE]), "1 to 4 images; got 5"),
        (json_body(shape=[1, *SHAPE]), "18 whole numbers from 0 to 255, .* got 36"),
        (json_body(data=[]), "36 whole numbers"),
        (json_body(data=[7] * 35 + [256]), "36 whole numbers .* number 35"),
        (json_body(data=[-1] * 36), "36 whole numbers"),
        (json_body(data=[1.5] * 36), "36 whole numbers .* number 0"),
        (json_body(data=[True] * 36), "36 whole numbers"),
        (json_body(data=["7"] * 36), "36 whole numbers"),
        (json_body(data=[10**30] * 36), "36 whole numbers"),
        (json_body(data=[[1], [2, 3]]), "36 whole numbers"),
        (json_body(data=[None]), "36 whole numbers"),
        (json_body(data=None), "either 'data' or the parameter 'binary_data_size'"),
        (json_body(parameters={"binary_data_size": 36}), "either 'data' or the parameter 'binary_data_size'"),
        (json_body(data=None, parameters={"binary_data_size": 36}), "needs the header Inference-Header-Content-Length"),
        (json_body(data=None, parameters={"binary_data_size": -1}), r"inputs\.0\.parameters\.binary_data_size"),
        (json_body(data=None, parameters={"binary_data_size": True}), r"inputs\.0\.parameters\.binary_data_size"),
        (json_body(data=None, parameters={"shared_memory_region": "r"}), "shared memory is not offered"),
        (json_body(datatype="BYTES", shape=[2], data=["AA=="]), "needs 2 strings, got 1"),
        (json_body(datatype="BYTES", shape=[2], data=["AA==", "not base64"]), r"inputs\.0\.data\.1: Invalid base64"),
        (json_body(datatype="BYTES", shape=[1], data=["é"]), r"inputs\.0\.data\.0: Invalid base64"),
        (json_body(datatype="BYTES", shape=[1], data=[7]), r"inputs\.0\.data\.0: Expected `bytes`"),
        (json_body(datatype="BYTES", shape=[1], data=[["AA=="]]), r"inputs\.0\.data\.0: Expected `bytes`"),
        (json_body(datatype="BYTES", shape=[2, 2], data=["AA=="] * 4), "expected one input"),
        ({**json_body(), "parameters": {"timeout": -1}}, r"parameters\.timeout: Expected `int` >= 0"),
        ({**json_body(), "parameters": {"timeout": "5"}}, r"parameters\.timeout"),
        ({**json_body(), "parameters": {"priority": 1.5}}, r"parameters\.priority"),
        ({**json_body(), "parameters": {"priority": 2**63}}, r"parameters\.priority: Expected `int` <= 92"),
        ({**json_body(), "parameters": {"binary_data_output": 1}}, r"parameters\.binary_data_output: Expected `bool"),
        ({**json_body(), "parameters": {"mine": float("nan")}}, "JSON is malformed"),
        ({**json_body(), "parameters": {"mine": float("inf")}}, "JSON is malformed"),
        ({**json_body(), "parameters": []}, "parameters: "),
        ({**json_body(), "outputs": [{"name": "secret"}]}, r"outputs\.0\.name"),
        ({**json_body(), "outputs": [{"name": "logits"}] * 2}, r"outputs\.1: 'logits' is requested twice"),
        (
            {**json_body(), "outputs": [{"name": "logits", "parameters": {"shared_memory_region": "r"}}]},
            r"outputs\.0: shared memory is not offered",
        ),
        (
            {**json_body(), "outputs": [{"name": "logits", "parameters": {"classification": -1}}]},
            r"outputs\.0\.parameters\.classification",
        ),
        (
            {**json_body(), "outputs": [{"name": "logits", "parameters": {"binary_data": "yes"}}]},
            r"outputs\.0\.parameters\.binary_data: Expected `bool",
        ),
    ],
)
def test_faults_are_named_with_their_place(body: bytes | dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message) as caught:
        ask(body)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (PIXELS.tobytes()[:-1], {}, "needs 36 bytes, got 35"),
        (PIXELS.tobytes() + b"x", {}, "needs 36 bytes, got 37"),
        (b"", {}, "needs 36 bytes, got 0"),
        (b"", {"shape": [1], "datatype": "BYTES"}, "must be 1 strings and nothing else; got 0"),
        (b"\x00\x00", {"shape": [1], "datatype": "BYTES"}, "element 0 of the binary data runs beyond its end"),
        (struct.pack("<I", 5) + b"four", {"shape": [1], "datatype": "BYTES"}, "element 0 .* runs beyond"),
        (struct.pack("<I", 2**32 - 1) + b"four", {"shape": [1], "datatype": "BYTES"}, "element 0 .* runs beyond"),
        (strings(b"a"), {"shape": [2], "datatype": "BYTES"}, "2 strings and nothing else; got 1 and 0 bytes more"),
        (strings(b"a", b"b"), {"shape": [1], "datatype": "BYTES"}, "1 strings and nothing else; got 1 and 5 bytes"),
    ],
)
def test_binary_data_must_fit_its_shape(data: bytes, changes: dict[str, Any], message: str) -> None:
    body, length = binary_body(data, **changes)
    with pytest.raises(BadRequest, match=message):
        ask(body, length)


def test_header_length_must_divide_the_body_as_the_json_says() -> None:
    body, length = binary_body(PIXELS.tobytes())
    for wrong, message in (
        (-1, "not between 0 and"),
        (len(body) + 1, "not between 0 and"),
        (len(body), "malformed"),
        (length - 1, "malformed"),
        (length + 1, "malformed"),
        (None, "malformed"),
    ):
        with pytest.raises(BadRequest, match=message):
            ask(body, wrong)
    for extra in (b"x", PIXELS.tobytes()):
        with pytest.raises(BadRequest, match=f"{36 + len(extra)} bytes follow the JSON; its inputs declare 36"):
            ask(body + extra, length)
    with pytest.raises(BadRequest, match="35 bytes follow the JSON"):
        ask(body[:-1], length)
    text = json.dumps(json_body()).encode()
    np.testing.assert_array_equal(pixels_of(ask(text, len(text))), PIXELS)
    with pytest.raises(BadRequest, match="1 bytes follow the JSON; its inputs declare 0"):
        ask(text + b"x", len(text))


def test_a_number_array_elsewhere_is_never_taken_for_the_pixels() -> None:
    """The key `\\u0064ata` is `data` to a JSON parser, not to a search for its letters."""
    pixels = PIXELS.ravel().tolist()
    text = json.dumps({"extra": {"data": pixels}, **json_body(data=[])})
    hidden = text[: text.rindex('"data"')] + '"\\u0064ata"' + text[text.rindex('"data"') + 6 :]
    with pytest.raises(BadRequest, match="36 whole numbers"):
        ask(hidden.encode())


def respond(*outputs: RequestedOutput, **changes: Any) -> tuple[dict[str, Any], bytes, int | None]:
    arguments: dict[str, Any] = {
        "id": "7",
        "model_name": "m",
        "model_version": "3",
        "outputs": outputs,
        "logits": LOGITS,
        "probabilities": PROBABILITIES,
        "labels": LABELS,
        "parameters": None,
    }
    body, length = answer(**{**arguments, **changes})
    return json.loads(body[:length]), b"" if length is None else body[length:], length


def test_json_answer_is_the_protocols() -> None:
    body, _, length = respond(*BOTH)
    assert length is None
    assert body == {
        "id": "7",
        "model_name": "m",
        "model_version": "3",
        "outputs": [
            {"name": "logits", "datatype": "FP32", "shape": [2, 3], "data": LOGITS.ravel().tolist()},
            {"name": "probabilities", "datatype": "FP32", "shape": [2, 3], "data": PROBABILITIES.ravel().tolist()},
        ],
    }
    unnamed, _, _ = respond(*BOTH, id=None, parameters={"served_by": "x"})
    assert "id" not in unnamed
    assert unnamed["parameters"] == {"served_by": "x"}


def test_binary_outputs_follow_the_json_in_its_order() -> None:
    body, data, length = respond(
        RequestedOutput(name="probabilities", binary=True, classification=0),
        RequestedOutput(name="logits", binary=False, classification=0),
        RequestedOutput(name="logits", binary=True, classification=0),
        logits=np.asfortranarray(LOGITS),
    )
    assert length is not None
    first, second, third = body["outputs"]
    assert first == {
        "name": "probabilities",
        "datatype": "FP32",
        "shape": [2, 3],
        "parameters": {"binary_data_size": 24},
    }
    assert second["data"] == LOGITS.ravel().tolist()
    assert third["parameters"] == {"binary_data_size": 24}
    assert data == PROBABILITIES.astype("<f4").tobytes() + LOGITS.astype("<f4").tobytes()


def test_classification_ranks_as_triton_writes_it() -> None:
    top2 = RequestedOutput(name="logits", binary=False, classification=2)
    body, _, _ = respond(top2)
    expected = ["2.250000:1:dog:small", "0.500000:0:cat", "3.000000:0:cat", "3.000000:2:Vögel"]
    assert body["outputs"] == [{"name": "logits", "datatype": "BYTES", "shape": [2, 2], "data": expected}]
    body, data, _ = respond(RequestedOutput(name="logits", binary=True, classification=2))
    assert body["outputs"][0]["parameters"] == {"binary_data_size": len(data)}
    assert data == strings(*(string.encode() for string in expected))
    body, _, _ = respond(RequestedOutput(name="probabilities", binary=False, classification=1000))
    assert body["outputs"][0]["shape"] == [2, 3]
    even = np.zeros((1, 1000), dtype=np.float32)
    body, _, _ = respond(top2, logits=even, probabilities=even, labels=["x"] * 1000)
    assert body["outputs"][0]["data"] == ["0.000000:0:x", "0.000000:1:x"]


WHOLE: list[tuple[bytes, int | None]] = [
    (json.dumps({**json_body(), "id": "x", "outputs": [{"name": "logits"}]}).encode(), None),
    binary_body(PIXELS.tobytes()),
    binary_body(strings(*ENCODED), shape=[2], datatype="BYTES"),
    (PIXELS.tobytes(), 0),
]
TOKENS = [b"[", b"]", b"{", b"}", b'"', b",", b"null", b"-", b"1e9", b"NaN", b"\\u", b'"data":[1]', b"9" * 20]
EDITS = st.tuples(st.floats(0, 1), st.integers(0, 4), st.one_of(st.binary(max_size=4), st.sampled_from(TOKENS)))


@settings(max_examples=200)
@given(st.sampled_from(WHOLE), st.lists(EDITS, min_size=1, max_size=3), st.one_of(st.none(), st.integers(-3, 400)))
def test_damaged_requests_raise_request_errors_and_nothing_else(
    whole: tuple[bytes, int | None], edits: list[tuple[float, int, bytes]], header_length: int | None
) -> None:
    body, length = whole
    for where, removed, added in edits:
        place = int(where * len(body))
        body = body[:place] + added + body[place + removed :]
    for given_length in (length, header_length):
        try:
            asked = ask(body, given_length)
        except RequestError:
            continue
        assert not isinstance(asked.inputs.images, np.ndarray) or pixels_of(asked).shape[1:] == SHAPE


@given(st.binary(max_size=100), st.one_of(st.none(), st.integers(-1, 101)))
def test_random_bytes_raise_request_errors_and_nothing_else(body: bytes, header_length: int | None) -> None:
    try:
        ask(body, header_length)
    except RequestError:
        return
    assert header_length == 0


WORDS = st.sampled_from(["", "image", "logits", "UINT8", "\u00e9", "\x00", "x"])
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 2**70), st.floats(), WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=2)),
    max_leaves=4,
)
KNOWN = st.sampled_from(
    ["binary_data_size", "binary_data", "classification", "timeout", "priority", "sequence_id", "x"]
)
PARAMETERS = st.one_of(VALUES, st.dictionaries(KNOWN, VALUES, max_size=3))
INPUTS = st.fixed_dictionaries(
    {"name": st.one_of(st.just("image"), VALUES), "datatype": st.one_of(st.sampled_from(["UINT8", "BYTES"]), VALUES)},
    optional={
        "shape": st.one_of(st.just([2, *SHAPE]), st.just([1]), VALUES),
        "parameters": PARAMETERS,
        "data": VALUES,
    },
)
OUTPUTS = st.fixed_dictionaries({"name": WORDS}, optional={"parameters": PARAMETERS})
REQUESTS = st.fixed_dictionaries(
    {"inputs": st.one_of(st.lists(INPUTS, min_size=1, max_size=2), VALUES)},
    optional={"id": VALUES, "parameters": PARAMETERS, "outputs": st.one_of(st.lists(OUTPUTS, max_size=2), VALUES)},
)


@settings(max_examples=200)
@given(REQUESTS, st.binary(max_size=40))
def test_wrong_values_anywhere_raise_request_errors_and_nothing_else(body: dict[str, Any], data: bytes) -> None:
    text = json.dumps(body).encode()
    for whole, header_length in ((text, None), (text + data, len(text))):
        try:
            ask(whole, header_length)
        except RequestError:
            continue


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=4))
def test_strings_of_any_bytes_arrive_as_they_were_sent(elements: list[bytes]) -> None:
    body, length = binary_body(strings(*elements), shape=[len(elements)], datatype="BYTES")
    assert ask(body, length).inputs.images == elements
    text = [base64.b64encode(element).decode() for element in elements]
    assert ask(json_body(shape=[len(elements)], datatype="BYTES", data=text)).inputs.images == elements
