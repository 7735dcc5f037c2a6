"""The models in models/ are those in runs/released/, served as torch computes them."""

import os
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from service.bundle import Bundle, model_names, read_bundle, versions
from service.engine import Engine
from service.golden import prove
from tests.processes import ROOT, serving
from training.data import load_dataset
from training.runs import ModelCard, load_final

MODELS, RELEASED = ROOT / "models", ROOT / "runs" / "released"
NAMES = model_names(MODELS)
IMAGES = int(os.environ.get("STRIDEVIT_AGREEMENT_IMAGES", "2000"))
"""Of the 10,000 test images; all of them take some minutes."""
IN_A_REQUEST = 25


def newest(name: str) -> Bundle:
    return read_bundle(MODELS / name / str(versions(MODELS, name)[-1]))


def released(bundle: Bundle) -> tuple[torch.nn.Module, ModelCard]:
    """The run that the bundle was made from, found by the digest of its weights."""
    for folder in sorted(RELEASED.iterdir()):
        model, card = load_final(folder)
        if card.weights_sha256 == bundle.manifest.source.checkpoint_sha256:
            return model, card
    raise AssertionError(f"{bundle.folder} comes from no run in {RELEASED}")


def test_all_variants_are_shipped() -> None:
    assert {"cifar100-mha", "cifar100-lsra-r2", "cifar100-csra-r2"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_proves_itself_and_says_what_its_run_says(name: str) -> None:
    bundle = newest(name)
    prove(bundle, Engine(bundle.model_path))
    _, card = released(bundle)
    assert bundle.manifest.accuracy
    assert card.accuracy
    assert bundle.manifest.accuracy.model_dump() == card.accuracy.model_dump()
    assert bundle.manifest.accuracy.n == 10_000
    assert bundle.manifest.kv_tokens == card.architecture.kv_tokens


@pytest.fixture(scope="module")
def test_images(data_dir: Path) -> tuple[list[bytes], torch.Tensor]:
    """The first CIFAR-100 test images, as the files they come in and as pixels."""
    column = pq.read_table(data_dir / "cifar100" / "test-00000-of-00001.parquet").column("img").combine_chunks()
    test = load_dataset("cifar100", data_dir, in_memory=False).test
    pixels = np.stack([np.asarray(test.read(row)) for row in range(IMAGES)])
    return column.field("bytes").to_pylist()[:IMAGES], torch.from_numpy(pixels)


def test_served_answers_agree_with_torch(test_images: tuple[list[bytes], torch.Tensor]) -> None:
    encoded, pixels = test_images
    with serving(MODELS) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        for name in NAMES:
            served: list[int] = []
            for start in range(0, IMAGES, IN_A_REQUEST):
                files = [("image", ("i.png", image)) for image in encoded[start : start + IN_A_REQUEST]]
                answer = client.post(f"/v1/classify?model={name}&top_k=1", files=files)
                served += [result["predictions"][0]["index"] for result in answer.json()["results"]]
            model, _ = released(newest(name))
            with torch.inference_mode():
                expected = torch.cat([model(chunk) for chunk in torch.split(pixels, 250)]).argmax(dim=1)
            differences = int((np.array(served) != expected.numpy()).sum())
            assert differences <= 3, f"{name}: {differences} of {IMAGES} top-1 differ from torch"
