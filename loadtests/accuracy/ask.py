"""Every image of a set is sent to a model over HTTP, and no answer is left out.

A request that fails, after retries if the server asked for them, counts as a wrong answer for top-1, top-5 and
agreement alike.
"""

import asyncio
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import httpx
import numpy as np

from loadtests.accuracy.results import COLUMNS, TOP, AccuracyExperiment
from loadtests.errors import LoadTestError
from loadtests.experiment.model import Arm, Progress
from loadtests.experiment.run import Bench
from loadtests.experiment.sending import send_all
from loadtests.experiment.server import Server
from loadtests.generator.readers import Label, Payload, PayloadError, Source, open_source
from service.manifest import Accuracy

_ATTEMPTS = 8
_MAX_RETRY_SECONDS = 60
"""If a server asks for a longer pause, the request fails."""
_MAX_FAILED_CONNECTIONS = 3
"""After this many failed connections in a row, per connection, the server counts as gone."""


class AccuracyError(LoadTestError):
    """A model cannot be queried; the message says what to change."""


def choose_images(data: Path, limit: int | None, *, labelled: bool) -> tuple[Source, list[int]]:
    """A folder's images and the positions of the first ones, or of the `labelled` among them. Raises PayloadError."""
    source = open_source(data)
    positions = [row for row in range(len(source.labels))[:limit] if not labelled or source.labels[row] is not None]
    if not positions:
        raise PayloadError(
            f"{data} holds no labels: it needs a labels.csv, class folders, or a column fine_label or label "
            "(with --reference, two models can be compared without labels)"
        )
    return source, positions


def check_reference(run: AccuracyExperiment, bench: Bench) -> None:
    """Check that the reference can be queried, before the model is. Raises ServerError or AccuracyError."""
    for arm in run.plan.arms[1:]:
        with bench.serving(arm, "check") as server:
            _describe(run, arm, server)


def ask(run: AccuracyExperiment, arm: Arm, server: Server, info: dict[str, Any], progress: Progress) -> None:
    """Send all images to the arm's server, and fill a block's `info`. Raises PayloadError or AccuracyError."""
    facts, count = _describe(run, arm, server), len(run.positions)
    query = {"model": arm.model, "version": facts["version"], "top_k": TOP}
    answers = np.array([("", -1, "failed", 0.0, 0, "")] * count, dtype=COLUMNS)
    info |= {**facts, "sent": 0, "retries": 0, "seconds": 0.0, "answers": answers}
    failed_connections = 0

    async def post(client: httpx.AsyncClient, image: bytes) -> httpx.Response:
        for attempt in range(1, _ATTEMPTS + 1):
            response = await client.post("/v1/classify", params=query, content=image)
            if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
                break
            pause = _retry_after(response)
            if attempt == _ATTEMPTS or pause > _MAX_RETRY_SECONDS:
                raise httpx.HTTPError(f"429 {attempt} times, the last with Retry-After {pause:g} s")
            info["retries"] += 1
            await asyncio.sleep(pause)
        return response

    async def send(client: httpx.AsyncClient, item: tuple[int, Payload]) -> None:
        nonlocal failed_connections
        row, image = item
        lost = False
        try:
            answers[row] = ("", *_parse(await post(client, image.data), image.label), "")
        except httpx.HTTPError as error:
            lost = isinstance(error, httpx.RequestError)
            said = f"no answer: {type(error).__name__}, {error}".removesuffix(", ") if lost else str(error)
            answers["failure"][row] = said
        failed_connections = failed_connections + 1 if lost else 0
        answers["name"][row] = image.name
        info["sent"] += 1
        progress.step(f"images, {arm.label}", info["sent"], count)
        if failed_connections >= _MAX_FAILED_CONNECTIONS * run.plan.connections:
            raise AccuracyError(f"the server is gone ({answers['failure'][row]})")

    started, images = time.monotonic(), enumerate(run.source.read(run.positions))
    try:
        send_all(server.url, images, send, connections=run.plan.connections)
    finally:
        info["seconds"] = time.monotonic() - started


def _describe(run: AccuracyExperiment, arm: Arm, server: Server) -> dict[str, Any]:
    """What the model says about itself. Raises AccuracyError, also if it does not know a label of the images."""
    try:
        detail = server.model(arm.model)
        manifest = detail["manifest"]
        if accuracy := manifest.get("accuracy"):
            Accuracy.model_validate(accuracy)
        facts = {
            "version": detail["version"],
            "classes": detail["labels"],
            "accuracy": accuracy,
            # Another commit may use version 1 of the schema.
            "trained": not (manifest.get("random_weights") or manifest.get("weights") == "random"),
        }
    except HTTPError as error:
        said = error.read().decode("utf-8", errors="replace")
        with suppress(ValueError, LookupError, TypeError):
            said = json.loads(said)["detail"]
        raise AccuracyError(f"{server.name} says of {arm.model}: {said}") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise AccuracyError(f"{server.name} does not answer as a StrideViT service does: {error}") from error
    classes, known = facts["classes"], {None, *range(len(facts["classes"])), *facts["classes"]}
    if unknown := sorted({str(label) for label in run.labels if label not in known}):
        raise AccuracyError(
            f"the data is not labelled with the {len(classes)} classes of {arm.label}: it does not know "
            f"{len(unknown)} of the labels, {unknown[0]!r} among them (its first class is {classes[0]!r})"
        )
    return facts


def _parse(response: httpx.Response, label: Label) -> tuple[int, str, float, int]:
    """The most probable class, by index and name, its probability, and the label's rank. Raises httpx.HTTPError."""
    if response.status_code != httpx.codes.OK:
        raise httpx.HTTPError(f"{response.status_code}: {response.text[:200]}")
    try:
        ranked: list[dict[str, Any]] = response.json()["results"][0]["predictions"]
        classes = [one["index"] if isinstance(label, int) else one["label"] for one in ranked]
        rank = classes.index(label) + 1 if label in classes else 0
        return int(ranked[0]["index"]), str(ranked[0]["label"]), float(ranked[0]["probability"]), rank
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise httpx.HTTPError(f"200, but not understood ({error!r}): {response.text[:200]}") from error


def _retry_after(response: httpx.Response) -> float:
    """Seconds; one if the header is missing or a date."""
    try:
        return max(0.0, float(response.headers.get("Retry-After", "1")))
    except ValueError:
        return 1.0
