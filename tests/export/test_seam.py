"""What training writes into model.json is what the service reads from a manifest: same fields, same values."""

import pytest
from pydantic import BaseModel

from service import manifest
from training import runs

PREPROCESSING = {
    "resize": 36,
    "crop": 32,
    "interpolation": "bicubic",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.3, 0.2, 0.1),
}
CORRECT = {"top1": "oA==", "labels_sha256": "8b" * 32}
ACCURACY = {"dataset": "digits", "split": "test", "n": 4, "top1": 0.5, "top5": 0.75, "correct": CORRECT}


@pytest.mark.parametrize(
    ("trained", "served", "values"),
    [
        (runs.Preprocessing, manifest.Preprocessing, PREPROCESSING),
        (runs.Correct, manifest.Correct, CORRECT),
        (runs.Accuracy, manifest.Accuracy, ACCURACY),
        (runs.Accuracy, manifest.Accuracy, {**ACCURACY, "correct": None}),
    ],
)
def test_training_and_service_have_equal_fields(
    trained: type[BaseModel], served: type[BaseModel], values: dict[str, object]
) -> None:
    assert list(trained.model_fields) == list(served.model_fields)
    written = trained.model_validate(values).model_dump()
    assert served.model_validate(written).model_dump() == written
