"""Requests as they are sent, and answers as they are judged."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loadtests.experiment.load_runner import requests_of, run_locust
from loadtests.experiment.server import Server
from loadtests.generator import payload_cache
from loadtests.generator.load_result import PROTOCOLS, Protocol
from loadtests.generator.readers import Payload, PayloadError
from loadtests.generator.request_encoder import Request, Target, target
from service.bundle import read_bundle
from service.images import decode
from tests.loadtests.experiment.benches import plan
from tests.processes import post, serving
from tests.service.conftest import PNG, encoded, noise

RIGHT_V1 = {"results": [{"predictions": [{"index": 3, "label": "three"}]}]}
RIGHT_V2 = {"outputs": [{"data": ["0.75:3:three", "0.25:1:one"]}]}
MODEL = "digits-csra-r2"


@pytest.fixture(scope="module")
def url(repository: Path) -> Iterator[str]:
    with serving(repository) as (url, _):
        yield url


@pytest.mark.parametrize(("protocol", "answer"), [("v1", RIGHT_V1), ("v2", RIGHT_V2)])
def test_the_first_class_is_judged_by_its_index_or_its_name(protocol: Protocol, answer: dict[str, object]) -> None:
    sent = Target("/", [], protocol)
    body = json.dumps(answer).encode()
    judged = {label: sent.correct(Request(b"", {}, label), body) for label in (3, "three", 1, "one", None)}
    assert judged == {3: True, "three": True, 1: False, "one": False, None: None}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b'{"results": []}', b'{"outputs": [{"data": [3]}]}', b"\xff"])
def test_an_answer_without_a_class_is_not_judged_and_breaks_nothing(protocol: Protocol, body: bytes) -> None:
    assert Target("/", [], protocol).correct(Request(b"", {}, 3), body) is None


def test_the_path_names_model_and_deadline_if_given() -> None:
    payloads = [Payload("a", b"x", None)]
    paths = [
        target(payloads, protocol="v1", model=model, host="", deadline_ms=deadline_ms).path
        for model, deadline_ms in (("", None), ("a b", None), ("m", 50.0))
    ]
    assert paths == ["/v1/classify", "/v1/classify?model=a+b", "/v1/classify?model=m&deadline_ms=50"]


def rotated(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", exif=exif)


IMAGES = {
    "640x427": encoded(noise(640, 427), "JPEG"),
    "512x683": encoded(noise(512, 683), "JPEG"),
    "transparent": encoded(Image.merge("RGBA", [*noise(65, 48).split(), noise(65, 48, seed=1).convert("L")])),
    "rotated": rotated(noise(61, 40)),
    "grey of 16 bits": encoded(Image.fromarray(np.arange(50 * 40, dtype=np.uint16).reshape(40, 50) * 32)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_a_tensor_holds_the_pixels_that_the_service_would_have_decoded(name: str, url: str, repository: Path) -> None:
    sent = target([Payload(name, IMAGES[name], None)], protocol="v2", model=MODEL, host=url)
    (request,) = sent.requests
    header = int(request.headers["Inference-Header-Content-Length"])
    expected = decode(IMAGES[name], read_bundle(repository / MODEL / "1").manifest.preprocessing, max_pixels=10**6)
    assert request.body[header:] == expected.tobytes()
    # And so the answers are the same, to the last digit.
    tensor = post(url + sent.path, request.body, headers=request.headers).json()
    probability, index, _ = tensor["outputs"][0]["data"][0].split(":")
    file = post(f"{url}/v1/classify?model={MODEL}", IMAGES[name]).json()
    best = file["results"][0]["predictions"][0]
    assert int(index) == best["index"]
    assert float(probability) == pytest.approx(best["probability"], abs=1e-6)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_service_s_answers_are_judged(protocol: Protocol, url: str) -> None:
    said = post(f"{url}/v1/classify?model={MODEL}", PNG).json()
    best = said["results"][0]["predictions"][0]
    labels = [best["index"], best["label"], best["index"] + 1]
    sent = target([Payload("one", PNG, label) for label in labels], protocol=protocol, model=MODEL, host=url)
    answers = [post(url + sent.path, one.body, headers=one.headers) for one in sent.requests]
    judged = [sent.correct(one, answer.content) for one, answer in zip(sent.requests, answers, strict=True)]
    assert judged == [True, True, False]


def test_locust_sends_tensors_and_judges_the_answers(url: str, tmp_path: Path) -> None:
    said = post(f"{url}/v1/classify?model={MODEL}", PNG).json()
    best = said["results"][0]["predictions"][0]
    payload_cache.save([Payload("one", PNG, best["index"]), Payload("other", PNG, best["label"])], tmp_path)
    asked = requests_of(tmp_path, plan(MODEL, protocol="v2"), MODEL)
    samples, _ = run_locust(Server(url, name="digits"), [*asked, "--loop", "closed", "--seconds", "0.5"], seconds=1)
    assert {(sample.status, sample.correct) for sample in samples} == {(200, True)}


def test_what_cannot_be_sent_as_a_tensor_is_an_error(url: str) -> None:
    with pytest.raises(PayloadError, match=r"nobody does not describe the model's image input"):
        target([Payload("one", PNG, 1)], protocol="v2", model="nobody", host=url)
    with pytest.raises(PayloadError, match="broken cannot be decoded"):
        target([Payload("broken", b"x", 1)], protocol="v2", model=MODEL, host=url)
