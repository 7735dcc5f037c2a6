"""Does the service's memory stay flat? Many requests with images of mixed sizes, while PSS is sampled.

Threads and a plain HTTP client send them: how fast that goes does not matter here.
"""

import io
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from loadtests.experiment.model import Measurement, Progress
from loadtests.experiment.server import service_for
from loadtests.generator.payloads import read_payloads
from loadtests.generator.readers import Payload, PayloadError
from loadtests.report.rendering import Table, print_tables, write_report

CONNECTIONS = 16
SAMPLES = 200
"""PSS is read this many times, or after every request if they are fewer."""
FEWEST_SAMPLES = 50
"""With fewer, an interrupted run has nothing to report."""
LONGER_SIDES = (48, 160, 320, 640, 1024, 1600)
"""Pixels."""

_ORIGINALS = 8
_BATCH = 2000
"""Requests that wait for a connection at most, so that a long run does not take all of them into memory at once."""
_ANSWER_SECONDS = 60


@dataclass(kw_only=True)
class Soak(Measurement):
    """Memory by the number of requests sent so far."""

    model: str
    planned_requests: int
    samples: list[tuple[int, int]] = field(default_factory=list, repr=False)
    """(requests sent, PSS in bytes), ascending; the first one is of the fresh process."""
    failed_requests: int = 0

    @property
    def measured(self) -> bool:
        """Whether there are enough samples to judge by."""
        return len(self.samples) >= min(FEWEST_SAMPLES, self.planned_requests)

    @property
    def requests(self) -> int:
        """Requests sent so far."""
        return self.samples[-1][0]

    def median_bytes(self, begin: float, end: float) -> float:
        """Median memory over a part of the requests: 0 to 0.1 is the first tenth."""
        begin, end = begin * self.requests, end * self.requests
        return float(np.median([used for number, used in self.samples if begin < number <= end]))

    def figures(self) -> dict[str, float]:
        """What the samples show; `growth` is that of the last tenth over the first, less 1."""
        first, last = self.median_bytes(0, 0.1), self.median_bytes(0.9, 1)
        peak = max(used for _, used in self.samples)
        return {
            "idle_bytes": self.samples[0][1],
            "first_bytes": first,
            "last_bytes": last,
            "peak_bytes": peak,
            "growth": last / first - 1,
        }


def send(
    found: Soak, progress: Progress, *, repository: Path, data: Path | None, out: Path, flags: Sequence[str]
) -> None:
    """Send the planned requests to a fresh service, and fill `found`. Raises PayloadError or ServerError."""
    out.mkdir(parents=True, exist_ok=True)
    images, found.payloads = mixed_sizes(data)
    limits, every = httpx.Limits(max_connections=CONNECTIONS), max(1, found.planned_requests // SAMPLES)
    with (
        service_for(found.model, repository=repository, log=out / "server.log", arguments=flags) as server,
        # A proxy that the environment names has no part in this.
        httpx.Client(base_url=server.url, limits=limits, timeout=_ANSWER_SECONDS, trust_env=False) as client,
        ThreadPoolExecutor(CONNECTIONS) as pool,
    ):

        def is_answered(number: int) -> bool:
            try:
                image = images[number % len(images)]
                return client.post("/v1/classify", params={"model": found.model}, content=image).status_code == 200
            except httpx.TransportError:
                return False

        found.samples.append((0, server.memory_bytes()))
        try:
            for begin in range(0, found.planned_requests, _BATCH):
                batch = range(begin, min(begin + _BATCH, found.planned_requests))
                for number, ok in enumerate(pool.map(is_answered, batch), begin + 1):
                    found.failed_requests += not ok
                    if not ok and not server.alive():
                        raise server.died(f"after {number} requests")
                    if number % every == 0 or number == found.planned_requests:
                        found.samples.append((number, server.memory_bytes()))
                        progress.step("requests", number, found.planned_requests)
        finally:
            pool.shutdown(cancel_futures=True)


def mixed_sizes(data: Path | None) -> tuple[list[bytes], str]:
    """Eight images of `data`, or generated ones, each as a JPEG of six sizes, shuffled; and what they are, in words."""
    originals = [_opened(payload) for payload in read_payloads(data, limit=_ORIGINALS)]
    images = []
    for image, side in itertools.product(originals, LONGER_SIDES):
        scale = side / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        buffer = io.BytesIO()
        image.resize(size, Image.Resampling.BILINEAR).save(buffer, format="JPEG", quality=85)
        images.append(buffer.getvalue())
    order = np.random.default_rng(0).permutation(len(images))
    kilobytes = sorted(len(image) / 1000 for image in images)
    sides = ", ".join(map(str, LONGER_SIDES))
    return [images[index] for index in order], (
        f"{len(images)} JPEGs of {sides} pixels on the longer side, {kilobytes[0]:.1f} to {kilobytes[-1]:.1f} kB"
    )


def _opened(payload: Payload) -> Image.Image:
    try:
        with Image.open(io.BytesIO(payload.data)) as image:
            return image.convert("RGB")
    except OSError as error:
        raise PayloadError(f"an image of --data cannot be read, and so not be resized: {error}") from error


def write(found: Soak, out: Path) -> Path:
    """Write report.md and results.json in `out`, print the figures, and return the report's path."""
    figures = found.figures()
    early = f" Ended early: {found.ended_early}." if found.ended_early else ""
    summary = (
        f"{found.model}: {found.requests:,} requests over {CONNECTIONS} connections, {found.failed_requests} of them "
        f"failed; {found.payloads}.{early}"
    )
    names = {
        "fresh process": "idle_bytes",
        "first tenth of the requests, median": "first_bytes",
        "last tenth of the requests, median": "last_bytes",
        f"largest of {len(found.samples)} samples": "peak_bytes",
    }
    rows = [(name, f"{figures[key] / 1e6:.1f} MB") for name, key in names.items()]
    rows.append(("growth from the first to the last tenth", f"{figures['growth']:+.2%}"))
    table = Table(title=summary, headings=("memory (PSS of the process tree)", ""), rows=rows)
    sent = {name: getattr(found, name) for name in ("model", "planned_requests", "requests", "failed_requests")}
    write_report(
        out,
        document={"schema_version": 2, **found.facts(), **sent, **figures, "samples": found.samples},
        template="soak.md.j2",
        command=found.command,
        environment=found.environment,
        summary=summary,
        memory=table,
    )
    print_tables(table, width=100)
    return out / "report.md"
