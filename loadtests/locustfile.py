"""Closed-loop users that post images to /v1/classify, and keep every raw sample.

`python -m loadtests compare` runs this file headless; it also works by hand, with Locust's web page:

    STRIDEVIT_LOAD_IMAGES=photos STRIDEVIT_LOAD_MODEL=cifar100-mha locust -f loadtests/locustfile.py --host http://127.0.0.1:8000

Environment: STRIDEVIT_LOAD_IMAGES, a folder of image files, sent in order of name, round and round;
STRIDEVIT_LOAD_MODEL; STRIDEVIT_LOAD_SAMPLES, a CSV file to write (start in Unix seconds, latency in ms, ok as 0 or
1), none without it.
"""

from locust import FastHttpUser, events, task  # first: it patches the standard library for gevent  # isort: skip

import csv
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from locust.env import Environment

_samples: list[tuple[float, float, int]] = []


class Classify(FastHttpUser):
    """Sends the next image as soon as its last one is answered."""

    images: Iterator[bytes]
    path: str

    @task
    def classify(self) -> None:
        """One image."""
        self.client.post(self.path, data=next(self.images), name=self.path)  # type: ignore[arg-type]  # takes bytes too


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def _load_images(**_: Any) -> None:
    folder = Path(os.environ["STRIDEVIT_LOAD_IMAGES"])
    images = [file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()]
    if not images:
        raise SystemExit(f"no image in {folder}")
    Classify.images = itertools.cycle(images)
    Classify.path = f"/v1/classify?model={quote(os.environ['STRIDEVIT_LOAD_MODEL'])}"


@events.request.add_listener  # type: ignore[untyped-decorator]
def _keep(start_time: float, response_time: float, exception: BaseException | None, **_: Any) -> None:
    _samples.append((start_time, response_time, int(exception is None)))


@events.quitting.add_listener  # type: ignore[untyped-decorator]
def _write(environment: Environment, **_: Any) -> None:
    target = os.environ.get("STRIDEVIT_LOAD_SAMPLES")
    if target:
        with Path(target).open("w", newline="", encoding="utf-8") as stream:
            table = csv.writer(stream)
            table.writerow(["start_s", "latency_ms", "ok"])
            table.writerows((f"{start:.6f}", f"{latency:.3f}", ok) for start, latency, ok in _samples)
    # Errors are the report's to tell; Locust itself did its work.
    environment.process_exit_code = 0
