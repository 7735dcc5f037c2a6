"""Requests in a closed loop through Ray's front, each of which must get its own answer."""

import asyncio
import io
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from loadtests.faults.client import Client, Reply, Unanswered
from tests.cluster.ray.nodes import PORT

_ANSWER_SECONDS = 150.0
"""More than the longest deadline of the service, and than the time after which HAProxy gives a replica up."""
_BODY_BYTES = (15_000, 30_000, 120_000, 600_000)
"""Sizes of bodies. All fit HAProxy's buffer: what does not cannot be sent to another replica."""
_SEGMENT = 60_000


def pictures() -> list[bytes]:
    """A JPEG of each size; comments make it large, so that all take little time to decode."""
    return [_padded(_jpeg(seed), size) for seed, size in enumerate(_BODY_BYTES)]


@dataclass(slots=True)
class Tally:
    """What became of the requests."""

    answered: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    latencies_ms: list[float] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0

    @property
    def per_second(self) -> float:
        """Answers per second."""
        return self.answered / (self.ended - self.began)

    def as_dict(self) -> dict[str, object]:
        """For a table."""
        return {
            "answered": self.answered,
            "failed": sum(self.failed.values()),
            "failures": dict(self.failed),
            "per_second": round(self.per_second, 2),
            "p50_ms": round(float(np.median(self.latencies_ms)), 1),
            "p99_ms": round(float(np.quantile(self.latencies_ms, 0.99)), 1),
        }


class Load:
    """Asks one model for classes. The same picture must get the same class each time."""

    def __init__(self, model: str, images: list[bytes]) -> None:
        self._model, self._images = model, images
        self._client = Client("127.0.0.1", PORT, answer_seconds=_ANSWER_SECONDS)
        self.sent = 0
        self._classes: dict[int, object] = {}
        self.tally = Tally()

    async def run(self, connections: int, until: Callable[[], bool], *, pause_seconds: float = 0.0) -> Tally:
        """Ask on so many connections at once until told to stop; the tally of all runs so far."""

        async def work() -> None:
            while not until():
                await self.ask()
                await asyncio.sleep(pause_seconds)

        async with asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(work())
        self.tally.ended = time.monotonic()
        return self.tally

    def reaches(self, count: int) -> Callable[[], bool]:
        """Whether so many requests were sent, for `run`."""
        return lambda: self.sent >= count

    async def ask(self) -> None:
        """Send the next request. Every other one has a connection of its own."""
        self.sent += 1
        number, keep = self.sent, self.sent // len(self._images) % 2 == 0
        picture = number % len(self._images)
        began = time.monotonic()
        try:
            reply = await self._client.ask(self._request(number, self._images[picture], keep=keep), keep=keep)
            problem = self._problem(number, picture, reply)
        except Unanswered as error:
            problem = (
                f"{error.outcome}: {error}; {len(self._images[picture])} bytes, {'kept' if keep else 'new'} connection"
            )
        self.tally.latencies_ms.append((time.monotonic() - began) * 1000)
        if problem:
            self.tally.failed[problem] += 1
        else:
            self.tally.answered += 1

    def _request(self, number: int, image: bytes, *, keep: bool) -> bytes:
        lines = [
            f"POST /v1/classify?model={self._model}&deadline_ms=120000 HTTP/1.1", "Host: ray",
            f"X-Request-ID: {number}", "Content-Type: image/jpeg", f"Content-Length: {len(image)}",
            *([] if keep else ["Connection: close"]), "", "",
        ]  # fmt: skip
        return "\r\n".join(lines).encode() + image

    def _problem(self, number: int, picture: int, reply: Reply) -> str | None:
        if reply.status != 200:
            return f"status {reply.status}: {reply.body[:200]!r}"
        if reply.headers.get("x-request-id") != str(number):
            return "the answer to another request"
        found = json.loads(reply.body)["results"][0]["predictions"][0]["index"]
        return None if self._classes.setdefault(picture, found) == found else "the class of another picture"


def _jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def _padded(jpeg: bytes, size: int) -> bytes:
    """With as many comment segments behind its first marker as make `size` bytes of it."""
    made, missing = bytearray(jpeg[:2]), size - len(jpeg)
    while missing > 4:
        part = min(missing, _SEGMENT)
        made += b"\xff\xfe" + (part - 2).to_bytes(2) + bytes(part - 4)
        missing -= part
    return bytes(made + jpeg[2:])
