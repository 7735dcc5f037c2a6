"""Does the service's memory stay flat? Many requests with images of mixed sizes, and PSS all along.

Threads and the standard library's client do the sending: how fast it goes is not the question here.
"""

import http.client
import io
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
from PIL import Image

from loadtests.experiment.environment import environment
from loadtests.experiment.json_files import write_json
from loadtests.experiment.server import Server, ServerError, running_server
from loadtests.generator.payloads import Payload, PayloadError, read_payloads

CONNECTIONS = 16
SAMPLES = 200
"""PSS is read this often, or at every request if they are fewer."""
FEWEST_SAMPLES = 50
LONGER_SIDES = (48, 160, 320, 640, 1024, 1600)
"""Pixels."""

_ORIGINALS = 8
_ANSWER_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Soak:
    """PSS in bytes by the number of requests sent so far, ascending; the first is of the fresh process."""

    model: str
    requests: int
    errors: int
    payloads: str
    samples: list[tuple[int, int]] = field(repr=False)
    ended_early: str | None
    environment: dict[str, str]
    command: str
    finished: datetime

    @property
    def idle_bytes(self) -> int:
        """Before the first request."""
        return self.samples[0][1]

    @property
    def first_bytes(self) -> float:
        """Median over the first tenth of the requests."""
        return self._median(0, self.requests / 10)

    @property
    def last_bytes(self) -> float:
        """Median over the last tenth of the requests."""
        return self._median(self.requests * 0.9, self.requests)

    @property
    def most_bytes(self) -> int:
        """The largest sample."""
        return max(used for _, used in self.samples)

    @property
    def growth(self) -> float:
        """Of the last tenth over the first, less 1."""
        return self.last_bytes / self.first_bytes - 1

    def _median(self, above: float, up_to: float) -> float:
        return float(np.median([used for number, used in self.samples if above < number <= up_to]))


def soak(
    repository: Path,
    model: str,
    data: Path | None,
    *,
    requests: int,
    arguments: tuple[str, ...],
    command: str,
    out: Path,
    on_progress: Callable[[int], None],
) -> Soak:
    """Send `requests` on 16 connections; `on_progress(sent)` is told. Raises PayloadError or ServerError.

    An interrupted run gives what it has, if that is enough to be judged; else the interrupt goes on.
    """
    out.mkdir(parents=True, exist_ok=True)
    images, what = mixed_sizes(data)
    early = None
    with running_server(repository, model, log=out / "soak.log", arguments=arguments) as server:
        samples = [(0, server.memory_bytes())]
        errors: list[int] = []
        try:
            _send(server, model, images, requests, samples=samples, errors=errors, on_progress=on_progress)
        except KeyboardInterrupt:
            if len(samples) < FEWEST_SAMPLES:
                raise
            early, requests = "interrupted", max(samples)[0]
    return Soak(
        model=model,
        requests=requests,
        errors=len(errors),
        payloads=what,
        samples=sorted(samples),
        ended_early=early,
        environment=environment(),
        command=command,
        finished=datetime.now(UTC),
    )


def mixed_sizes(data: Path | None) -> tuple[list[bytes], str]:
    """Eight images of `data`, or generated ones, each as a JPEG of six sizes, shuffled; and in words what they are."""
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


def _send(
    server: Server,
    model: str,
    images: list[bytes],
    requests: int,
    *,
    samples: list[tuple[int, int]],
    errors: list[int],
    on_progress: Callable[[int], None],
) -> None:
    """Fill `samples`, and `errors` with the numbers of the requests that failed."""
    every = max(1, requests // SAMPLES)
    numbers = itertools.count(1)
    lock, stop = threading.Lock(), threading.Event()
    path, host = f"/v1/classify?model={quote(model)}", urlsplit(server.url).netloc

    def work() -> None:
        connection = http.client.HTTPConnection(host, timeout=_ANSWER_SECONDS)
        try:
            while not stop.is_set():
                with lock:
                    number = next(numbers)
                if number > requests:
                    break
                if not _answered(connection, path, images[number % len(images)]):
                    errors.append(number)
                    if not server.alive():
                        raise ServerError(
                            f"{server.name} died after {number} requests; its log, {server.log}, ends:\n"
                            f"{server.log_tail()}"
                        )
                if number % every == 0:
                    used = server.memory_bytes()
                    with lock:
                        samples.append((number, used))
                        on_progress(number)
        finally:
            connection.close()

    with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="soak") as pool:
        workers = [pool.submit(work) for _ in range(CONNECTIONS)]
        try:
            for worker in as_completed(workers):
                worker.result()
        finally:
            stop.set()


def _answered(connection: http.client.HTTPConnection, path: str, image: bytes) -> bool:
    try:
        connection.request("POST", path, body=image, headers={"Content-Type": "image/jpeg"})
        response = connection.getresponse()
        response.read()
    except (OSError, http.client.HTTPException):
        # The connection opens anew by itself at the next request.
        connection.close()
        return False
    return response.status == 200


def lines(found: Soak) -> list[str]:
    """The figures, a line each."""
    return [
        f"{found.model}: {found.requests:,} requests at {CONNECTIONS} connections, {found.errors} errors; "
        f"{found.payloads}" + (f"; ended early: {found.ended_early}" if found.ended_early else ""),
        f"PSS, median over the first tenth of the requests: {found.first_bytes / 1e6:.1f} MB",
        f"PSS, median over the last tenth of the requests: {found.last_bytes / 1e6:.1f} MB",
        f"growth: {found.growth:+.2%}",
        f"PSS of the fresh process: {found.idle_bytes / 1e6:.1f} MB; the most in {len(found.samples)} samples: "
        f"{found.most_bytes / 1e6:.1f} MB",
    ]


def write(found: Soak, out: Path) -> None:
    """`report.md` and `results.json` in the folder `out`."""
    where = [f"- {name}: {value}" for name, value in found.environment.items()]
    page = [
        "# Memory over many requests",
        "",
        "```sh",
        found.command,
        "```",
        "",
        *(f"- {line}" for line in lines(found)),
    ]
    (out / "report.md").write_text("\n".join([*page, "", *where, ""]), encoding="utf-8")
    write_json(as_json(found), out / "results.json")


def as_json(found: Soak) -> dict[str, Any]:
    """All samples and what is made of them."""
    return {
        "schema_version": 1,
        **asdict(found),
        "finished": found.finished.isoformat(timespec="seconds"),
        "connections": CONNECTIONS,
        **{name: getattr(found, name) for name in ("idle_bytes", "first_bytes", "last_bytes", "most_bytes", "growth")},
    }
