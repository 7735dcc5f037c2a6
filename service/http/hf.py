"""/hf: Hugging Face's API for image classification, so that its clients need only another URL.

https://huggingface.co/docs/inference-providers/tasks/image-classification; `huggingface_hub.InferenceClient` sends an
image's bytes, or JSON as soon as it has parameters.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field
from pydantic_core import to_json

from service import errors
from service.http import exchange, hints
from service.http.fast_path import FastRoute
from service.http.openapi import HEADERS, SECURITY, described_by, fixed_part, query_parameters, v2_responses
from service.http.v1_body import least_image_bytes, read_sent
from service.pipeline import Answer, Inputs, Pipeline, RequestOptions, ranked
from service.scheduling.admission import Place
from service.scheduling.scheduler import Output

Function = Literal["softmax", "sigmoid", "none"]


class HfQuery(RequestOptions):
    """What a request may ask for: Hugging Face's parameters, and in the URL also ours."""

    top_k: Annotated[int, Field(ge=1, le=1000)] = 5
    """How many classes to return, best first."""
    function_to_apply: Function = "softmax"
    """What turns the logits into scores: `softmax`, `sigmoid`, or `none`."""


class Score(BaseModel):
    """One class and its score."""

    label: str
    score: float


OPTIONS = tuple(name for name in HfQuery.model_fields if name != "model")
"""All but the model, which the path names."""

_JSON_FORM = 'write {"inputs": "<base64>", "parameters": {"top_k": 5}}, with or without parameters'

_SCORES: dict[Function, Callable[[Output], npt.NDArray[np.float32]]] = {
    "softmax": lambda output: output.probabilities,
    # The logistic function, in a form that does not overflow.
    "sigmoid": lambda output: 0.5 + 0.5 * np.tanh(0.5 * output.logits),
    "none": lambda output: output.logits,
}


def router(pipeline: Pipeline) -> APIRouter:
    """The route under /hf."""
    routes = APIRouter(prefix="/hf", tags=["hf: Hugging Face's clients"], dependencies=SECURITY)

    async def hf(request: Request) -> Response:
        """Classify one image, for `huggingface_hub.InferenceClient(model="http://HOST:PORT/hf/NAME")`.

        The answer is a list, best class first. The path names a model or a family; of a family, the most accurate model
        that can meet the deadline answers, and the header `X-StrideViT-Model` says which one it was.
        """
        named = {"model": request.path_params["name"]}
        query = exchange.query_values(request.scope["query_string"], OPTIONS)
        options = exchange.validated(HfQuery, {**query, **named})
        image = b""

        async def read(place: Place) -> Inputs:
            nonlocal image, options
            sent = await read_sent(request, place, pipeline.limits, pipeline.decoders, OPTIONS, json_form=_JSON_FORM)
            if len(sent.images) != 1:
                raise errors.BadRequest(
                    f"one image per request, got {len(sent.images)}: send one request for each, or all to /v1/classify"
                )
            (image,) = sent.images
            options = exchange.joined(options, sent.options)
            return Inputs(images=[image], options=exchange.with_headers(request, options))

        try:
            scores, answer = await pipeline.answer(
                exchange.with_headers(request, options),
                arrived_at=request.scope["state"]["started"],
                read=read,
                write=lambda answer: _scores(answer, options),
                watching=partial(exchange.watching, request),
                encoded_bytes=least_image_bytes(request),
            )
        except errors.UnsupportedImage as error:
            if hint := image and hints.for_body(image):
                raise errors.UnsupportedImage(hint) from error
            raise
        return Response(to_json(scores), media_type="application/json", headers=exchange.report(request, answer))

    described = query_parameters(HfQuery, headers=HEADERS)
    routes.add_api_route(
        "/{name}",
        hf,
        methods=["POST"],
        route_class_override=FastRoute,
        response_model=list[Score],
        responses=v2_responses(
            *(errors.BadRequest, errors.BadImage, errors.UnsupportedImage, errors.TooManyPixels),
            *(errors.Unauthorized, errors.Forbidden, errors.KeyLimited, errors.ModelFault),
            *(errors.UnknownModel, errors.NoSuitableModel, errors.InvalidParameter),
            *(errors.BodyTooLarge, errors.BodyTooSlow, errors.NotReady, errors.Overloaded, errors.DeadlineExceeded),
        ),
        openapi_extra=described_by(
            "/hf/{name}",
            parameters=[parameter for parameter in described if parameter["name"] != "model"],
            requestBody=fixed_part("hf_request_body"),
        ),
    )
    return routes


def _scores(answer: Answer, options: HfQuery) -> list[dict[str, Any]]:
    labels = answer.model.bundle.labels
    (output,) = answer.outputs
    best = ranked(_SCORES[options.function_to_apply](output), options.top_k)
    return [{"label": labels[index], "score": score} for index, score in best]
