"""Requests that carry a number in their image, and the number that comes back in the answer.

The model (`loadtests.faults.models`) answers with the colour of the image, so that an answer to another image is
noticed.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE = 8
"""Pixels of a picture's side."""
LABELS = ("red", "green", "blue", "rest")
"""Classes of the model: three bytes of the number, and the remainder to a sum of 1."""
SCALE = 1024
"""A probability is a byte divided by this, which is exact in float32."""
GUILTY = 0xFF0000
"""Numbers from here on make a faulty model fail."""

Form = Literal["v1", "v2-binary", "v2-json"]
FORMS: tuple[Form, ...] = ("v1", "v2-binary", "v2-json")
"""An encoded image, two images as a binary tensor, and one as JSON numbers."""

_PARTNER = 0x400000
"""Difference of the second image of a request from the first: rows of a batch may be swapped too."""
LIMIT = _PARTNER
"""The numbers of all requests are smaller."""


@dataclass(frozen=True, slots=True)
class NumberedRequest:
    """One request, ready to be sent."""

    form: Form
    numbers: tuple[int, ...]
    """Numbers of its images, in order."""
    head: str = field(repr=False)
    """Request line and headers, each with its line end, without the empty line."""
    body: bytes = field(repr=False)

    def encoded(self, *, close: bool) -> bytes:
        """The bytes on the wire; `close` asks the server to close the connection after its answer."""
        last = "Connection: close\r\n" if close else ""
        return f"{self.head}{last}\r\n".encode("ascii") + self.body


def pixels(number: int) -> npt.NDArray[np.uint8]:
    """A picture in one colour, (SIDE, SIDE, 3), whose bytes are the number."""
    colour = number & 255, number >> 8 & 255, number >> 16 & 255
    return np.full((SIDE, SIDE, 3), colour, dtype=np.uint8)


def picture(number: int) -> bytes:
    """The same as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels(number)).save(buffer, "PNG")
    return buffer.getvalue()


def make_request(form: Form, number: int, *, model: str, deadline_ms: float) -> NumberedRequest:
    """The request of that number, which is also its id."""
    headers = {"X-Deadline-Ms": f"{deadline_ms:.0f}", "X-Request-ID": str(number)}
    numbers = (number, number | _PARTNER) if form == "v2-binary" and number < LIMIT else (number,)
    if form == "v1":
        path, body = f"/v1/classify?model={model}&top_k={len(LABELS)}", picture(number)
    else:
        path, images = f"/v2/models/{model}/infer", np.stack([pixels(each) for each in numbers])
        tensor: dict[str, Any] = {"name": "image", "datatype": "UINT8", "shape": list(images.shape)}
        asked: dict[str, Any] = {"name": "logits"}
        if form == "v2-binary":
            tensor["parameters"], asked["parameters"] = {"binary_data_size": images.nbytes}, {"binary_data": True}
        else:
            tensor["data"] = images.ravel().tolist()
        body = json.dumps({"id": str(number), "inputs": [tensor], "outputs": [asked]}).encode()
        if form == "v2-binary":
            headers["Inference-Header-Content-Length"] = str(len(body))
            body += images.tobytes()
    headers |= {"Content-Type": "application/octet-stream", "Content-Length": str(len(body))}
    lines = [f"POST {path} HTTP/1.1", "Host: service", *(f"{name}: {value}" for name, value in headers.items())]
    return NumberedRequest(form, numbers, "".join(f"{line}\r\n" for line in lines), body)


def numbers_in(form: Form, headers: Mapping[str, str], body: bytes) -> tuple[int, ...]:
    """The numbers in an answer with 200, whose headers have lower-case names. Raises ValueError if it holds none."""
    try:
        if form == "v1":
            return tuple(_from_classes(result["predictions"]) for result in json.loads(body)["results"])
        if form == "v2-json":
            data = json.loads(body)["outputs"][0]["data"]
            rows = np.array(data, dtype=np.float64).reshape(-1, len(LABELS))
        else:
            length = int(headers["inference-header-content-length"])
            rows = np.frombuffer(body[length:], dtype="<f4").reshape(-1, len(LABELS))
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"no numbers in an answer to {form}: {body[:200]!r}") from error
    return tuple(_number(row[: len(LABELS) - 1].tolist()) for row in rows)


def id_in(form: Form, headers: Mapping[str, str], body: bytes) -> str | None:
    """The request id in an answer: from the body for `v2-json`, else from the header."""
    if form == "v2-json":
        return str(json.loads(body).get("id"))
    return headers.get("x-request-id")


def _from_classes(predictions: Sequence[Mapping[str, Any]]) -> int:
    by_class = {each["index"]: each["probability"] * SCALE for each in predictions}
    return _number([by_class[index] for index in range(len(LABELS) - 1)])


def _number(channels: Sequence[float]) -> int:
    if any(not value.is_integer() or not 0 <= value <= 255 for value in map(float, channels)):
        raise ValueError(f"{channels} are not three bytes")
    return sum(int(value) << 8 * place for place, value in enumerate(channels))
