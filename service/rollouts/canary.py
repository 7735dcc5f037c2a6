"""A request in a canary's share: the candidate answers it if it can; otherwise the primary does, as for any request."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from service.errors import ClientDisconnected, ImageError, ModelFault, NotReady, Overloaded, RequestError
from service.models.family import Choice, pareto_front
from service.models.model import Model
from service.models.registry import Registry
from service.rollouts.rollout import Fallback, Rollout
from service.rollouts.rollouts import Part
from service.scheduling.admission import Admission, Place
from service.scheduling.decode_pool import DecodePool
from service.scheduling.outputs import Output

Answers = list[Output | RequestError]
Infer = Callable[[Model, Sequence[int]], Awaitable[Answers]]
"""Has a model answer the images of the request, given the decoding work of each."""


class CanaryRequests:
    """Answers canary requests; stateless except for the counts of the rollouts."""

    def __init__(self, registry: Registry, admission: Admission, decoders: DecodePool) -> None:
        self._registry, self._admission, self._decoders = registry, admission, decoders

    async def answer(
        self,
        part: Part,
        canary: Rollout,
        place: Place,
        *,
        min_top1: float,
        fits: Callable[[Model], bool],
        infer: Infer,
    ) -> tuple[Model, Choice, Answers] | None:
        """The candidate's answers, and why it gave them; None if the primary is to answer, which is counted.

        The candidate is given up after its predicted time and half of the time that neither it nor the primary is
        predicted to need. Raises ClientDisconnected.
        """
        fastest = pareto_front(self._registry.candidates(canary.primary)[1])[-1]
        candidate = canary.candidate
        reason: Fallback
        if candidate is None:
            reason = "not-ready"
        elif unsuitable := _unsuitable(canary, candidate, fastest, min_top1=min_top1, fits=fits):
            reason = unsuitable
        else:
            outcome = await self._infer(candidate, fastest, part, place, infer)
            if not isinstance(outcome, str):
                images, predicted = outcome
                predicted_ms = round(predicted * 1000, 3)
                choice = Choice(family=canary.primary, reason="canary", predicted_ms=predicted_ms, skipped=[])
                return candidate, choice, images
            reason = outcome
        canary.fell_back(reason, part.count)
        part.fall_back()
        return None

    async def _infer(
        self, candidate: Model, primary: Model, part: Part, place: Place, infer: Infer
    ) -> tuple[Answers, float] | Fallback:
        """The answers and the predicted seconds, or why there are none: then the request no longer holds a place."""
        admission, state, images = self._admission, place.state, part.images
        decoding: list[int] = []
        if not isinstance(images, np.ndarray):
            decoding = self._decoders.work_of(images, candidate.manifest.preprocessing)
        predicted = admission.predict(candidate.queue, state, part.count, decoding=decoding)
        reserved = admission.predict(primary.queue, state, part.count, decoding=decoding)
        spare = admission.allowed_seconds(state) - reserved - predicted
        if spare < 0:
            return "late"
        try:
            admission.accept(place, candidate.queue, part.count, decoding=decoding)
        except Overloaded:
            return "refused"
        try:
            async with asyncio.timeout(predicted + spare / 2):
                answers = await infer(candidate, decoding)
        except TimeoutError:
            place.give_up_images()
            return "late"
        if reason := _reason(answers):
            place.give_up_images()
            return reason
        return answers, predicted


def _unsuitable(
    canary: Rollout, candidate: Model, primary: Model, *, min_top1: float, fits: Callable[[Model], bool]
) -> Fallback | None:
    """Why a candidate that serves cannot answer a request; None if it can."""
    if not fits(candidate):
        return "input"
    if not canary.alike(candidate, primary):
        return "labels"
    return "top1" if min_top1 > 0 and candidate.top1 < min_top1 else None


def _reason(images: Answers) -> Fallback | None:
    """Why the primary must answer, even if the candidate answered some; None if not. Raises ClientDisconnected."""
    for error in images:
        if isinstance(error, ClientDisconnected):
            raise error
        if isinstance(error, ModelFault):
            return "model-fault"
        if isinstance(error, NotReady):
            return "not-ready"
        if isinstance(error, RequestError) and not isinstance(error, ImageError):
            return "late"
    return None
