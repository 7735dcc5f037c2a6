"""Does one service process stay as it is? Many requests, while memory, descriptors, threads and latency are read."""

import io
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from loadtests.experiment.model import Arm, Experiment, Plan, Progress
from loadtests.experiment.sending import send_all
from loadtests.experiment.server import Server
from loadtests.generator.payloads import read_payloads
from loadtests.generator.readers import Payload, PayloadError
from loadtests.soak.watch import Watch

CONNECTIONS = 16
SAMPLES = 200
"""The process is read this many times, or after every request if they are fewer."""
FEWEST_SAMPLES = 50
"""With fewer, an interrupted run has nothing to report."""
LONGER_SIDES = (48, 160, 320, 640, 1024, 1600)
"""Pixels."""

_ORIGINALS = 8


@dataclass(frozen=True, kw_only=True)
class SoakPlan(Plan):
    """One arm, one round, and either a number of requests or a time."""

    rounds: int = 1
    seconds: float = 0.0
    requests: int | None = None
    minutes: float | None = None
    rate: float | None = None
    """Arrivals a second of an open loop; None for a closed one."""
    faults: bool = False


@dataclass(kw_only=True)
class SoakExperiment(Experiment[SoakPlan]):
    """Its only block holds the readings of the process."""

    images: list[bytes] = field(default_factory=list, repr=False)

    @property
    def measured(self) -> bool:
        """Whether the run ended, or there are enough readings to judge by."""
        fewest = min(FEWEST_SAMPLES, self.plan.requests or FEWEST_SAMPLES)
        return any(block.failure is None or len(block.info["samples"]) >= fewest for block in self.blocks)

    def send(self, arm: Arm, server: Server, info: dict[str, Any], progress: Progress) -> None:
        """Send images of mixed sizes; `samples` are readings (`soak.watch`), the first one of the fresh process.

        Raises ServerError if the service dies.
        """
        planned, watch = self.plan.requests, Watch(server)
        seconds = (self.plan.minutes or 0) * 60
        watch.read(0)
        info |= {"samples": watch.readings, "requests": 0, "failed_requests": 0}
        began = read_at = time.monotonic()

        async def send_one(client: httpx.AsyncClient, number: int) -> None:
            nonlocal read_at
            image, sent_at = self.images[number % len(self.images)], time.monotonic()
            try:
                response = await client.post("/v1/classify", params={"model": arm.model}, content=image)
                failed = response.status_code != httpx.codes.OK
            except httpx.TransportError:
                failed = True
            now = time.monotonic()
            if not failed:
                watch.answered((now - sent_at) * 1000)
            info["failed_requests"] += failed
            done = info["requests"] = info["requests"] + 1
            if failed and not server.alive():
                raise server.died(f"after {done} requests")
            by_count = planned and (done % max(1, planned // SAMPLES) == 0 or done == planned)
            if by_count or (seconds and now - read_at >= seconds / SAMPLES):
                watch.read(done)
                read_at = now
                progress.step(*(("requests", done, planned) if planned else ("seconds", now - began, seconds)))

        if planned:
            numbers = iter(range(planned))
        else:
            numbers = itertools.takewhile(lambda _: time.monotonic() - began < seconds, itertools.count())
        send_all(server.url, numbers, send_one, connections=CONNECTIONS)


def figures(samples: list[dict[str, Any]]) -> dict[str, float]:
    """Medians of memory over the first and the last tenth of the requests sent, growth, and the peak."""
    numbers, used = np.array([(sample["requests"], sample["pss_bytes"]) for sample in samples]).T
    tenth = numbers[-1] / 10
    early, late = used[(numbers > 0) & (numbers <= tenth)], used[numbers > 9 * tenth]
    # A short run may have no reading in its first tenth but that of the fresh process.
    first, last = (float(np.median(part if len(part) else used[:1])) for part in (early, late))
    return {
        "idle_bytes": int(used[0]),
        "first_bytes": first,
        "last_bytes": last,
        "peak_bytes": int(used.max()),
        "growth": last / first - 1,
    }


def mixed_sizes(data: Path | None) -> tuple[list[bytes], str]:
    """Eight images of `data`, or generated ones, each as a JPEG of six sizes, shuffled; and what they are, in words."""
    originals = [_opened(payload) for payload in read_payloads(data, limit=_ORIGINALS)]
    images = []
    for image, side in itertools.product(originals, LONGER_SIDES):
        size = [max(1, round(length * side / max(image.size))) for length in image.size]
        buffer = io.BytesIO()
        image.resize(size, Image.Resampling.BILINEAR).save(buffer, format="JPEG", quality=85)
        images.append(buffer.getvalue())
    order = np.random.default_rng(0).permutation(len(images))
    kilobytes, sides = [len(image) / 1000 for image in images], ", ".join(map(str, LONGER_SIDES))
    what = f"{len(images)} JPEGs of {sides} pixels on the longer side"
    return [images[index] for index in order], f"{what}, {min(kilobytes):.1f} to {max(kilobytes):.1f} kB"


def _opened(payload: Payload) -> Image.Image:
    try:
        with Image.open(io.BytesIO(payload.data)) as image:
            return image.convert("RGB")
    except OSError as error:
        raise PayloadError(f"an image of --data cannot be read, and so not be resized: {error}") from error
