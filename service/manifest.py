"""The manifest of a bundle, `manifest.json`: written by export, read by the service."""

import base64
import hashlib
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from service.engine import Device

NAME_PATTERN = r"[a-z0-9]+(?:[-_.][a-z0-9]+)*"
Precision = Literal["fp32", "fp16", "int8", "int8-dynamic"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Preprocessing(_Part):
    """How an encoded image becomes the input: shorter side to `resize`, then the centre `crop` × `crop`.

    `mean` and `std` are for information: normalisation is inside the graph.
    """

    resize: PositiveInt
    crop: PositiveInt
    interpolation: Literal["bicubic", "bilinear"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def geometry(self) -> tuple[int, int, str]:
        """All that the pixels of the input depend on: models with the same geometry see the same picture."""
        return self.resize, self.crop, self.interpolation


class Tensor(_Part):
    """An input or output of the graph; -1 is the batch."""

    name: str
    datatype: Literal["UINT8", "FP32"]
    shape: tuple[int, ...]


class AccuracySummary(_Part):
    """Accuracy on a labelled split, as fractions of its `n` images: of the checkpoint in fp32, else of the graph."""

    dataset: str
    split: str
    n: PositiveInt
    top1: float
    top5: float


class Correct(_Part):
    """Which images of a split are classified correctly, in the split's order."""

    top1: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$")]
    """One bit per image, set where the most probable class is right: base64 of `numpy.packbits`."""
    labels_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """`labels_sha256` of the split: only models with equal digests can be compared image by image."""


class Accuracy(AccuracySummary):
    """Accuracy, and the images behind it where they are known."""

    correct: Correct | None = None

    @classmethod
    def from_correct(
        cls, correct: npt.NDArray[np.bool_], labels: npt.NDArray[np.int64], *, top5: float, dataset: str, split: str
    ) -> Self:
        """Build from whether the top-1 of each image is right and the true class indices, both (n,)."""
        bits = base64.b64encode(np.packbits(correct).tobytes()).decode("ascii")
        return cls(
            dataset=dataset,
            split=split,
            n=len(correct),
            top1=int(np.count_nonzero(correct)) / len(correct),
            top5=top5,
            correct=Correct(top1=bits, labels_sha256=labels_sha256(labels)),
        )

    def correct_top1(self) -> npt.NDArray[np.bool_] | None:
        """Whether the top-1 of each image is right, (n,); None where that is unknown."""
        if self.correct is None:
            return None
        packed = np.frombuffer(base64.b64decode(self.correct.top1, validate=True), dtype=np.uint8)
        return np.unpackbits(packed)[: self.n].astype(np.bool_)

    @model_validator(mode="after")
    def _check_correct(self) -> Self:
        bits = self.correct_top1()
        if self.correct is None or bits is None:
            return self
        size, expected = len(base64.b64decode(self.correct.top1)), -(-self.n // 8)
        if size != expected:
            raise ValueError(f"correct.top1 holds {size} bytes, but {self.n} images take {expected}")
        right = np.count_nonzero(bits)
        if right != round(self.top1 * self.n):
            raise ValueError(f"correct.top1 marks {right} of {self.n} images, but top1 is {self.top1:g}")
        return self


def labels_sha256(labels: npt.NDArray[np.int64]) -> str:
    """Digest of the true class indices of a split in order, (n,), as little-endian int64."""
    return hashlib.sha256(np.ascontiguousarray(labels, dtype="<i8").tobytes()).hexdigest()


class Parity(_Part):
    """Largest differences at export: between ONNX Runtime and torch, and between batch sizes."""

    images: PositiveInt
    """Number of images: test images, and black, white and noise."""
    batch_sizes: tuple[PositiveInt, ...]
    max_abs_logit: NonNegativeFloat
    max_abs_probability: NonNegativeFloat
    max_abs_by_batch: NonNegativeFloat
    """Difference in a logit between an image alone and the same image in a batch."""
    top1_flips: NonNegativeInt
    """Images whose top-1 differs from torch's, at the batch size with the most of them; always 0 in fp32."""


class Tolerance(_Part):
    """Largest allowed differences from the outputs in `golden.npz`."""

    max_abs_logit: NonNegativeFloat
    max_abs_probability: NonNegativeFloat


class Memory(_Part):
    """Memory that the model takes in ONNX Runtime on the CPU, in bytes, where it was measured."""

    weights_bytes: PositiveInt
    """Once it is loaded."""
    arena_bytes: NonNegativeInt
    """Beyond that, for its largest batch."""


class Source(_Part):
    """Origin of the bundle."""

    checkpoint_sha256: str
    git_commit: str | None
    exporter: dict[str, str]
    """Versions of the libraries that made it."""


class Attention(_Part):
    """The attention of a StrideViT model."""

    variant: str
    tokens: PositiveInt
    """Patch tokens N, which are the queries."""
    kv_tokens: PositiveInt
    """Key/value tokens M."""
    stride: PositiveInt | None = None
    """Stride of C-SRA's convolution, per side of the grid."""
    block_size: PositiveInt | None = None
    """Consecutive tokens that L-SRA pools to one."""
    rank: PositiveInt | None = None
    """Width of the latent that C-SRA and L-SRA pool."""


class Manifest(_Part):
    """`manifest.json`, schema version 2. Version 1 is converted when it is read."""

    schema_version: Literal[2] = 2
    name: Annotated[str, Field(pattern=f"^{NAME_PATTERN}$", max_length=100)]
    family: Annotated[str, Field(pattern=f"^{NAME_PATTERN}$", max_length=60)]
    architecture: str
    """Free text, such as `vit-xs`."""
    attention: Attention | None = None
    """Null for a model without attention, or of unknown attention."""
    params: PositiveInt
    """Number of parameters."""
    macs: PositiveInt | None = None
    """Multiply-accumulates per image of the model as trained, matrix products and convolutions only; null if
    unknown. The graph of a compressed variant may need fewer."""
    precision: Precision
    max_batch: PositiveInt | None = None
    """Largest batch in which images do not change each other's outputs; null for no limit."""
    opset: PositiveInt
    op_types: dict[str, PositiveInt]
    """Operator histogram of the graph."""
    preprocessing: Preprocessing
    input: Tensor
    outputs: tuple[Tensor, ...]
    num_classes: PositiveInt
    random_weights: bool = False
    """Whether the model is untrained, for measuring speed and memory: it is never chosen for a family."""
    accuracy: Accuracy | None
    """Null for random weights."""
    parity: Parity
    tolerance: Tolerance
    devices: tuple[Device, ...]
    memory: Memory | None = None
    """Null where it was not measured: then the service estimates it from the size of the graph."""
    source: Source

    @model_validator(mode="before")
    @classmethod
    def _convert(cls, values: Any) -> Any:
        return _from_version_1(values) if isinstance(values, dict) and values.get("schema_version") == 1 else values


_RENAMED_IN_2 = {"preset": "architecture", "parameters": "params", "classes": "num_classes"}


def _from_version_1(values: dict[str, Any]) -> dict[str, Any]:
    """Convert the fields of a version 1 manifest; what is missing or unknown in it is left for validation to report."""
    converted = {_RENAMED_IN_2.get(name, name): value for name, value in values.items()}
    attention = {name: converted.pop(name) for name in Attention.model_fields if name in converted}
    weights = converted.pop("weights", "trained")
    if weights in ("trained", "random"):
        weights = weights == "random"
    return {**converted, "schema_version": 2, "attention": attention, "random_weights": weights}
