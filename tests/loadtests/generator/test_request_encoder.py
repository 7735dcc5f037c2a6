"""Requests as they are sent, and answers as they are judged."""

import json

import pytest

from loadtests.generator.payloads import Payload
from loadtests.generator.request_encoder import Question, Target, target

RIGHT_V1 = {"results": [{"predictions": [{"index": 3, "label": "three"}]}]}
RIGHT_V2 = {"outputs": [{"data": ["0.75:3:three", "0.25:1:one"]}]}


@pytest.mark.parametrize(("protocol", "answer"), [("v1", RIGHT_V1), ("v2", RIGHT_V2)])
def test_the_first_class_is_judged_by_its_index_or_its_name(protocol: str, answer: dict[str, object]) -> None:
    sent = Target("/", [], protocol)  # type: ignore[arg-type]
    body = json.dumps(answer).encode()
    judged = {label: sent.correct(Question(b"", {}, label), body) for label in (3, "three", 1, "one", None)}
    assert judged == {3: True, "three": True, 1: False, "one": False, None: None}


@pytest.mark.parametrize("protocol", ["v1", "v2"])
@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b'{"results": []}', b'{"outputs": [{"data": [3]}]}', b"\xff"])
def test_an_answer_that_names_no_class_is_not_judged_and_breaks_nothing(protocol: str, body: bytes) -> None:
    sent = Target("/", [], protocol)  # type: ignore[arg-type]
    assert sent.correct(Question(b"", {}, 3), body) is None


def test_the_path_names_model_and_deadline_where_there_are_any() -> None:
    payloads = [Payload("a", b"x", None)]
    paths = [
        target(payloads, protocol="v1", model=model, host="", deadline_ms=deadline_ms).path
        for model, deadline_ms in (("", None), ("a b", None), ("m", 50.0))
    ]
    assert paths == ["/v1/classify", "/v1/classify?model=a+b", "/v1/classify?model=m&deadline_ms=50"]
