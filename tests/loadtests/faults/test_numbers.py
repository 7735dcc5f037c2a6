"""Numbers go through the model, and its faults fail for the guilty alone."""

from typing import get_args

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.faults.models import Kind, expected_outputs, make_graph
from loadtests.faults.numbers import GUILTY, LIMIT, make_request, numbers_in, picture, pixels
from service.images import decode
from service.manifest import Preprocessing

INNOCENT = np.array([0, 1, 70_000, LIMIT - 1, LIMIT | 5, GUILTY - 1])


def run(kind: Kind, numbers: list[int]) -> tuple[np.ndarray, np.ndarray]:
    session = ort.InferenceSession(make_graph(kind).SerializeToString())
    logits, probabilities = session.run(None, {"image": np.stack([pixels(number) for number in numbers])})
    return logits, probabilities


@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_model_answers_with_the_number_of_an_innocent_image(kind: Kind) -> None:
    onnx.checker.check_model(make_graph(kind))
    for found, expected in zip(run(kind, INNOCENT.tolist()), expected_outputs(INNOCENT), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_guilty_image_fails_as_the_model_says() -> None:
    batch = [1, GUILTY | 7, 2]
    with pytest.raises(Exception, match="out of data bounds"):
        run("numbered-raises", batch)
    logits, _ = run("numbered-nan", batch)
    assert np.isnan(logits[1, :3]).all()
    assert np.isfinite(logits[[0, 2]]).all()
    assert len(run("numbered-short", batch)[0]) == 2
    hanging = make_graph("numbered-hangs")
    assert "Loop" in {node.op_type for node in hanging.graph.node}


@settings(deadline=None)
@given(st.integers(0, 2**24 - 1))
def test_a_picture_has_the_pixels_of_its_number(number: int) -> None:
    side = len(pixels(number))
    as_is = Preprocessing(resize=side, crop=side, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
    np.testing.assert_array_equal(decode(picture(number), as_is, max_pixels=1000), pixels(number))


def test_both_images_of_a_binary_request_have_numbers_of_their_own() -> None:
    request = make_request("v2-binary", 9, model="numbered", deadline_ms=1000)
    assert len(set(request.numbers)) == 2
    length = int(request.head.split("Inference-Header-Content-Length: ")[1].split("\r\n")[0])
    images = np.frombuffer(request.body[length:], np.uint8).reshape(2, *pixels(9).shape)
    np.testing.assert_array_equal(images, np.stack([pixels(number) for number in request.numbers]))


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"results": [{"predictions": []}]}', b'{"results": [{"predictions": [{"index": 0}]}]}']
)
def test_an_answer_without_numbers_is_an_error(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"no numbers|not three bytes"):
        numbers_in("v1", {}, body)


def test_what_is_not_a_byte_is_no_number() -> None:
    body = b'{"outputs": [{"data": [1.5, 2, 3, 0]}]}'
    with pytest.raises(ValueError, match="not three bytes"):
        numbers_in("v2-json", {}, body)
    with pytest.raises(ValueError, match="not three bytes"):
        numbers_in("v2-binary", {"inference-header-content-length": "0"}, np.full(4, np.nan, "<f4").tobytes())
