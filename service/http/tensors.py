"""The wire format of /v2: the Open Inference Protocol's tensors, in JSON and in Triton's binary form.

Independent of any HTTP framework or model. https://github.com/kserve/open-inference-protocol, and the extensions
binary_tensor_data, classification, schedule_policy and parameters of
https://github.com/triton-inference-server/server/tree/main/docs/protocol.
"""

import json
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from service.errors import BadRequest
from service.http.json_pixels import PLACEHOLDER, count_up_to, read_pixels, without_pixels
from service.pipeline import Inputs, ranked

T = TypeVar("T")
OutputName = Literal["logits", "probabilities"]
Pixels = npt.NDArray[np.uint8]

_OUTPUTS: tuple[OutputName, ...] = ("logits", "probabilities")
_INPUT = "image"
_MAX_STRINGS = 50_000
_MAX_SHAPE_BYTES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedOutput:
    """One output, and how it is to be sent."""

    name: OutputName
    binary: bool
    classification: int
    """How many classes, best first, to send as `value:index:label` instead of the tensor; 0 for the tensor itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceRequest:
    """An inference request of one input."""

    id: str | None
    inputs: Inputs
    """Encoded images for a BYTES input; pixels for a UINT8 one, which are a view of the body where that is binary."""
    outputs: tuple[RequestedOutput, ...]


def parse(
    body: bytes, *, header_length: int | None, image_shape: tuple[int, int, int], max_images: int
) -> InferenceRequest:
    """Read an inference request of 1 to `max_images` images. Raises BadRequest that names the place of the fault.

    `header_length` is the request's Inference-Header-Content-Length: None for JSON alone, N for JSON of N bytes and
    then binary data, 0 for nothing but the pixels of n images. JSON carries encoded images (BYTES) as base64 strings.
    """
    if header_length == 0:
        # As in Triton, a raw request gets all outputs in binary.
        return InferenceRequest(
            id=None,
            inputs=Inputs(images=_raw_pixels(body, image_shape, max_images)),
            outputs=_requested_outputs(None, binary=True),
        )
    if header_length is not None and not 0 < header_length <= len(body):
        raise BadRequest(f"Inference-Header-Content-Length: {header_length} is not between 0 and {len(body)}, the body")
    text = body if header_length is None else body[:header_length]
    binary = memoryview(body)[len(text) :]
    outline, numbers = without_pixels(text)
    request = _parse_json(outline)
    parameters = request.parameters
    tensor, shape = _only_input(request, image_shape, max_images)
    data = bytes(tensor.data)
    if numbers is not None and data == PLACEHOLDER:
        data = numbers
    size = _binary_size(tensor, binary, in_json=data != b"null", has_header=header_length is not None)
    images: list[bytes] | Pixels
    if tensor.datatype == "UINT8":
        images = read_pixels(data, shape, "inputs.0.data") if size is None else _pixels(binary, shape)
    else:
        images = _decode_strings(data, shape) if size is None else _split_strings(binary, shape[0])
    return InferenceRequest(
        id=request.id,
        # In Triton's protocol a timeout of 0 is none, and priority 1 is the highest.
        inputs=Inputs(
            images=images,
            seconds=parameters.timeout / 1e6 if parameters.timeout else None,
            priority="batch" if (parameters.priority or 0) > 1 else None,
        ),
        outputs=_requested_outputs(request.outputs, binary=bool(parameters.binary_data_output)),
    )


def answer(
    *,
    id: str | None,  # noqa: A002 (the protocol's name)
    model_name: str,
    model_version: str,
    outputs: Sequence[RequestedOutput],
    logits: npt.NDArray[np.float32],
    probabilities: npt.NDArray[np.float32],
    labels: Sequence[str],
    parameters: dict[str, Any] | None = None,
) -> tuple[bytes, int | None]:
    """The body of a response with (n, classes) `logits` and `probabilities`, and the length of its JSON if binary data
    follows, else None.
    """
    tensors: list[dict[str, Any]] = []
    binary: list[bytes | memoryview] = []
    for output in outputs:
        values = logits if output.name == "logits" else probabilities
        data: bytes | memoryview | list[Any]
        if output.classification:
            strings, shape = _classified(values, output.classification, labels)
            data, datatype = strings, "BYTES"
            if output.binary:
                data = b"".join(struct.pack("<I", len(part)) + part for part in map(str.encode, strings))
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


_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Parameters(msgspec.Struct):
    """Parameters of a request, an input or an output. Others, such as those of sequences, are ignored."""

    timeout: _Count | None = None
    """Microseconds."""
    priority: _Count | None = None
    classification: _Count | None = None
    binary_data: bool | None = None
    binary_data_output: bool | None = None
    binary_data_size: _Count | None = None
    shared_memory_region: str | None = None


class _Input(msgspec.Struct):
    name: str
    shape: msgspec.Raw
    datatype: str
    parameters: _Parameters = msgspec.field(default_factory=_Parameters)
    data: msgspec.Raw = msgspec.Raw(b"null")


class _Output(msgspec.Struct):
    name: OutputName
    parameters: _Parameters = msgspec.field(default_factory=_Parameters)


class _Request(msgspec.Struct):
    inputs: list[_Input]
    id: str | None = None
    parameters: _Parameters = msgspec.field(default_factory=_Parameters)
    outputs: list[_Output] | None = None


_REQUEST = msgspec.json.Decoder(_Request)
_SHAPE = msgspec.json.Decoder(list[_Count])
# These decode the base64 too.
_STRINGS = msgspec.json.Decoder(list[bytes])
_NESTED_STRINGS = msgspec.json.Decoder(list[tuple[bytes]])


def _parse_json(text: bytes) -> _Request:
    if not text or text.isspace():
        raise BadRequest("malformed inference request: the body is empty")
    # Each value may cost an object, and parsing cannot be split. Only a placeholder is left of the pixels.
    if count_up_to(text, b'",[{', 3 * _MAX_STRINGS) > 3 * _MAX_STRINGS:
        raise BadRequest(
            f"malformed inference request: over {_MAX_STRINGS:,} strings or other values beside the pixels"
        )
    return _decoded(_REQUEST, text, "")


def _decoded(decoder: msgspec.json.Decoder[T], text: bytes, place: str) -> T:
    try:
        return decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # msgspec's place, such as `$.inputs[0].name`, is written as inputs.0.name and after `place`.
        message, _, path = str(error).partition(" - at `$")
        path = (place + re.sub(r"\[(\d+)\]", r".\1", path.rstrip("`"))).lstrip(".")
        raise BadRequest(f"malformed inference request: {path + ': ' if path else ''}{_short(message)}") from error


def _refuse_shared_memory(parameters: _Parameters, place: str) -> None:
    if parameters.shared_memory_region is not None:
        raise BadRequest(f"{place}: shared memory is not offered: send tensors in the body")


def _only_input(
    request: _Request, image_shape: tuple[int, int, int], max_images: int
) -> tuple[_Input, tuple[int, ...]]:
    pixels = f"datatype UINT8, shape [n,{','.join(map(str, image_shape))}]"
    expected = f"expected one input '{_INPUT}', {pixels}, or datatype BYTES, shape [n] or [n,1]"
    if len(request.inputs) != 1:
        raise BadRequest(f"inputs: {expected}; got {len(request.inputs)} inputs")
    tensor = request.inputs[0]
    sizes = _decoded(_SHAPE, bytes(tensor.shape)[:_MAX_SHAPE_BYTES], "inputs.0.shape")
    shape = tuple(sizes)
    shapes: dict[str, list[tuple[int, ...]]] = {"UINT8": [image_shape], "BYTES": [(), (1,)]}
    if tensor.name != _INPUT or not shape or shape[1:] not in shapes.get(tensor.datatype, []):
        raise BadRequest(
            f"inputs.0: {expected}; got {_short(tensor.name)!r} {_short(tensor.datatype)} {_short(str(list(shape)))}"
        )
    _check_count(shape[0], max_images, "inputs.0.shape: ")
    return tensor, shape


def _binary_size(tensor: _Input, binary: memoryview, *, in_json: bool, has_header: bool) -> int | None:
    """The checked size of the input's binary data; None if its data is `in_json`."""
    _refuse_shared_memory(tensor.parameters, "inputs.0")
    size = tensor.parameters.binary_data_size
    if (size is None) != in_json:
        raise BadRequest("inputs.0: give either 'data' or the parameter 'binary_data_size'")
    if size is not None and not has_header:
        raise BadRequest("inputs.0.parameters.binary_data_size: needs the header Inference-Header-Content-Length")
    if len(binary) != (size or 0):
        raise BadRequest(f"{len(binary)} bytes follow the JSON; its inputs declare {size or 0} (binary_data_size)")
    return size


def _pixels(data: memoryview, shape: tuple[int, ...]) -> Pixels:
    if len(data) != math.prod(shape):
        raise BadRequest(f"inputs.0: shape {list(shape)} needs {math.prod(shape)} bytes, got {len(data)}")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _raw_pixels(body: bytes, image_shape: tuple[int, int, int], max_images: int) -> Pixels:
    size = math.prod(image_shape)
    images, rest = divmod(len(body), size)
    if rest:
        raise BadRequest(
            f"a raw body (Inference-Header-Content-Length: 0) is the pixels of n images, n times {size} bytes "
            f"({'·'.join(map(str, image_shape))}); got {len(body)}"
        )
    _check_count(images, max_images, "")
    return np.frombuffer(body, dtype=np.uint8).reshape(images, *image_shape)


def _check_count(images: int, max_images: int, place: str) -> None:
    if not 1 <= images <= max_images:
        raise BadRequest(f"{place}a request carries 1 to {max_images} images; got {images}")


def _decode_strings(array: bytes, shape: tuple[int, ...]) -> list[bytes]:
    """The images in JSON data of shape [n] or [n,1], flat or nested: strings in base64."""
    if len(shape) == 2 and array.find(b"[", 1) > 0:
        images = [image for (image,) in _decoded(_NESTED_STRINGS, array, "inputs.0.data")]
    else:
        images = _decoded(_STRINGS, array, "inputs.0.data")
    if len(images) != shape[0]:
        raise BadRequest(f"inputs.0.data: shape {list(shape)} needs {shape[0]} strings, got {len(images)}")
    return images


def _split_strings(data: memoryview, images: int) -> list[bytes]:
    """The elements of a binary BYTES tensor: each a 4-byte little-endian length, and that many bytes."""
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


def _requested_outputs(outputs: list[_Output] | None, *, binary: bool) -> tuple[RequestedOutput, ...]:
    if not outputs:
        return tuple(RequestedOutput(name=name, binary=binary, classification=0) for name in _OUTPUTS)
    requested: list[RequestedOutput] = []
    for place, output in enumerate(outputs):
        if any(output.name == other.name for other in requested):
            raise BadRequest(f"outputs.{place}: '{output.name}' is requested twice")
        _refuse_shared_memory(output.parameters, f"outputs.{place}")
        own, classes = output.parameters.binary_data, output.parameters.classification or 0
        requested.append(
            RequestedOutput(name=output.name, binary=binary if own is None else own, classification=classes)
        )
    return tuple(requested)


def _classified(values: npt.NDArray[np.float32], count: int, labels: Sequence[str]) -> tuple[list[str], list[int]]:
    """The `count` highest values of each row as Triton writes them, `value:index:label`, and the shape [n,count]."""
    rows = [ranked(row, count) for row in values]
    strings = [f"{value:f}:{index}:{labels[index]}" for row in rows for index, value in row]
    return strings, [len(rows), len(rows[0])]


def _short(text: str) -> str:
    """Text that may hold the client's own, cut to a readable length."""
    return text if len(text) <= 100 else text[:97] + "..."
