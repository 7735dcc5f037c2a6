"""A canary's share is answered by the candidate, or else by the primary, and no request fails because of it."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from service.errors import NoSuitableModel, StartupError
from service.rollouts import canary
from service.rollouts.split import parse_split
from service.rollouts.start import settled
from tests.service.faulty import guilty_picture
from tests.service.identity import SIDE
from tests.service.rollouts.conftest import DEADLINE_SECONDS, World, pictures
from tests.service.rollouts.test_shadow import counts, more


def test_the_version_on_trial_answers_its_share_and_who_names_it(world: World) -> None:
    (rollout,) = world.roll("canary", "first@2=50%")
    before, registry = counts(rollout), world.pipeline.registry
    assert (registry.find("first").version, registry.find("first", 2).version) == (1, 2)
    taken = [number for number in range(1, 41) if rollout.split.takes(pictures(number))]

    async def scenario() -> None:
        for _ in range(2):  # the second time as a client that retries
            for number in range(1, 41):
                written, answer = await world.ask(pictures(number))
                assert written == [number]
                assert answer.model.version == (2 if number in taken else 1)
                if number in taken:
                    assert answer.choice is not None
                    assert (answer.choice["family"], answer.choice["reason"]) == ("first", "canary")
                else:
                    assert answer.choice is None
        assert (await world.ask(pictures(taken[0]), version=1))[1].model.version == 1

    world.runner.run(scenario())
    world.done()
    assert more(before, counts(rollout)) == {
        "images primary ok": 2 * (40 - len(taken)),
        "images candidate ok": 2 * len(taken),
        "compared agree": 2 * len(taken),
    }
    assert 10 < len(taken) < 30
    status = rollout.status()
    assert status.primary_ms
    assert status.candidate_ms


def test_a_request_of_many_images_has_one_arm(world: World) -> None:
    (rollout,) = world.roll("canary", "first:second=40%")
    before = counts(rollout)

    async def scenario() -> list[str]:
        return [(await world.ask(pictures(*range(place, place + 3))))[1].model.name for place in range(1, 31)]

    models = world.runner.run(scenario())
    world.done()
    changed = more(before, counts(rollout))
    assert set(models) == {"first", "second"}
    assert changed["images candidate ok"] == changed["compared differ"] == 3 * models.count("second")
    assert changed["images primary ok"] == 3 * models.count("first")


@pytest.mark.parametrize("name", ["nan", "raises"])
def test_a_candidate_that_fails_leaves_the_request_to_the_primary(world: World, name: str) -> None:
    (rollout,) = world.roll("canary", f"first:{name}=100%")
    before = counts(rollout)

    async def scenario() -> None:
        asked = [world.ask([guilty_picture(number)]) for number in range(1, 9)]
        for number, (written, answer) in enumerate(await asyncio.gather(*asked), 1):
            assert written[0] == number
            assert (answer.model.name, answer.choice) == ("first", None)
        written, answer = await world.ask(pictures(5))
        assert (written, answer.model.name) == ([5], name)
        written, answer = await world.ask([pictures(5)[0], guilty_picture(6)])
        assert (written, answer.model.name) == ([5, 6], "first")

    world.runner.run(scenario())
    world.done()
    changed = more(before, counts(rollout))
    assert changed["fallbacks model-fault"] == 10
    assert changed["images candidate ok"] == changed["compared agree"] == 1
    assert "images primary ok" not in changed, "those that fell back belong to neither arm"


def test_whatever_keeps_the_candidate_from_answering_the_primary_does(world: World) -> None:
    (rollout,) = world.roll("canary", "first:third=100%")
    before, registry = counts(rollout), world.pipeline.registry
    third = registry.find("third")

    async def scenario() -> None:
        # Slower than any deadline, by its cost model.
        layouts = third.queue.cost.layouts
        for layout in layouts:
            layout.seconds.update(dict.fromkeys(layout.seconds, 1000.0))
        assert (await world.ask(pictures(1)))[1].model.name == "first"
        with pytest.raises(NoSuitableModel):
            await world.ask(pictures(1), min_top1=0.55)  # the primary has 0.5
        await registry.unload("third")
        assert (await world.ask(pictures(2)))[1].model.name == "first"
        await registry.load("third")
        assert (await world.ask(pictures(3)))[1].model.name == "third"

    world.runner.run(scenario())
    world.done()
    changed = more(before, counts(rollout))
    assert {name: count for name, count in changed.items() if name.startswith("fallbacks")} == {
        "fallbacks late": 1,
        "fallbacks top1": 1,
        "fallbacks not-ready": 1,
    }


def test_a_candidate_that_hangs_on_longer_than_predicted_leaves_time_for_the_primary(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    (rollout,) = world.roll("canary", "first:second=100%")
    before, pipeline = counts(rollout), world.pipeline
    infer_one, second = pipeline._infer_one, pipeline.registry.find("second")
    waits: list[float] = []

    def at_once(seconds: float) -> asyncio.Timeout:
        """Note how long the candidate may take, and do not wait for it."""
        waits.append(seconds)
        return asyncio.timeout(0)

    monkeypatch.setattr(canary, "asyncio", SimpleNamespace(timeout=at_once))

    async def scenario() -> None:
        async def slow(model: object, *arguments: object) -> object:
            if model is second:
                await asyncio.Event().wait()
            return await infer_one(model, *arguments)  # type: ignore[arg-type]

        pipeline._infer_one = slow  # type: ignore[method-assign, assignment]
        try:
            written, answer = await world.ask(pictures(8))
        finally:
            del pipeline._infer_one
        assert (written, answer.model.name) == ([8], "first")

    world.runner.run(scenario())
    world.done()
    assert more(before, counts(rollout)) == {"fallbacks late": 1}
    # About half of what the deadline allows is the primary's.
    (wait,) = waits
    assert 0 < wait < 0.6 * pipeline.limits.deadline_margin * DEADLINE_SECONDS


def test_a_family_is_split_and_its_candidate_takes_no_part_in_its_choice(world: World) -> None:
    """Last but one: the candidate stays apart from its family in this pipeline."""
    (rollout,) = world.roll("canary", "second=30%")
    registry, before = world.pipeline.registry, counts(rollout)
    assert rollout.primary == "identity"
    assert [model.name for model in registry.families["identity"]] == ["first", "third"]
    assert registry.default != "second", "nor is it the default, although it is the most accurate"

    async def scenario() -> None:
        reasons = set()
        for number in range(1, 31):
            _, answer = await world.ask(pictures(number), model="identity")
            assert answer.choice is not None
            reasons.add((answer.model.name, answer.choice["reason"]))
            assert answer.choice["family"] == "identity"
        assert reasons == {("first", "most_accurate"), ("second", "canary")}
        assert (await world.ask(pictures(1), model="second"))[1].model.name == "second"

    world.runner.run(scenario())
    world.done()
    changed = more(before, counts(rollout))
    assert changed["images primary ok"] + changed["images candidate ok"] == 30
    chosen = {
        (labels["model"], labels["reason"]): value
        for labels, value in world.pipeline.metrics.totals("choices")
        if labels["family"] == "identity"
    }
    assert chosen["second", "canary"] == changed["images candidate ok"]


def test_tensors_of_another_shape_stay_with_the_primary(world: World) -> None:
    (rollout,) = world.roll("canary", "first:third=100%")
    before = counts(rollout)
    rows = np.zeros((2, SIDE, SIDE, 3), dtype=np.uint8)

    async def scenario() -> None:
        assert (await world.ask(rows))[1].model.name == "third"
        third = world.pipeline.registry.find("third")
        shape, third.manifest.input.__dict__["shape"] = third.manifest.input.shape, (-1, 9, 9, 3)
        try:
            assert (await world.ask(rows))[1].model.name == "first"
        finally:
            third.manifest.input.__dict__["shape"] = shape

    world.runner.run(scenario())
    world.done()
    assert more(before, counts(rollout))["fallbacks input"] == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gone=5%", "canary 'gone': no model 'gone' here; there are: "),
        ("first@9=5%", "canary 'first@9': model 'first' has no version 9 here; there are: 1, 2"),
        ("gone:first=5%", "canary 'first': its primary: no model 'gone' here"),
        ("first@1=5%", "the candidate is the primary itself, and no other model serves 'first'"),
        ("third@1=5%", "the candidate is the primary itself, and no other model serves 'third'"),
        ("wide=5%", "the candidate is the primary itself, and no other model serves 'wide'"),
        ("first:labels=5%", "canary 'labels' has other labels than 'first': their answers cannot be compared"),
    ],
)
def test_a_candidate_that_makes_no_sense_ends_the_start_with_one_line(world: World, text: str, says: str) -> None:
    splits = [parse_split("canary", text)]
    with pytest.raises(StartupError) as raised:
        settled(splits, world.pipeline.registry)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_primary_has_one_candidate_of_a_kind(world: World) -> None:
    splits = [parse_split("canary", text) for text in ("first:third=5%", "first@2=5%")]
    with pytest.raises(StartupError, match="'first' has two candidates"):
        settled(splits, world.pipeline.registry)
