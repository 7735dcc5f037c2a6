"""The wire format of /v2: the Open Inference Protocol's tensors, in JSON and in Triton's binary form.

Knows no HTTP framework and no model. https://github.com/kserve/open-inference-protocol, and the extensions
binary_tensor_data, classification, schedule_policy and parameters of
https://github.com/triton-inference-server/server/tree/main/docs/protocol.
"""

import base64
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import BadRequest
from service.http.compression import compress, decompress
from service.http.json_numbers import lift_data

__all__ = ["Asked", "AskedOutput", "OutputName", "answer", "compress", "decompress", "parse"]

OutputName = Literal["logits", "probabilities"]

_OUTPUTS: tuple[OutputName, ...] = ("logits", "probabilities")
_INPUT = "image"
_MAX_JSON_VALUES = 100_000
_MAX_INT = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedOutput:
    """One output as it shall be sent."""

    name: OutputName
    binary: bool
    classification: int
    """How many classes, best first, to send as `value:index:label` in place of the tensor; 0 for the tensor itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """An inference request. Exactly one of `pixels` and `encoded` is set."""

    id: str | None
    pixels: npt.NDArray[np.uint8] | None
    """uint8 (n,H,W,3), where the input came as UINT8. A view of the body where it was binary."""
    encoded: list[bytes] | None
    """Encoded images, where the input came as BYTES."""
    outputs: tuple[AskedOutput, ...]
    timeout_us: int | None
    """The request's time limit in microseconds; None for none (Triton's 0)."""
    priority: int
    """0 is the default; 1 the highest, 2 the next."""
    parameters: dict[str, Any]
    """All other request parameters: strings, finite numbers and booleans."""


def parse(
    body: bytes, *, header_length: int | None, image_shape: tuple[int, int, int], max_images_per_request: int
) -> Asked:
    """Read an inference request of 1 to `max_images_per_request` images. Raises BadRequest with the place of the fault.

    `header_length` is the request's Inference-Header-Content-Length: None for JSON alone, N for JSON of N bytes and
    then binary data, 0 for nothing but the pixels of n images. JSON carries encoded images (BYTES) as base64 strings.
    """
    if header_length == 0:
        # Triton: a raw request gets all outputs in binary.
        return Asked(
            id=None,
            pixels=_raw_pixels(body, image_shape, max_images_per_request),
            encoded=None,
            outputs=_asked_outputs(None, binary=True),
            timeout_us=None,
            priority=0,
            parameters={},
        )
    if header_length is not None and not 0 < header_length <= len(body):
        raise BadRequest(f"Inference-Header-Content-Length: {header_length} is not between 0 and {len(body)}, the body")
    request, numbers = _json(body if header_length is None else body[:header_length])
    data = memoryview(body)[len(body) if header_length is None else header_length :]
    tensor = _only_input(request, image_shape, max_images_per_request)
    parameters = dict(request.parameters)
    binary_output = _flag(parameters, "binary_data_output", "parameters")
    timeout_us, priority = (_count(parameters, name, "parameters") or 0 for name in ("timeout", "priority"))
    # This service keeps no state between requests: sequences mean nothing to it and do no harm.
    for name in ("sequence_id", "sequence_start", "sequence_end"):
        parameters.pop(name, None)
    for name, value in parameters.items():
        if not isinstance(value, str) and not (isinstance(value, int | float) and abs(value) <= _MAX_INT):
            raise BadRequest(f"parameters.{_short(name, quoted=False)}: must be a string, a number or a boolean")
    binary = _binary_data(tensor, data, has_header=header_length is not None)
    pixels: npt.NDArray[np.uint8] | None = None
    encoded: list[bytes] | None = None
    if tensor.datatype == "UINT8":
        lifted = numbers if tensor.data == [None] else None
        pixels = _pixels(tensor, lifted if binary is None else binary)
    else:
        encoded = _decode_strings(tensor) if binary is None else _split_strings(binary, tensor.shape[0])
    return Asked(
        id=request.id,
        pixels=pixels,
        encoded=encoded,
        outputs=_asked_outputs(request.outputs, binary=bool(binary_output)),
        timeout_us=timeout_us or None,
        priority=priority,
        parameters=parameters,
    )


def answer(
    *,
    id: str | None,  # noqa: A002 (the protocol's name)
    model_name: str,
    model_version: str,
    outputs: Sequence[AskedOutput],
    logits: npt.NDArray[np.float32],
    probabilities: npt.NDArray[np.float32],
    labels: Sequence[str],
    parameters: dict[str, Any] | None = None,
) -> tuple[bytes, int | None]:
    """The body of a response to (n, classes) `logits` and `probabilities`, and the length of its JSON if binary data
    follows, else None.
    """
    tensors: list[dict[str, Any]] = []
    binary: list[bytes | memoryview] = []
    for output in outputs:
        values = logits if output.name == "logits" else probabilities
        data: bytes | memoryview | list[Any]
        if output.classification:
            strings, shape = _classified(values, output.classification, labels)
            data = _join_strings(strings) if output.binary else strings
            datatype = "BYTES"
        else:
            little_endian = np.ascontiguousarray(values, dtype="<f4")
            shape, datatype = list(values.shape), "FP32"
            data = little_endian.data.cast("B") if output.binary else little_endian.ravel().tolist()
        tensor: dict[str, Any] = {"name": output.name, "datatype": datatype, "shape": shape}
        if isinstance(data, list):
            tensor["data"] = data
        else:
            tensor["parameters"] = {"binary_data_size": len(data)}
            binary.append(data)
        tensors.append(tensor)
    head: dict[str, Any] = {} if id is None else {"id": id}
    head |= {"model_name": model_name, "model_version": model_version}
    if parameters:
        head["parameters"] = parameters
    text = json.dumps({**head, "outputs": tensors}, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return b"".join([text, *binary]), len(text) if binary else None


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Input(_Part):
    name: str
    shape: Annotated[list[Annotated[int, Field(ge=0, le=_MAX_INT)]], Field(max_length=8)]
    datatype: str
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class _Output(_Part):
    name: OutputName
    parameters: dict[str, Any] = {}


class _Request(_Part):
    id: str | None = None
    parameters: dict[str, Any] = {}
    inputs: Annotated[list[_Input], Field(max_length=64)]
    outputs: Annotated[list[_Output], Field(max_length=64)] | None = None


def _json(text: bytes) -> tuple[_Request, npt.NDArray[np.uint8] | None]:
    """The request, and the numbers of its input's data if they are pixels."""
    if not text.strip():
        raise BadRequest("malformed inference request: the body is empty")
    rest, numbers = lift_data(text)
    if rest.count(b",") + rest.count(b"[") + rest.count(b"{") > _MAX_JSON_VALUES:
        raise BadRequest(
            f"malformed inference request: over {_MAX_JSON_VALUES:,} JSON values beside one flat or regularly nested "
            "array of whole numbers from 0 to 255"
        )
    try:
        return _Request.model_validate_json(rest), numbers
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = _short(".".join(str(step) for step in first["loc"]), quoted=False)
        raise BadRequest(f"malformed inference request: {place + ': ' if place else ''}{first['msg']}") from error


def _only_input(request: _Request, image_shape: tuple[int, int, int], max_images_per_request: int) -> _Input:
    pixels = f"datatype UINT8, shape [n,{','.join(map(str, image_shape))}]"
    expected = f"expected one input '{_INPUT}', {pixels}, or datatype BYTES, shape [n] or [n,1]"
    if len(request.inputs) != 1:
        raise BadRequest(f"inputs: {expected}; got {len(request.inputs)} inputs")
    tensor = request.inputs[0]
    shapes = {"UINT8": [list(image_shape)], "BYTES": [[], [1]]}
    got = f"got {_short(tensor.name)} {_short(tensor.datatype, quoted=False)} {tensor.shape}"
    if tensor.name != _INPUT or not tensor.shape or tensor.shape[1:] not in shapes.get(tensor.datatype, []):
        raise BadRequest(f"inputs.0: {expected}; {got}")
    _check_images(tensor.shape[0], max_images_per_request, "inputs.0.shape: ")
    return tensor


def _binary_data(tensor: _Input, data: memoryview, *, has_header: bool) -> memoryview | None:
    """The input's binary data; None if it has JSON data."""
    _refuse_shared_memory(tensor.parameters, "inputs.0")
    size = _count(tensor.parameters, "binary_data_size", "inputs.0.parameters")
    if (size is None) == (tensor.data is None):
        raise BadRequest("inputs.0: give either 'data' or the parameter 'binary_data_size'")
    if size is not None and not has_header:
        raise BadRequest("inputs.0.parameters.binary_data_size: needs the header Inference-Header-Content-Length")
    if len(data) != (size or 0):
        raise BadRequest(f"{len(data)} bytes follow the JSON; its inputs declare {size or 0} (binary_data_size)")
    return None if size is None else data


def _pixels(tensor: _Input, data: npt.NDArray[np.uint8] | memoryview | None) -> npt.NDArray[np.uint8]:
    needed = math.prod(tensor.shape)
    if isinstance(data, memoryview):
        if len(data) != needed:
            raise BadRequest(f"inputs.0: shape {tensor.shape} needs {needed} bytes, got {len(data)}")
        return np.frombuffer(data, dtype=np.uint8).reshape(tensor.shape)
    if data is None or len(data) != needed:
        got = "" if data is None else f", got {len(data)}"
        raise BadRequest(
            f"inputs.0.data: must be {needed} whole numbers from 0 to 255, flat or nested in row-major order{got}"
        )
    return data.reshape(tensor.shape)


def _raw_pixels(body: bytes, image_shape: tuple[int, int, int], max_images_per_request: int) -> npt.NDArray[np.uint8]:
    size = math.prod(image_shape)
    images, rest = divmod(len(body), size)
    if rest:
        raise BadRequest(
            f"a raw body (Inference-Header-Content-Length: 0) is the pixels of n images, n times {size} bytes "
            f"({'·'.join(map(str, image_shape))}); got {len(body)}"
        )
    _check_images(images, max_images_per_request, "")
    return np.frombuffer(body, dtype=np.uint8).reshape(images, *image_shape)


def _check_images(images: int, max_images_per_request: int, place: str) -> None:
    if not 1 <= images <= max_images_per_request:
        raise BadRequest(f"{place}a request carries 1 to {max_images_per_request} images; got {images}")


def _decode_strings(tensor: _Input) -> list[bytes]:
    """The images in JSON data of shape [n] or [n,1], flat or nested: strings in base64."""
    data = tensor.data or []
    if len(tensor.shape) == 2 and all(isinstance(item, list) and len(item) == 1 for item in data):
        data = [item[0] for item in data]
    if len(data) != tensor.shape[0]:
        raise BadRequest(f"inputs.0.data: shape {tensor.shape} needs {tensor.shape[0]} strings, got {len(data)}")
    images = []
    for place, item in enumerate(data):
        try:
            images.append(base64.b64decode(item, validate=True))
        except (TypeError, ValueError) as error:
            raise BadRequest(f"inputs.0.data.{place}: must be an encoded image as a string in base64") from error
    return images


def _split_strings(data: memoryview, images: int) -> list[bytes]:
    """The elements of a binary BYTES tensor: each a 4-byte little-endian length, and so many bytes."""
    strings: list[bytes] = []
    offset = 0
    while offset < len(data) and len(strings) < images:
        end = offset + 4
        if end <= len(data):
            end += int.from_bytes(data[offset:end], "little")
        if end > len(data) or end < offset + 4:
            raise BadRequest(f"inputs.0: element {len(strings)} of the binary data runs beyond its end")
        strings.append(bytes(data[offset + 4 : end]))
        offset = end
    if len(strings) != images or offset != len(data):
        raise BadRequest(
            f"inputs.0: the binary data must be {images} strings and nothing else; "
            f"got {len(strings)} and {len(data) - offset} bytes more"
        )
    return strings


def _join_strings(strings: list[str]) -> bytes:
    encoded = [string.encode() for string in strings]
    return b"".join(part for string in encoded for part in (struct.pack("<I", len(string)), string))


def _asked_outputs(outputs: list[_Output] | None, *, binary: bool) -> tuple[AskedOutput, ...]:
    if not outputs:
        return tuple(AskedOutput(name=name, binary=binary, classification=0) for name in _OUTPUTS)
    asked: list[AskedOutput] = []
    for place, output in enumerate(outputs):
        where = f"outputs.{place}.parameters"
        if any(output.name == other.name for other in asked):
            raise BadRequest(f"outputs.{place}: '{output.name}' is asked for twice")
        _refuse_shared_memory(output.parameters, f"outputs.{place}")
        own = _flag(output.parameters, "binary_data", where)
        classes = _count(output.parameters, "classification", where) or 0
        asked.append(AskedOutput(name=output.name, binary=binary if own is None else own, classification=classes))
    return tuple(asked)


def _classified(values: npt.NDArray[np.float32], count: int, labels: Sequence[str]) -> tuple[list[str], list[int]]:
    """The `count` highest values of each row as Triton writes them, `value:index:label`, and the shape [n,count]."""
    best = np.argsort(-values, axis=1, kind="stable")[:, :count]
    strings = [
        f"{row[index]:f}:{index}:{labels[index]}" for row, places in zip(values, best, strict=True) for index in places
    ]
    return strings, list(best.shape)


def _refuse_shared_memory(parameters: dict[str, Any], place: str) -> None:
    if any(name.startswith("shared_memory_") for name in parameters):
        raise BadRequest(f"{place}: shared memory is not offered: send tensors in the body")


def _flag(parameters: dict[str, Any], name: str, place: str) -> bool | None:
    value = parameters.pop(name, None)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{place}.{name}: must be true or false")
    return value


def _count(parameters: dict[str, Any], name: str, place: str) -> int | None:
    value = parameters.pop(name, None)
    if value is not None and not (type(value) is int and 0 <= value <= _MAX_INT):
        raise BadRequest(f"{place}.{name}: must be a whole number, 0 or more")
    return value


def _short(text: str, *, quoted: bool = True) -> str:
    """A client's own text for a message: no longer than one reads."""
    short = text if len(text) <= 60 else text[:57] + "..."
    return repr(short) if quoted else short
