"""The models in models/ are those in runs/released/, and are served as torch computes them."""

import json
import os
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch

from export.precision import MAX_ACCURACY_LOSS, TOLERANCES
from service.bundle import Bundle, model_names, read_bundle, versions
from service.engine import Engine
from service.models.verify import verify_golden
from tests.processes import ROOT, serving
from tests.processor import BYTES_SATURATE
from training.data import load_dataset
from training.runs import ModelCard, load_final

MODELS, RELEASED = ROOT / "models", ROOT / "runs" / "released"
NAMES = model_names(MODELS)
IMAGES = int(os.environ.get("STRIDEVIT_AGREEMENT_IMAGES", "1000"))
"""How many of the 10,000 test images are sent; all of them take some minutes."""
IMAGES_PER_REQUEST = 25


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
    small = {f"cifar100-{variant}" for variant in ("mha", "lsra-r2", "lsra-r4", "csra-r2", "csra-r4")}
    all_rungs = small | {"cifar100-full-mha"}
    assert set(NAMES) == all_rungs | {f"{name}-int8" for name in all_rungs}


@pytest.mark.parametrize("name", NAMES)
def test_shipped_model_gives_its_golden_outputs_and_agrees_with_its_run(name: str) -> None:
    assert len(versions(MODELS, name)) == 1
    bundle = newest(name)
    if saturates(bundle):
        pytest.skip("8-bit kernels saturate on a CPU without VNNI")
    verify_golden(bundle, Engine(bundle.model_path))
    _, card = released(bundle)
    assert bundle.manifest.accuracy
    assert card.accuracy
    measured, trained = bundle.manifest.accuracy, card.accuracy
    if bundle.manifest.precision == "fp32":
        assert measured.model_dump() == trained.model_dump()
    assert measured.top1 >= trained.top1 - MAX_ACCURACY_LOSS
    assert (measured.dataset, measured.split, measured.n) == ("cifar100", "test", 10_000)
    assert measured.correct
    assert trained.correct
    assert measured.correct.labels_sha256 == trained.correct.labels_sha256
    tolerances = TOLERANCES[bundle.manifest.precision]
    assert (bundle.manifest.tolerance, bundle.manifest.devices) == (tolerances.golden, tolerances.devices)
    assert bundle.manifest.max_batch == tolerances.max_batch
    assert json.loads((bundle.folder / "manifest.json").read_text())["schema_version"] == 2
    assert bundle.manifest.attention
    assert bundle.manifest.attention.kv_tokens == card.architecture.kv_tokens


def saturates(bundle: Bundle) -> bool:
    """Whether ONNX Runtime's 8-bit kernels may saturate here, so that the service refuses the model."""
    return bundle.manifest.precision == "int8" and BYTES_SATURATE


TestImages = tuple[list[bytes], torch.Tensor, npt.NDArray[np.int64]]


@pytest.fixture(scope="module")
def test_images(data_dir: Path) -> TestImages:
    """The first CIFAR-100 test images as encoded files and as pixels, and their labels."""
    column = pq.read_table(data_dir / "cifar100" / "test-00000-of-00001.parquet").column("img").combine_chunks()
    test = load_dataset("cifar100", data_dir, in_memory=False).test
    pixels = np.stack([np.asarray(test.read(row)) for row in range(IMAGES)])
    return column.field("bytes").to_pylist()[:IMAGES], torch.from_numpy(pixels), test.labels[:IMAGES]


def expected_answers(bundle: Bundle, pixels: torch.Tensor) -> npt.NDArray[np.int64]:
    """Torch's top-1; for int8, which may differ from torch on single images, that of its graph outside the service."""
    chunks = torch.split(pixels, 250)
    if bundle.manifest.precision != "fp32":
        engine = Engine(bundle.model_path)
        return np.concatenate([engine.run(chunk.numpy())[0].argmax(axis=1) for chunk in chunks])
    model, _ = released(bundle)
    with torch.inference_mode():
        return torch.cat([model(chunk).argmax(dim=1) for chunk in chunks]).numpy()


@pytest.mark.slow
def test_served_answers_agree_with_torch_and_with_the_manifest_bits(test_images: TestImages) -> None:
    encoded, pixels, labels = test_images
    with serving(MODELS) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        for name in (name for name in NAMES if not saturates(newest(name))):
            served: list[int] = []
            for start in range(0, IMAGES, IMAGES_PER_REQUEST):
                files = [("image", ("i.png", image)) for image in encoded[start : start + IMAGES_PER_REQUEST]]
                answer = client.post(f"/v1/classify?model={name}&top_k=1", files=files)
                served += [result["predictions"][0]["index"] for result in answer.json()["results"]]
            differences = int((np.array(served) != expected_answers(newest(name), pixels)).sum())
            assert differences <= 3, f"{name}: {differences} of {IMAGES} top-1 differ"
            accuracy = newest(name).manifest.accuracy
            assert accuracy
            bits = accuracy.correct_top1()
            assert bits is not None
            # Whether an image is right can only differ where the answer does.
            assert int(((np.array(served) == labels) != bits[:IMAGES]).sum()) <= 3
