"""Requests for images, and what their answers say.

`v1` posts the image file itself. `v2` is the Open Inference Protocol with binary tensors: the generator decodes before
the load begins, with the service's own code, and the server only infers.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote, urlencode

from loadtests.experiment.http_get import get_json
from loadtests.generator.load_result import Protocol
from loadtests.generator.readers import Label, Payload, PayloadError
from service.images import MAX_PIXELS, decode
from service.manifest import Preprocessing

_HEADERS = {"Content-Type": "application/octet-stream", "Accept-Encoding": "identity"}


@dataclass(frozen=True, slots=True)
class Request:
    """One request, ready to be sent."""

    body: bytes = field(repr=False)
    headers: dict[str, str]
    label: Label


@dataclass(frozen=True)
class Target:
    """Where the requests go."""

    path: str
    requests: list[Request] = field(repr=False)
    protocol: Protocol

    def correct(self, request: Request, answer: bytes) -> int | None:
        """1 if the answer's first class is right, 0 if not; None if the image has no label or the answer no class."""
        if request.label is None:
            return None
        try:
            return int(request.label in self._first_class(json.loads(answer)))
        except (ValueError, LookupError, TypeError, AttributeError):
            return None

    def _first_class(self, answer: Any) -> tuple[int, str | None]:
        if self.protocol == "v1":
            first = answer["results"][0]["predictions"][0]
            return first["index"], first["label"]
        _, index, *name = answer["outputs"][0]["data"][0].split(":", 2)
        return int(index), name[0] if name else None


def target(
    payloads: Sequence[Payload],
    *,
    protocol: Protocol,
    model: str,
    host: str,
    deadline_ms: float | None = None,
    reuse_connections: bool = True,
) -> Target:
    """Prepare the requests; for `v2` the server at `host` is asked for the model's input and preprocessing.

    Raises PayloadError if the server does not know the model or an image cannot be decoded.
    """
    query = {} if deadline_ms is None else {"deadline_ms": f"{deadline_ms:g}"}
    if protocol == "v1":
        # Without a name the server's default model answers.
        path, query = "/v1/classify", {**({"model": model} if model else {}), **query}
        requests = [Request(payload.data, _HEADERS, payload.label) for payload in payloads]
    else:
        path = f"/v2/models/{quote(model)}/infer"
        name, preprocessing = _input(host.rstrip("/"), quote(model))
        requests = [_tensor_request(payload, name, preprocessing) for payload in payloads]
    if not reuse_connections:
        requests = [replace(one, headers={**one.headers, "Connection": "close"}) for one in requests]
    return Target(f"{path}?{urlencode(query)}" if query else path, requests, protocol)


def _input(host: str, model: str) -> tuple[str, Preprocessing]:
    """Name of the input tensor, and the preprocessing for it: as the service says, else the largest centred square."""
    url = f"{host}/v2/models/{model}"
    try:
        tensor: dict[str, Any] = get_json(url, timeout=30)["inputs"][0]
        _, height, width, channels = tensor["shape"]
    except (OSError, ValueError, LookupError) as error:
        raise PayloadError(f"{url} does not describe the model's image input: {error}") from error
    if tensor["datatype"] != "UINT8" or height != width or channels != 3:
        raise PayloadError(f"{url}: images are sent as UINT8 [batch, size, size, 3], the model expects {tensor}")
    try:
        manifest = get_json(f"{host}/v1/models/{model}", timeout=30)["manifest"]
        preprocessing = Preprocessing.model_validate(manifest["preprocessing"])
    except (OSError, ValueError, LookupError, TypeError):
        none = (0.0, 0.0, 0.0)
        preprocessing = Preprocessing(resize=height, crop=height, interpolation="bicubic", mean=none, std=none)
    return tensor["name"], preprocessing


def _tensor_request(payload: Payload, name: str, preprocessing: Preprocessing) -> Request:
    try:
        pixels = decode(payload.data, preprocessing, max_pixels=MAX_PIXELS)
    except Exception as error:  # the service's errors, which are not ours to name
        raise PayloadError(f"{payload.name} cannot be decoded, and so not be sent as a tensor: {error}") from error
    tensor = {
        "name": name,
        "datatype": "UINT8",
        "shape": [1, *pixels.shape],
        "parameters": {"binary_data_size": pixels.nbytes},
    }
    output = {"name": "probabilities", "parameters": {"classification": 1, "binary_data": False}}
    header = json.dumps({"inputs": [tensor], "outputs": [output]}).encode()
    headers = {**_HEADERS, "Inference-Header-Content-Length": str(len(header))}
    return Request(header + pixels.tobytes(), headers, payload.label)
