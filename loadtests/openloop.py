"""Open loop: images sent at random moments of a given rate, whether or not earlier ones have been answered.

    python -m loadtests.openloop http://127.0.0.1:8000 '/v1/classify?model=cifar100-mha' \\
        --images photos --rate 100 --seconds 10 --samples samples.csv

Arrivals are a Poisson process, one greenlet each, over the client that Locust's FastHttpUser is made of. A latency
counts from the moment at which the image *should* have been sent, so that a generator or a server that falls behind
cannot hide it. `samples.csv` is as the locustfile writes it; what was not sent is told on standard output, in JSON.
"""

import argparse
import csv
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import gevent
import numpy as np
from geventhttpclient import HTTPClient

MAX_IN_FLIGHT = 256
"""Requests under way at most, each on a connection of its own; an arrival beyond them is not sent, and counted."""
LATE_SECONDS = 0.005
"""Sent more than this after its moment, an image is counted as late: the generator, not the server, was slow."""

_ANSWER_SECONDS = 30.0


@dataclass(kw_only=True)
class Sent:
    """What became of a schedule. Each sample is (scheduled Unix time, latency in ms, 1 if answered with 200)."""

    scheduled: int = 0
    late: int = 0
    unsent: int = 0
    most_in_flight: int = 0
    samples: list[tuple[float, float, int]] = field(default_factory=list, repr=False)
    answers: list[tuple[int, str]] = field(default_factory=list, repr=False)
    """Of each sample the status, 0 for none, and the model that answered, as name/version."""


def arrivals(rate: float, seconds: float, *, seed: int) -> list[float]:
    """Moments of a Poisson process with `rate` a second, in seconds from its begin."""
    generator = np.random.default_rng(seed)
    # Half as many again as expected, and some: never too few.
    gaps = generator.exponential(1 / rate, size=int(rate * seconds * 1.5) + 100)
    moments = np.cumsum(gaps)
    return [float(moment) for moment in moments[moments < seconds]]


def stepped_arrivals(steps: Sequence[tuple[float, float]], *, seed: int) -> list[float]:
    """Moments of a Poisson process whose rate changes: `steps` of (rate a second, seconds)."""
    begin, moments = 0.0, []
    for number, (rate, seconds) in enumerate(steps):
        moments += [begin + moment for moment in arrivals(rate, seconds, seed=seed + number)]
        begin += seconds
    return moments


def send(
    url: str,
    path: str,
    images: Sequence[bytes],
    moments: Sequence[float],
    *,
    begin: float | None = None,
    max_in_flight: int = MAX_IN_FLIGHT,
) -> Sent:
    """Post `images`, round and round, at `moments` after `begin` (Unix time; now if None), and wait for all answers."""
    client = HTTPClient.from_url(
        url, concurrency=max_in_flight, connection_timeout=_ANSWER_SECONDS, network_timeout=_ANSWER_SECONDS
    )
    sent = Sent(scheduled=len(moments))
    # Differences are measured on the clock that nobody sets.
    offset = time.time() - time.perf_counter()
    first = time.perf_counter() if begin is None else begin - offset
    in_flight = 0

    def one(image: bytes, due: float) -> None:
        nonlocal in_flight
        status, model = 0, ""
        try:
            response = client.post(path, body=image)
            response.read()
            status, model = response.status_code, str(response.get("x-stridevit-model") or "")
        except Exception:  # noqa: BLE001, S110 (whatever a broken server makes the client raise, it is no answer)
            pass
        sent.samples.append((due + offset, (time.perf_counter() - due) * 1000, int(status == 200)))
        sent.answers.append((status, model))
        in_flight -= 1

    greenlets = []
    for number, moment in enumerate(moments):
        due = first + moment
        # Also when it is too late already: the greenlets must have their turn.
        gevent.sleep(max(0.0, due - time.perf_counter()))
        if in_flight >= max_in_flight:
            sent.unsent += 1
            continue
        sent.late += time.perf_counter() - due > LATE_SECONDS
        in_flight += 1
        sent.most_in_flight = max(sent.most_in_flight, in_flight)
        greenlets.append(gevent.spawn(one, images[number % len(images)], due))
    gevent.joinall(greenlets)
    client.close()
    return sent


def main() -> None:
    """Read the command line, send, and write the samples."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.openloop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("path")
    parser.add_argument("--images", type=Path, required=True, help="folder of image files")
    parser.add_argument("--rate", type=float, help="images a second, on average")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--steps", type=parse_steps, help="instead of both: RATE:SECONDS,RATE:SECONDS,...")
    parser.add_argument("--samples", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    images = [file.read_bytes() for file in sorted(asked.images.iterdir()) if file.is_file()]
    if asked.steps is None and (asked.rate is None or asked.seconds is None):
        parser.error("give --rate and --seconds, or --steps")
    steps = asked.steps or [(asked.rate, asked.seconds)]
    sent = send(asked.url, asked.path, images, stepped_arrivals(steps, seed=asked.seed))
    with asked.samples.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(["start_s", "latency_ms", "ok", "status", "model"])
        for (start, latency, ok), answer in zip(sent.samples, sent.answers, strict=True):
            table.writerow((f"{start:.6f}", f"{latency:.3f}", ok, *answer))
    counts = asdict(sent)
    del counts["samples"], counts["answers"]
    print(json.dumps(counts))


def parse_steps(text: str) -> list[tuple[float, float]]:
    """`400:10,900:20` as (rate, seconds). Raises ValueError."""
    steps = [tuple(float(number) for number in part.split(":")) for part in text.split(",")]
    if any(len(step) != 2 or min(step) <= 0 for step in steps):
        raise ValueError("steps are RATE:SECONDS, separated by commas")
    return [(rate, seconds) for rate, seconds in steps]


if __name__ == "__main__":
    main()
