"""How an image is asked about: the bytes and headers of a request, and what its answer says.

`v1` posts the image file itself; `v2` is the Open Inference Protocol with binary tensors: there the generator decodes
and resizes, before the load begins, and the server only infers.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
from PIL import Image, ImageOps

from loadtests.experiment.http_get import get_json
from loadtests.generator.load_result import Protocol
from loadtests.generator.payloads import Payload, PayloadError


@dataclass(frozen=True, slots=True)
class Question:
    """One request, ready to be sent."""

    body: bytes = field(repr=False)
    headers: dict[str, str]
    label: int | str | None


@dataclass(frozen=True)
class Target:
    """Where the questions go."""

    path: str
    questions: list[Question] = field(repr=False)
    protocol: Protocol

    def correct(self, question: Question, answer: bytes) -> bool | None:
        """Whether the answer's first class is the right one; None where the image has no label, or none is named."""
        if question.label is None:
            return None
        try:
            return question.label in self._first(json.loads(answer))
        except (ValueError, LookupError, TypeError, AttributeError):
            return None

    def _first(self, said: Any) -> tuple[int, str | None]:
        if self.protocol == "v1":
            first = said["results"][0]["predictions"][0]
            return first["index"], first["label"]
        _, number, *rest = said["outputs"][0]["data"][0].split(":", 2)
        return int(number), rest[0] if rest else None


def target(
    payloads: Sequence[Payload], *, protocol: Protocol, model: str, host: str, deadline_ms: float | None = None
) -> Target:
    """Prepare the questions; for `v2` the server at `host` is asked for the size of its input.

    Raises PayloadError where the server does not know the model, or an image cannot be decoded.
    """
    terms = {} if deadline_ms is None else {"deadline_ms": f"{deadline_ms:g}"}
    if protocol == "v1":
        # Without a name the server's default model answers.
        path = _path("/v1/classify", {**({"model": model} if model else {}), **terms})
        headers = {"Content-Type": "application/octet-stream", "Accept-Encoding": "identity"}
        return Target(path, [Question(payload.data, headers, payload.label) for payload in payloads], protocol)
    name, height, width = _input(host, model)
    path = _path(f"/v2/models/{quote(model)}/infer", terms)
    resize = _resize(host, model) or min(height, width)
    questions = [_tensor(payload, name, resize=resize, height=height, width=width) for payload in payloads]
    return Target(path, questions, protocol)


def _path(path: str, query: dict[str, str]) -> str:
    return f"{path}?{urlencode(query)}" if query else path


def _input(host: str, model: str) -> tuple[str, int, int]:
    address = f"{host.rstrip('/')}/v2/models/{quote(model)}"
    try:
        first: dict[str, Any] = get_json(address, timeout=30)["inputs"][0]
    except (OSError, ValueError, LookupError) as error:
        raise PayloadError(f"{address} does not tell the model's input: {error}") from error
    if first["datatype"] != "UINT8" or len(first["shape"]) != 4:
        raise PayloadError(f"{address}: images are sent as UINT8 [batch, H, W, 3], the model wants {first}")
    return first["name"], first["shape"][1], first["shape"][2]


def _resize(host: str, model: str) -> int | None:
    """To how many pixels the shorter side is resized before the middle is cut out; None where nobody says."""
    try:
        detail = get_json(f"{host.rstrip('/')}/v1/models/{quote(model)}", timeout=30)
        return int(detail["manifest"]["preprocessing"]["resize"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _tensor(payload: Payload, name: str, *, resize: int, height: int, width: int) -> Question:
    try:
        with Image.open(io.BytesIO(payload.data)) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
            scale = resize / min(image.size)
            image = image.resize(
                (max(width, round(image.width * scale)), max(height, round(image.height * scale))),
                Image.Resampling.BICUBIC,
            )
            left, top = (image.width - width) // 2, (image.height - height) // 2
            pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise PayloadError(f"{payload.name} cannot be decoded, and so not be sent as a tensor: {error}") from error
    tensor = {
        "name": name,
        "datatype": "UINT8",
        "shape": [1, height, width, 3],
        "parameters": {"binary_data_size": pixels.nbytes},
    }
    asked = {"name": "probabilities", "parameters": {"classification": 1, "binary_data": False}}
    head = json.dumps({"inputs": [tensor], "outputs": [asked]}).encode()
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
        "Accept-Encoding": "identity",
    }
    return Question(head + pixels.tobytes(), headers, payload.label)
