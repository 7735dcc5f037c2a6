"""Which model a family would choose for a request now, and how long each would take, without sending a request."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from service.errors import UnknownModel
from service.image_work import work_of_bytes
from service.models.family import Reason, pareto_front
from service.pipeline import Pipeline, RequestOptions
from service.scheduling.request import RequestState

Why = Literal["chosen", "late", "headroom", "less_accurate", "no_faster"]


class PlanOptions(BaseModel, frozen=True, use_attribute_docstrings=True):
    """The request to plan for."""

    deadline_ms: Annotated[float | None, Field(gt=0, le=1e9)] = None
    """Deadline in milliseconds, as for a classification."""
    images: Annotated[int, Field(ge=1, le=1000)] = 1
    """How many images the request would have."""
    pixels: Annotated[int, Field(ge=0, le=1_000_000_000)] = 0
    """Pixels of each image if it is a JPEG; twice its pixels if it is of another format. By default, images are very
    small."""


class Rung(BaseModel):
    """A model of the family."""

    model: str
    version: int
    precision: str
    top1: float
    predicted_ms: float
    """From now to the answer: the sum of `queue_ms` and `compute_ms`."""
    queue_ms: float
    """Waiting for the work of other requests, and for an event loop that is late."""
    compute_ms: float
    """Decoding and inference, on a service without other requests."""
    in_time: bool
    chosen: bool
    why: Why
    """`late`: it would miss the deadline; `headroom`: it would be in time, but without enough headroom;
    `less_accurate`: it would be in time, but so would a more accurate one; `no_faster`: it costs about as much as a
    more accurate one, and is never chosen."""


class Plan(BaseModel):
    """The choice that a request would get now. Other requests may change it before that request arrives."""

    family: str
    deadline_ms: float
    """The request's deadline, at most the longest that the service allows."""
    images: int
    chosen: str
    reason: Reason
    """The same as in the `choice` of a classification."""
    allowed_ms: float
    """Models that are predicted to finish later than this are late: `deadline_margin` of the deadline."""
    in_time: bool
    """Whether the chosen model would be in time: if not, the request would be refused with 429."""
    rungs: list[Rung]
    """The most accurate first."""


def plan(pipeline: Pipeline, name: str, options: PlanOptions) -> Plan:
    """Plan a request for a family. Nothing is counted, and no choice changes. Raises UnknownModel or NotReady."""
    pipeline.scheduler.require_engine()
    family, members = pipeline.registry.candidates(name)
    if family is None:
        raise UnknownModel(f"{name!r} is a model, not a family: GET /v1/models lists the families")
    admission = pipeline.admission
    seconds = pipeline.seconds(RequestOptions(deadline_ms=options.deadline_ms))
    state = RequestState(seconds=seconds, arrived_at=pipeline.load.clock())
    decoding = [work_of_bytes(0) + options.pixels] * options.images
    allowed = admission.allowed_seconds(state)
    chosen, choice = pipeline.decide(family, members, state, options.images, decoding=decoding)
    known_ms = {chosen.name: choice["predicted_ms"], **{one["model"]: one["predicted_ms"] for one in choice["skipped"]}}
    front, rungs = pareto_front(members), []
    for model in members:
        # For models that the choice has looked at, the prediction that it saw.
        predicted_ms = known_ms.get(model.name)
        if predicted_ms is None:
            predicted_ms = 1000 * admission.predict(model.queue, state, options.images, decoding=decoding)
        idle_ms = 1000 * admission.idle_seconds(model.queue, options.images, decoding=decoding)
        compute_ms = min(idle_ms, predicted_ms)
        in_time = predicted_ms <= 1000 * allowed
        if model is chosen:
            why: Why = "chosen"
        elif model not in front:
            why = "no_faster"
        elif not in_time:
            why = "late"
        else:
            why = "headroom" if model.top1 > chosen.top1 else "less_accurate"
        rungs.append(
            Rung(
                model=model.name,
                version=model.version,
                precision=model.manifest.precision,
                top1=model.top1,
                predicted_ms=round(predicted_ms, 3),
                queue_ms=round(predicted_ms - compute_ms, 3),
                compute_ms=round(compute_ms, 3),
                in_time=in_time,
                chosen=model is chosen,
                why=why,
            )
        )
    return Plan(
        family=family.name,
        deadline_ms=1000 * seconds,
        images=options.images,
        chosen=chosen.name,
        reason=choice["reason"],
        allowed_ms=round(1000 * allowed, 3),
        in_time=next(rung.in_time for rung in rungs if rung.chosen),
        rungs=rungs,
    )
