"""Shadow work changes no answer, comes last, is dropped first, and leaves nothing behind."""

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import RequestError
from service.rollouts.rollout import Rollout
from service.scheduling.lanes import Running
from service.scheduling.scheduler import Output, Pixels
from service.scheduling.spare import Spare
from tests.service.conftest import until
from tests.service.faulty import guilty_picture
from tests.service.identity import SIDE
from tests.service.rollouts.conftest import World, pictures


def counts(rollout: Rollout) -> dict[str, float]:
    """The rollout's counters so far, without zeros."""
    found: dict[str, float] = {}
    for name in ("images", "compared", "dropped", "fallbacks"):
        for labels, value in rollout._metrics.totals(f"rollout_{name}"):
            if labels.pop("kind") == rollout.split.kind and labels.pop("rollout").endswith(f":{rollout.split.title}"):
                found[" ".join([name, *labels.values()])] = value
    return found


def more(before: dict[str, float], after: dict[str, float]) -> dict[str, int]:
    return {name: int(value - before.get(name, 0)) for name, value in after.items() if value != before.get(name, 0)}


def test_a_shadow_that_agrees_and_one_that_differs_are_counted(world: World) -> None:
    for candidate, top1 in (("first:first@2", "agree"), ("first:second", "differ")):
        (rollout,) = world.roll("shadow", f"{candidate}=100%")
        before = counts(rollout)

        async def scenario() -> None:
            for number in (1, 2, 3):
                assert (await world.ask(pictures(number)))[0] == [number]
            written, answer = await world.ask(pictures(4, 5, 6, 7))
            assert written == [4, 5, 6, 7]
            assert (answer.model.name, answer.model.version, answer.choice) == ("first", 1, None)

        world.runner.run(scenario())
        world.done()
        assert more(before, counts(rollout)) == {
            "images primary ok": 7,
            "images candidate ok": 7,
            f"compared {top1}": 7,
        }
        status = rollout.status()
        assert (status.state, status.compared, status.dropped, status.errors) == ("on", 7, 0, 0)
        # Every fourth image is computed by both, beside the answers.
        timed = [rollout._metrics.rollout_duration(*rollout._labels, arm)[0] for arm in ("primary", "candidate")]
        assert timed[0] == timed[1] >= 1
        assert status.primary_ms
        assert status.candidate_ms


def test_a_part_of_the_images_is_compared_and_a_named_version_is_not_split(world: World) -> None:
    (rollout,) = world.roll("shadow", "first:third=30%")
    before = counts(rollout)
    split = rollout.split
    expected = sum(split.takes([image]) for image in pictures(*range(1, 41)))

    async def scenario() -> None:
        for start in range(1, 41, 4):
            await world.ask(pictures(*range(start, start + 4)))
        await world.ask(pictures(1, 2, 3, 4), version=1)

    world.runner.run(scenario())
    world.done()
    assert 0 < expected < 40
    assert more(before, counts(rollout)) == {
        "images primary ok": 40,
        "images candidate ok": expected,
        "compared agree": expected,
    }


def test_pixels_of_a_tensor_are_copied_and_an_image_is_decoded_again_only_for_another_geometry(world: World) -> None:
    first, wide = world.roll("shadow", "first:third=100%", "second:wide=100%")
    before = counts(first), counts(wide)
    decoded: list[int] = []
    render_here = world.pipeline.decoders.render_here

    def counted(*arguments: Any) -> Pixels:
        decoded.append(1)
        return render_here(*arguments)

    world.pipeline.decoders.render_here = counted  # type: ignore[method-assign, assignment]
    rows = np.zeros((3, SIDE, SIDE, 3), dtype=np.uint8)
    rows[:, 0, 0, 0] = 1, 2, 3

    async def scenario() -> None:
        await world.ask(rows)
        await world.ask(pictures(1, 2))
        await world.ask(pictures(1, 2), model="second")

    try:
        world.runner.run(scenario())
        world.done()
    finally:
        del world.pipeline.decoders.render_here
    assert len(decoded) == 2
    assert more(before[0], counts(first))["images candidate ok"] == 5
    assert more(before[1], counts(wide))["images candidate ok"] == 2


def test_under_overload_answers_are_the_same_and_shadow_work_never_begins_while_one_waits(world: World) -> None:
    (rollout,) = world.roll("shadow", "first:third=100%", max_images=8)
    before, spare = counts(rollout), world.pipeline.scheduler.spare
    assert spare is not None
    waiting_at_start: list[int] = []
    running_at_start: list[int] = []
    take = spare.take

    def watched(queues: Any, now: float) -> Running | None:
        run = take(queues, now)
        if run is not None:
            waiting_at_start.append(sum(len(queue) + queue.backlog.waiting for queue in queues))
            running_at_start.append(len(world.pipeline.scheduler.lanes.runs))
            assert len(run.entries) == 1
        return run

    spare.take = watched  # type: ignore[method-assign]

    async def scenario() -> None:
        # Far more at once than the engine can do, and than there is room for beside the answers.
        asked = [world.ask(pictures(1 + place, 301 + place)) for place in range(90)]
        for place, (written, _) in enumerate(await asyncio.gather(*asked)):
            assert written == [1 + place, 301 + place]

    world.runner.run(scenario())
    world.done()
    changed = more(before, counts(rollout))
    assert changed["images primary ok"] == 180
    assert changed["dropped full"] == 180 - changed["images candidate ok"] > 0
    assert len(waiting_at_start) >= changed["images candidate ok"]
    # So an answer waits for one image at most: the one that had begun when its request was accepted.
    assert not any(waiting_at_start)
    assert not any(running_at_start)
    assert not any(name.startswith("fallbacks") for name in changed)


def test_shadow_work_that_waits_lets_every_answer_pass(world: World) -> None:
    """The engine is held until both wait: the answer is computed first."""
    world.roll("shadow", "first:third=100%")
    scheduler, order, go_on = world.pipeline.scheduler, [], threading.Event()
    on_batch = scheduler._on_batch

    def watched(batch: Any) -> None:
        order.append(batch.queue.name)
        on_batch(batch)

    async def scenario() -> None:
        scheduler._on_batch = watched
        blocked = asyncio.create_task(asyncio.to_thread(scheduler.on_engine, lambda: go_on.wait(60)))
        await until(lambda: bool(scheduler.lanes.runs))
        model = world.pipeline.registry.find("third")
        done: list[object] = []
        assert scheduler.spare is not None
        pixels = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
        for _ in range(2):
            scheduler.spare.put(model.queue, pixels=pixels.copy, nbytes=12, threads=1, done=done.append)
        asked = asyncio.create_task(world.ask(pictures(9), model="second"))
        await until(lambda: len(world.pipeline.registry.find("second").queue) == 1)
        go_on.set()
        await blocked
        assert (await asked)[0] == [9]
        await until(lambda: len(done) == 2)
        assert all(isinstance(outcome, Output) for outcome in done)
        scheduler._on_batch = on_batch

    world.runner.run(scenario())
    world.done()
    assert order == ["second", "third", "third"]


@settings(max_examples=15)
@given(
    plan=st.lists(st.tuples(st.sampled_from(["nan", "raises", "wide", "gone", "labels"]), st.booleans()), max_size=8),
    room=st.sampled_from([(1000, 10**6), (2, 10**6), (1000, 30)]),
)
def test_nothing_is_held_whatever_fails(world: World, plan: list[tuple[str, bool]], room: tuple[int, int]) -> None:
    """Candidates fail, vanish, have other labels, and there is no room: answers stay right, and all is freed."""
    (rollout,) = world.roll("shadow", "first:third=100%", max_images=room[0], max_bytes=room[1])
    names = iter([name for name, _ in plan])
    before = counts(rollout)

    class Changing:
        @property
        def candidate(self) -> Any:
            return world.pipeline.registry.get(next(names, "gone"))

    async def scenario() -> None:
        rollout.__class__ = type("Faulty", (Rollout,), {"candidate": Changing.candidate})
        asked = [world.ask([guilty_picture(7) if guilty else pictures(7)[0]]) for _, guilty in plan]
        for written, _ in await asyncio.gather(*asked):
            assert written == [7]

    world.runner.run(scenario())
    world.done()
    changed = more(before, counts(rollout))
    assert changed.pop("images primary ok", 0) == len(plan)
    # Each image is counted once, compared ones also as answered.
    assert sum(changed.values()) - changed.get("images candidate ok", 0) == len(plan)


def test_unloading_a_candidate_drops_what_waits_for_it_and_ends_its_share(world: World) -> None:
    (rollout,) = world.roll("shadow", "first:third=100%")
    scheduler, registry, before = world.pipeline.scheduler, world.pipeline.registry, counts(rollout)
    queue, go_on = registry.find("third").queue, threading.Event()

    async def scenario() -> None:
        blocked = asyncio.create_task(asyncio.to_thread(scheduler.on_engine, lambda: go_on.wait(60)))
        await until(lambda: any(run.job for run in scheduler.lanes.runs))
        assert scheduler.spare is not None

        def done(outcome: object) -> None:
            dropped.append(outcome)

        dropped: list[object] = []
        pixels = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
        scheduler.spare.put(queue, pixels=pixels.copy, nbytes=12, threads=1, done=done)
        unloading = asyncio.create_task(registry.unload("third"))
        await until(lambda: bool(dropped))
        assert dropped == ["unloaded"]
        go_on.set()
        await blocked
        await unloading
        assert rollout.candidate is None
        assert rollout.status().state == "unavailable: unloaded"
        assert (await world.ask(pictures(5)))[0] == [5]
        await asyncio.sleep(0)
        await registry.load("third")
        assert rollout.status().state == "on"

    world.runner.run(scenario())
    world.done()
    assert more(before, counts(rollout))["dropped not-ready"] == 1


def test_a_hang_and_the_end_of_the_service_free_what_waits() -> None:
    async def scenario() -> None:
        spare, done = Spare(max_images=3, max_bytes=25), list[object]()
        pixels = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
        for nbytes in (12, 14, 13):
            spare.put(None, pixels=pixels.copy, nbytes=nbytes, threads=1, done=done.append)  # type: ignore[arg-type]
        assert (spare.images, spare.bytes, done) == (2, 25, ["bytes"])
        spare.clear()
        await until(lambda: not spare.images)
        assert (spare.bytes, done) == (0, ["bytes", "ended", "ended"])

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["nan", "raises"])
def test_faults_of_the_candidate_are_its_own(world: World, name: str) -> None:
    (rollout,) = world.roll("shadow", f"first:{name}=100%")
    before = counts(rollout)

    async def scenario() -> None:
        for image in (guilty_picture(3), pictures(4)[0]):
            written, answer = await world.ask([image])
            assert not any(isinstance(one, RequestError) for one in answer.images)
            assert written[0] in (3, 4)

    world.runner.run(scenario())
    world.done()
    assert more(before, counts(rollout)) == {
        "images primary ok": 2,
        "images candidate ok": 1,
        "images candidate model-fault": 1,
        "compared agree": 1,
    }
