"""Does the memory of one service process stay flat? Many requests with images of mixed sizes, while PSS is sampled."""

import io
import itertools
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
from loadtests.report.document import conditions, write_experiment
from loadtests.report.rendering import Table, print_tables

CONNECTIONS = 16
SAMPLES = 200
"""PSS is read this many times, or after every request if they are fewer."""
FEWEST_SAMPLES = 50
"""With fewer, an interrupted run has nothing to report."""
LONGER_SIDES = (48, 160, 320, 640, 1024, 1600)
"""Pixels."""

_ORIGINALS = 8


@dataclass(frozen=True, kw_only=True)
class SoakPlan(Plan):
    """One arm, one round."""

    rounds: int = 1
    seconds: float = 0.0
    requests: int


@dataclass(kw_only=True)
class SoakExperiment(Experiment[SoakPlan]):
    """Its only block holds the memory by the number of requests sent so far."""

    images: list[bytes] = field(repr=False)

    @property
    def measured(self) -> bool:
        """Whether there are enough samples to judge by."""
        return bool(self.blocks) and len(self.blocks[0].info["samples"]) >= min(FEWEST_SAMPLES, self.plan.requests)

    def send(self, arm: Arm, server: Server, info: dict[str, Any], progress: Progress) -> None:
        """Send the planned requests; `samples` are (requests sent, PSS in bytes), the first one of the fresh process.

        Raises ServerError if the service dies.
        """
        planned, samples = self.plan.requests, [(0, server.memory_bytes())]
        info |= {"samples": samples, "requests": 0, "failed_requests": 0}

        async def send_one(client: httpx.AsyncClient, number: int) -> None:
            image = self.images[number % len(self.images)]
            try:
                response = await client.post("/v1/classify", params={"model": arm.model}, content=image)
                failed = response.status_code != httpx.codes.OK
            except httpx.TransportError:
                failed = True
            info["failed_requests"] += failed
            done = info["requests"] = info["requests"] + 1
            if failed and not server.alive():
                raise server.died(f"after {done} requests")
            if done % max(1, planned // SAMPLES) == 0 or done == planned:
                samples.append((done, server.memory_bytes()))
                progress.step("requests", done, planned)

        send_all(server.url, range(planned), send_one, connections=CONNECTIONS)


def figures(samples: list[tuple[int, int]]) -> dict[str, float]:
    """Medians over the first and the last tenth of the requests sent, and what lies between."""
    numbers, used = np.array(samples).T
    tenth = numbers[-1] / 10
    first = float(np.median(used[(numbers > 0) & (numbers <= tenth)]))
    last = float(np.median(used[numbers > 9 * tenth]))
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


def write(experiment: SoakExperiment, out: Path) -> Path:
    """Write report.md and results.json in `out`, print the figures, and return the report's path."""
    (block,) = experiment.blocks
    info, found = block.info, figures(block.info["samples"])
    sent = f"{info['requests']:,} requests over {CONNECTIONS} connections, {info['failed_requests']} of them failed"
    what = conditions(experiment, f"{block.arm}: {sent}")
    names = {
        "idle_bytes": "fresh process",
        "first_bytes": "first tenth of the requests, median",
        "last_bytes": "last tenth of the requests, median",
        "peak_bytes": f"largest of {len(info['samples'])} samples",
    }
    rows = [(title, f"{found[name] / 1e6:.1f} MB") for name, title in names.items()]
    rows.append(("growth from the first to the last tenth", f"{found['growth']:+.2%}"))
    table = Table(title=what, headings=("memory (PSS of the process tree)", ""), rows=rows)
    asked = {"model": block.arm, "planned_requests": experiment.plan.requests}
    write_experiment(
        experiment, out, template="soak.md.j2", figures={**asked, **info, **found}, summary=what, memory=table
    )
    print_tables(table, width=100)
    return out / "report.md"
