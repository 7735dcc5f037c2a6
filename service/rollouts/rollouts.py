"""What a service does for its candidates: which requests they share, and the work besides the answers.

An answered image is also computed by the other model, as spare work (`service.scheduling.spare`): a shadow's by the
candidate, a canary's by the primary. It is queued once the answer is written, with the pixels that were decoded for the
answer if both models take the same.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from service.errors import ImageError, ModelFault, NotReady, RequestError
from service.models.model import Model
from service.rollouts.rollout import Arm, Rollout
from service.scheduling.cost import LARGE_WORK
from service.scheduling.decode_pool import DecodePool
from service.scheduling.outputs import Output
from service.scheduling.queue import Entry
from service.scheduling.scheduler import Scheduler
from service.scheduling.spare import Outcome, Spare

_TIMED_EVERY = 4
"""One in this many images of a shadow is computed by both models besides the answers, alternately as A B and B A: the
primary's time under traffic, next to decoders and other batches, cannot be compared with that of a candidate that has
the engine to itself."""

Images = Sequence[bytes] | npt.NDArray[np.uint8]


@dataclass(slots=True, kw_only=True)
class Part:
    """A request that names a primary: the rollouts that it is a part of."""

    canary: Rollout | None
    """The one that takes the request."""
    others: list[Rollout]
    """Shadows, and a canary that leaves it to the primary."""
    images: Images
    entries: list[Entry] = field(default_factory=list)
    """One for each image, with its pixels; filled by the code that answers."""

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.images)

    def fall_back(self) -> None:
        """The primary answers."""
        self.canary = None
        self.entries.clear()

    def failed(self, error: RequestError) -> None:
        """The request was not answered."""
        if self.canary is None:
            for rollout in self.others:
                rollout.failed("primary", error, self.count)


class _Pair:
    """The engine times of both models for one image, run one right after the other with nothing else running."""

    def __init__(self, rollout: Rollout) -> None:
        self._rollout = rollout
        self._seconds: dict[Arm, float] = {}

    def add(self, arm: Arm, outcome: Outcome) -> None:
        """Add the outcome of the image in one model. Both count, or neither."""
        if isinstance(outcome, Output):
            self._seconds[arm] = outcome.inference_ms / 1000
        if len(self._seconds) == 2:
            for each, seconds in self._seconds.items():
                self._rollout.took(each, seconds)


class Rollouts:
    """All rollouts of one application. On the event loop."""

    def __init__(
        self,
        rollouts: Sequence[Rollout],
        scheduler: Scheduler,
        decoders: DecodePool,
        *,
        max_images: int,
        max_bytes: int,
    ) -> None:
        """`max_images`, `max_bytes`: limits of what is held for spare work."""
        self.all = list(rollouts)
        self._scheduler, self._decoders = scheduler, decoders
        self.spare = scheduler.spare = Spare(max_images=max_images, max_bytes=max_bytes)
        self._numbers = itertools.count()
        self._by_primary: dict[str, list[Rollout]] = {}
        for rollout in rollouts:
            self._by_primary.setdefault(rollout.primary, []).append(rollout)

    def part_of(self, name: str | None, version: int | None, images: Images) -> Part | None:
        """What a request for `name` is a part of; None if its traffic is not split."""
        found = None if version is not None or name is None else self._by_primary.get(name)
        if not found:
            return None
        whole = [images] if isinstance(images, np.ndarray) else images
        canary = next((one for one in found if one.split.kind == "canary" and one.split.takes(whole)), None)
        return Part(canary=canary, others=[one for one in found if one is not canary], images=images)

    def answered(self, part: Part, images: Sequence[Output | RequestError], seconds: float) -> None:
        """Count a request that was answered in `seconds`."""
        outputs = sum(isinstance(image, Output) for image in images)
        if part.canary:
            part.canary.answered("candidate", outputs)
            part.canary.took("candidate", seconds)
            return
        for rollout in part.others:
            rollout.answered("primary", outputs)
            for image in images:
                if isinstance(image, RequestError):
                    rollout.failed("primary", image, 1)
            if rollout.split.kind == "canary":
                rollout.took("primary", seconds)

    def afterwards(
        self, part: Part | None = None, model: Model | None = None, images: Sequence[Output | RequestError] = ()
    ) -> None:
        """An answer is written: its images go to the other models, and waiting images may get their turn."""
        if part and model:
            for rollout in [part.canary] if part.canary else part.others:
                self._compare_all(rollout, part, model, images)
        if self.spare.waiting:
            self._scheduler.look_for_spare()

    def _compare_all(self, rollout: Rollout, part: Part, model: Model, images: Sequence[Output | RequestError]) -> None:
        canary = part.canary is rollout
        if rollout.split.kind == "canary" and not canary:
            return
        other = rollout.primary_model if canary else rollout.candidate
        for image, entry, output in zip(part.images, part.entries, images, strict=True):
            if not isinstance(output, Output) or not (canary or rollout.split.takes([image])):
                continue
            if other is None:
                rollout.dropped("not-ready")
            elif other is model:
                rollout.dropped("same-model")
            elif not rollout.alike(model, other):
                rollout.dropped("labels")
            else:
                self._compare(rollout, other, model, image, entry, output)

    def _compare(
        self,
        rollout: Rollout,
        other: Model,
        model: Model,
        image: bytes | npt.NDArray[np.uint8],
        entry: Entry,
        output: Output,
    ) -> None:
        cost, preprocessing = other.queue.cost, other.manifest.preprocessing
        layouts = [layout.threads for layout in cost.layouts]
        threads = output.threads if output.threads in layouts else layouts[0]
        pixels, shape = entry.pixels, other.manifest.input.shape[1:]
        number = next(self._numbers) if rollout.split.kind == "shadow" and threads == output.threads else None
        pair = _Pair(rollout) if number is not None and number % _TIMED_EVERY == 0 and pixels is not None else None
        put = partial(
            self.spare.put,
            other.queue,
            threads=threads,
            done=partial(self._done, rollout, int(output.probabilities.argmax()), pair),
        )

        def again() -> None:
            if pair and pixels is not None:
                done = partial(pair.add, "primary")
                self.spare.put(model.queue, threads=threads, done=done, pixels=pixels.copy, nbytes=pixels.nbytes)

        primary_first = number is not None and number % (2 * _TIMED_EVERY) == 0
        if primary_first:
            again()
        same = not isinstance(image, bytes) or preprocessing.geometry == model.manifest.preprocessing.geometry
        if pixels is not None and pixels.shape == shape and same:
            # A copy: a tensor's rows would keep the whole body in memory.
            put(pixels=pixels.copy, nbytes=pixels.nbytes)
        elif not isinstance(image, bytes):
            rollout.dropped("input")
        elif (work := self._decoders.work_of([image], preprocessing)[0]) > LARGE_WORK:
            rollout.dropped("large")
        else:
            put(
                decode=partial(self._decoders.render_here, image, preprocessing),
                decode_seconds=work * self._decoders.seconds_per_pixel,
                nbytes=len(image) + int(np.prod(shape)),
            )
        if not primary_first:
            again()

    def _done(self, rollout: Rollout, top1: int, pair: _Pair | None, outcome: Outcome) -> None:
        """The other model is done with an image, or it was dropped."""
        if pair:
            pair.add("candidate", outcome)
        if isinstance(outcome, str):
            rollout.dropped(outcome)
            return
        arm: Arm = "candidate" if rollout.split.kind == "shadow" else "primary"
        if isinstance(outcome, Output):
            rollout.compared(top1, outcome)
            if arm == "candidate":
                rollout.answered(arm, 1)
        elif isinstance(outcome, ImageError):
            rollout.dropped("decode")
        elif isinstance(outcome, NotReady):
            rollout.dropped("not-ready")
        elif arm == "candidate":
            rollout.failed(arm, outcome if isinstance(outcome, RequestError) else ModelFault(""), 1)
        else:
            rollout.dropped("fault")
