"""Faults of the models: an engine that fails, and a repository that changes under the service."""

import asyncio
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from loadtests.experiment.http_get import get_json
from loadtests.faults.client import Client, Unanswered
from loadtests.faults.fault import ELSEWHERE, Fault, World
from loadtests.faults.models import Kind, publish_numbered
from loadtests.faults.service import Launch
from service.bundle import MODEL_FILE

POLL_SECONDS = 0.5
HANG_SECONDS = 60.0
"""How long a hung engine may keep its process before the harness kills it."""
_TAKEN_SECONDS = 20.0
_HALF_WRITTEN_SECONDS = 3.0
_ADMIN_KEY = "the-key-of-this-harness"
_NUMBERED: Kind = "numbered"
_LARGE: Kind = "numbered-large"
POLLING_FLAGS = (f"--poll-seconds={POLL_SECONDS:g}",)
ADMIN_FLAGS = (f"--admin-key-hash={hashlib.sha256(_ADMIN_KEY.encode()).hexdigest()}",)
_POLLING, _ADMIN = Launch(flags=POLLING_FLAGS), Launch(flags=ADMIN_FLAGS)


async def _guilty(world: World) -> None:
    await world.guilty(0.25)


async def _hang(world: World) -> None:
    asked = asyncio.create_task(world.load.send_guilty())
    began = time.monotonic()
    if await world.service.ended(1, seconds=HANG_SECONDS):
        world.notes.append(f"the process ended by itself after {time.monotonic() - began:.1f} s")
    else:
        world.unmet.append(f"the process served nothing for {HANG_SECONDS:.0f} s, did not end, and was killed")
        world.service.signal(9, "SIGKILL")
        await world.service.ended(1)
    status = await asked
    world.notes.append(f"guilty image: {status or 'no answer'}")


async def _damage_served(world: World) -> None:
    """The model file of the version that serves is overwritten in place, and a new version is damaged too."""
    model = world.service.repository / _NUMBERED / "1" / MODEL_FILE
    whole = model.read_bytes()
    model.write_bytes(_damaged(whole))
    second = _publish(world, _damaged)
    await asyncio.sleep(world.seconds)
    await _expect_version(world, "1")
    model.write_bytes(whole)
    shutil.rmtree(second)


async def _cut(world: World) -> None:
    second = _publish(world, lambda whole: whole[: len(whole) // 2])
    await asyncio.sleep(world.seconds)
    await _expect_version(world, "1")
    shutil.rmtree(second)


async def _delete(world: World) -> None:
    model = world.service.repository / _NUMBERED / "1" / MODEL_FILE
    whole = model.read_bytes()
    model.unlink()
    await asyncio.sleep(world.seconds)
    await _expect_version(world, "1")
    model.write_bytes(whole)


async def _half_write(world: World) -> None:
    """A version that is copied in place, slowly, instead of being renamed when it is whole."""
    repository = world.service.repository
    whole = publish_numbered(repository / ".elsewhere", _NUMBERED)
    second = repository / _NUMBERED / "2"
    second.mkdir()
    content = (whole / MODEL_FILE).read_bytes()
    (second / MODEL_FILE).write_bytes(content[: len(content) // 2])
    await asyncio.sleep(_HALF_WRITTEN_SECONDS)
    await _expect_version(world, "1")
    for file in sorted(whole.iterdir()):
        shutil.copyfile(file, second / file.name)
        await asyncio.sleep(2 * POLL_SECONDS)
    await _expect_version(world, "2")


async def _rename_away(world: World) -> None:
    repository = world.service.repository
    away = repository.with_name("away")
    repository.rename(away)
    await asyncio.sleep(world.seconds)
    away.rename(repository)


async def load_and_unload(world: World) -> None:
    """Every second: another model is loaded or unloaded, and the one that serves is loaded again."""
    client = Client("127.0.0.1", world.service.port, answer_seconds=60)
    statuses: list[int] = []
    ends_at, number = time.monotonic() + world.seconds, 0
    # It ends as it began, with the other model loaded.
    while time.monotonic() < ends_at or number % 2:
        number += 1
        paths = [f"numbered-other/{'unload' if number % 2 else 'load'}", f"{_NUMBERED}/load"]
        for path in paths:
            try:
                statuses.append((await client.ask(_admin(path), keep=False)).status)
            except Unanswered as error:
                world.unmet.append(f"{path}: {error}")
        await asyncio.sleep(1)
    done = statuses.count(200)
    world.notes.append(f"{done} of {len(statuses)} loads and unloads were done")
    if done < len(statuses):
        world.unmet.append(f"loads and unloads were answered with {sorted(set(statuses))}")


async def _load_large(world: World) -> None:
    """Load a large model, and unload it, again and again."""
    repository = world.service.repository
    (repository.parent / ELSEWHERE / _LARGE).rename(repository / _LARGE)
    client = Client("127.0.0.1", world.service.port, answer_seconds=120)
    ends_at, took = time.monotonic() + world.seconds, list[float]()
    while time.monotonic() < ends_at or not took:
        for action in ("load", "unload"):
            began = time.monotonic()
            try:
                reply = await client.ask(_admin(f"{_LARGE}/{action}"), keep=False)
            except Unanswered as error:
                world.unmet.append(f"{action}: {error}")
                return
            if reply.status != 200:
                world.unmet.append(f"{action} was answered with {reply.status}: {reply.body[:200]!r}")
                return
            if action == "load":
                took.append(time.monotonic() - began)
    world.notes.append(f"loaded {len(took)} times, in {min(took):.1f} to {max(took):.1f} s")


def _admin(path: str) -> bytes:
    head = [f"POST /v2/repository/models/{path} HTTP/1.1", "Host: service", f"X-API-Key: {_ADMIN_KEY}"]
    return "\r\n".join([*head, "Content-Length: 0", "Connection: close", "", ""]).encode("ascii")


def _publish(world: World, change: Callable[[bytes], bytes]) -> Path:
    """Publish a next version whose graph does not match its digest."""
    draft = publish_numbered(world.service.repository / ".elsewhere", _NUMBERED)
    model = draft / MODEL_FILE
    model.write_bytes(change(model.read_bytes()))
    return draft.rename(world.service.repository / _NUMBERED / "2")


def _damaged(whole: bytes) -> bytes:
    middle = len(whole) // 2
    return whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 64]) + whole[middle + 64 :]


async def _expect_version(world: World, version: str) -> None:
    """Wait until a version serves, and only that one."""
    url, began, found = f"{world.service.url}/v2/models/{_NUMBERED}", time.monotonic(), None
    while time.monotonic() < began + _TAKEN_SECONDS:
        try:
            found = (await asyncio.to_thread(get_json, url, timeout=5))["versions"]
        except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
            found = repr(error)
        if found == [version]:
            world.notes.append(f"version {version} served {time.monotonic() - began:.1f} s after it was to")
            return
        await asyncio.sleep(0.2)
    world.unmet.append(f"version {version} did not serve after {_TAKEN_SECONDS:.0f} s, but {found}")


def model_faults() -> list[Fault]:
    """All of them."""
    return [
        Fault(
            name="engine-exception",
            what="four times a second an image for which the engine raises an error",
            act=_guilty,
            model="numbered-raises",
            spares_others=True,
        ),
        Fault(
            name="engine-nan",
            what="four times a second an image for which the outputs are NaN",
            act=_guilty,
            model="numbered-nan",
            spares_others=True,
        ),
        Fault(
            name="engine-short",
            what="four times a second an image for which the engine gives no row",
            act=_guilty,
            model="numbered-short",
            spares_others=True,
        ),
        Fault(
            name="engine-hang",
            what="one image for which the engine computes for weeks",
            act=_hang,
            model="numbered-hangs",
            survives=False,
        ),
        Fault(
            name="model-corrupted",
            what="bytes of the model file that serves change, and a new version comes damaged, while polling",
            act=_damage_served,
            launch=_POLLING,
        ),
        Fault(
            name="model-cut", what="a new version comes with half its graph, while polling", act=_cut, launch=_POLLING
        ),
        Fault(
            name="model-deleted",
            what="the model file that serves is deleted, while polling",
            act=_delete,
            launch=_POLLING,
        ),
        Fault(
            name="model-half-written",
            what="a new version is written slowly in its place, while polling; it must serve once it is whole",
            act=_half_write,
            launch=_POLLING,
        ),
        Fault(
            name="repository-away",
            what="the repository is renamed away and back, while polling",
            act=_rename_away,
            launch=_POLLING,
        ),
        Fault(
            name="load-unload",
            what="every second a model is loaded or unloaded by request, and the one that serves is loaded again",
            act=load_and_unload,
            launch=_ADMIN,
        ),
        Fault(
            name="load-large",
            what="a model of the size and cost of ViT-S/16 is loaded by request, and unloaded, again and again",
            act=_load_large,
            elsewhere=_LARGE,
            launch=_ADMIN,
        ),
    ]
