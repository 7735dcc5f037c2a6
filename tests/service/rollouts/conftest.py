"""A started pipeline with models that agree, differ and fail, and rollouts that each test puts into it."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from service.app import make_pipeline
from service.http.client import Client
from service.metrics import Metrics
from service.pipeline import Answer, Inputs, Pipeline, RequestOptions
from service.rollouts.rollout import Rollout
from service.rollouts.rollouts import Rollouts
from service.rollouts.split import Kind, parse_split
from service.rollouts.start import settled
from service.scheduling.admission import Place
from service.scheduling.scheduler import Output
from service.settings import Settings
from tests.service.conftest import until
from tests.service.faulty import faulty_graph
from tests.service.identity import CLASSES, SIDE, number_in, picture, publish_identity


def negated_graph() -> bytes:
    """logits = the pixels, negated: another top-1 for every picture that is not black."""
    node = helper.make_node
    graph = helper.make_graph(
        [
            node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
            node("Flatten", ["float"], ["flat"]),
            node("Neg", ["flat"], ["logits"]),
            node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        "negated",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", CLASSES])
            for name in ("logits", "probabilities")
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def publish_all(repository: Path) -> None:
    """`first` has two versions that agree; `second` differs; `wide` resizes in another way; the rest is bad."""
    publish_identity(repository, "first", top1=0.5)
    publish_identity(repository, "first", top1=0.6)
    publish_identity(repository, "second", top1=0.9, graph=negated_graph())
    publish_identity(repository, "third", top1=0.4)
    publish_identity(repository, "wide", top1=0.4, family="wide", interpolation="bicubic")
    publish_identity(repository, "nan", top1=0.4, family="bad", graph=faulty_graph("nan"))
    publish_identity(repository, "raises", top1=0.4, family="bad", graph=faulty_graph("exception"))
    publish_identity(repository, "labels", top1=0.4, family="labels", labels=tuple("abcdefghijkl"))


DEADLINE_SECONDS = 400
"""So late that no busy machine keeps a candidate from answering."""


@dataclass
class World:
    """A pipeline, and the loop that it runs on."""

    runner: asyncio.Runner
    pipeline: Pipeline

    def roll(self, kind: Kind, *texts: str, max_images: int = 1000, max_bytes: int = 10**6) -> list[Rollout]:
        """Put rollouts in the place of those before."""
        pipeline, scheduler = self.pipeline, self.pipeline.scheduler
        splits = settled([parse_split(kind, text) for text in texts], pipeline.registry)
        found = [Rollout(split, pipeline.registry, pipeline.metrics) for split in splits]
        pipeline.rollouts = Rollouts(found, scheduler, pipeline.decoders, max_images=max_images, max_bytes=max_bytes)
        return found

    async def ask(
        self,
        pictures: Sequence[bytes] | np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
        *,
        model: str = "first",
        version: int | None = None,
        min_top1: float = 0.0,
    ) -> tuple[list[int], Answer]:
        """The numbers in the answers, and the answer."""

        async def read(place: Place) -> Inputs:
            place.hold_bytes(100)
            return Inputs(images=pictures)

        def write(answer: Answer) -> list[int]:
            return [number_in(abs(image.logits)) if isinstance(image, Output) else -1 for image in answer.images]

        return await self.pipeline.answer(
            RequestOptions(model=model, version=version, min_top1=min_top1),
            arrived_at=time.perf_counter(),
            read=read,
            write=write,
            watching=Client().watched,
            partial=True,
        )

    def done(self) -> None:
        """Wait until nothing is left to compare, and see that nothing is held anywhere."""
        pipeline, scheduler = self.pipeline, self.pipeline.scheduler
        spare = scheduler.spare
        assert spare is not None
        self.runner.run(until(lambda: not spare.images and not scheduler.lanes.runs))
        assert (spare.images, spare.bytes, spare.waiting) == (0, 0, False)
        assert (pipeline.admission.images, pipeline.admission.bytes) == (0, 0)
        for queue in scheduler.queues:
            backlog = queue.backlog
            assert (len(queue), backlog.waiting, backlog.undecoded, backlog.in_decoding) == (0, 0, 0, 0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    repository = tmp_path_factory.mktemp("models")
    publish_all(repository)
    options = Settings(
        repository=repository,
        threads=1,
        max_batch=4,
        max_consecutive_faults=0,
        canary=("first@2=50%",),
        default_deadline_ms=DEADLINE_SECONDS * 1000,
        max_deadline_ms=DEADLINE_SECONDS * 1000,
    )
    pipeline = make_pipeline(options, Metrics())

    async def start() -> None:
        pipeline.start()

    with asyncio.Runner() as runner:
        runner.run(start())
        yield World(runner, pipeline)
        runner.run(pipeline.close())


def pictures(*numbers: int) -> list[bytes]:
    return [picture(number) for number in numbers]
