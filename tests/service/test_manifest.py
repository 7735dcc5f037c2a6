"""The manifest: which images are correct, models without attention, and manifests of version 1."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from service.app import create_app
from service.bundle import read_bundle
from service.manifest import Accuracy, Attention, Manifest, labels_sha256
from service.settings import Settings
from tests.service.conftest import resum
from tests.service.identity import picture, publish_identity

VERSION_1 = Path(__file__).with_name("manifest_v1.json")
"""The manifest of a bundle that was shipped while version 1 was current."""


def version_1(**changes: object) -> dict[str, Any]:
    return {**json.loads(VERSION_1.read_text()), **changes}


def accuracy(correct: list[bool]) -> Accuracy:
    labels = np.arange(len(correct))
    return Accuracy.from_correct(np.array(correct), labels, top5=1.0, dataset="digits", split="test")


@pytest.mark.parametrize("n", [1, 7, 8, 9, 250])
def test_correct_images_survive_the_way_through_json(n: int) -> None:
    correct = np.random.default_rng(n).random(n) < 0.6
    made = accuracy(list(correct))
    assert (made.n, made.top1) == (n, correct.mean())
    again = Accuracy.model_validate_json(made.model_dump_json())
    np.testing.assert_array_equal(again.correct_top1(), correct)


def test_accuracy_without_bits_has_none() -> None:
    assert Accuracy(dataset="digits", split="test", n=8, top1=0.5, top5=1).correct_top1() is None


def test_labels_digest_depends_on_values_and_order_alone() -> None:
    labels = np.array([3, 1, 2])
    # printf "\3\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0\2\0\0\0\0\0\0\0" | sha256sum
    assert labels_sha256(labels) == "7c4cec7a82e1aa578a08e41043044a9bfed3839e107aef17f4bf292878784259"
    assert labels_sha256(labels.astype(np.int16)) == labels_sha256(labels.astype(">i8")) == labels_sha256(labels)
    assert labels_sha256(labels[::-1]) != labels_sha256(labels)


@pytest.mark.parametrize(
    ("correct", "message"),
    [
        ({"top1": "AAA="}, "holds 2 bytes, but 8 images take 1"),
        ({"top1": "8A=="}, None),
        ({"top1": "/w=="}, "marks 8 of 8 images, but top1 is 0.5"),
        ({"top1": "?"}, r"correct\.top1"),
        ({"labels_sha256": "00"}, "labels_sha256"),
    ],
)
def test_bits_that_contradict_the_accuracy_are_refused(correct: dict[str, str], message: str | None) -> None:
    values = accuracy([True] * 4 + [False] * 4).model_dump()
    values["correct"] |= correct
    if message is None:
        Accuracy.model_validate(values)
    else:
        with pytest.raises(ValidationError, match=message):
            Accuracy.model_validate(values)


def test_version_1_is_converted_when_it_is_read() -> None:
    manifest = Manifest.model_validate_json(VERSION_1.read_text())
    assert manifest.schema_version == 2
    assert (manifest.architecture, manifest.params, manifest.macs) == ("vit-xs", 693_924, 42_114_560)
    assert (manifest.num_classes, manifest.random_weights) == (100, False)
    assert manifest.attention == Attention(variant="csra-r2", tokens=64, kv_tokens=16, stride=2, rank=32)
    assert manifest.accuracy
    assert (manifest.accuracy.top1, manifest.accuracy.correct) == (0.5366, None)
    assert Manifest.model_validate(version_1(weights="random", accuracy=None)).random_weights
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"surprise": 1}, "surprise"),
        ({"kv_tokens": 0}, r"attention\.kv_tokens"),
        ({"weights": "lucky"}, "random_weights"),
        ({"parameters": None}, "params"),
    ],
)
def test_a_wrong_manifest_of_version_1_is_refused(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        Manifest.model_validate(version_1(**changes))


def test_a_field_that_version_1_lacks_is_named() -> None:
    values = version_1()
    del values["tokens"]
    with pytest.raises(ValidationError, match=r"attention\.tokens"):
        Manifest.model_validate(values)


def test_a_bundle_of_version_1_is_read_from_disk(tmp_path: Path) -> None:
    folder = publish_identity(tmp_path, "identity-a")
    written = json.loads((folder / "manifest.json").read_text())
    kept = ("name", "family", "input", "outputs", "preprocessing", "op_types", "opset", "tolerance")
    old = version_1(classes=written["num_classes"], **{name: written[name] for name in kept})
    (folder / "manifest.json").write_text(json.dumps(old))
    resum(folder)
    assert read_bundle(folder).manifest.params == 693_924


def test_a_model_without_attention_is_served_and_listed(tmp_path: Path) -> None:
    publish_identity(tmp_path, "identity-a")
    with TestClient(create_app(Settings(repository=tmp_path, threads=1))) as client:
        (model,) = client.get("/v1/models").json()["models"]
        assert (model["state"], model["architecture"]) == ("ready", "identity")
        assert not {"variant", "tokens", "kv_tokens", "macs"} & model.keys()
        assert client.get("/v1/models/identity-a").json()["manifest"]["attention"] is None
        assert client.post("/v1/classify", content=picture(7)).status_code == 200
        assert 'stridevit_model_info{model="identity-a",variant="",version="1"} 1.0' in client.get("/metrics").text
