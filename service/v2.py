"""/v2: the core of the Open Inference Protocol (REST, JSON tensors), for existing clients.

https://github.com/kserve/open-inference-protocol. Binary tensors and the extensions are not here yet.
"""

import asyncio
import math
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, ValidationError

from service.bodies import read_images
from service.bundle import Tensor
from service.classify import Classifier
from service.errors import BadRequest, NotReady
from service.registry import Model


class InferInput(BaseModel):
    """An input tensor: nested or flat values in row-major order."""

    name: str
    shape: Annotated[list[Annotated[int, Field(ge=0, le=1_000_000)]], Field(max_length=8)]
    datatype: str
    data: list[Any]


class InferOutput(BaseModel):
    """An output that is asked for."""

    name: Literal["logits", "probabilities"]


class InferRequest(BaseModel):
    """The body of an inference request."""

    id: str | None = None
    inputs: list[InferInput]
    outputs: list[InferOutput] | None = None


def router(classifier: Classifier, *, version: str) -> APIRouter:
    """The routes under /v2, answering with `classifier`."""
    routes = APIRouter(prefix="/v2", tags=["v2: Open Inference Protocol"])

    @routes.get("")
    async def server() -> dict[str, Any]:
        """What this server is."""
        return {"name": "stridevit", "version": version, "extensions": []}

    @routes.get("/health/live")
    async def live() -> dict[str, bool]:
        """Whether the process answers."""
        return {"live": True}

    @routes.get("/health/ready")
    async def ready() -> dict[str, bool]:
        """Whether models take traffic."""
        if not classifier.ready:
            raise NotReady("the service is starting or draining: retry")
        return {"ready": True}

    @routes.get("/models/{name}")
    async def metadata(name: str) -> dict[str, Any]:
        """A model's inputs and outputs."""
        model = classifier.registry.find(name)
        return {
            "name": name,
            "versions": [str(model.bundle.version)],
            "platform": "onnxruntime_onnx",
            "inputs": [_tensor(model.manifest.input)],
            "outputs": [_tensor(output) for output in model.manifest.outputs],
        }

    @routes.get("/models/{name}/ready")
    async def model_ready(name: str) -> dict[str, Any]:
        """Whether a model takes traffic."""
        classifier.registry.find(name)
        return {"name": name, "ready": True}

    @routes.post("/models/{name}/infer")
    async def infer(name: str, request: Request) -> JSONResponse:
        """Logits and probabilities of a batch of uint8 images [n,H,W,3]."""
        model = classifier.registry.find(name)
        settings = classifier.settings
        with classifier.admit():
            body = await read_images(
                request, max_bytes=settings.max_body_bytes, max_images=1, seconds=settings.read_seconds
            )
            # Megabytes of JSON would hold up every other request on the event loop.
            asked, pixels = await classifier.in_decoder(partial(_parse, model, body[0], max_images=settings.max_images))
            with classifier.admit(len(pixels) - 1):
                outputs = await asyncio.gather(*(classifier.scheduler.submit(model.queue, image) for image in pixels))
        tensors = {
            "logits": np.stack([output.logits for output in outputs]),
            "probabilities": np.stack([output.probabilities for output in outputs]),
        }
        wanted: list[str] = [output.name for output in asked.outputs or []] or list(tensors)
        return JSONResponse(
            {
                "model_name": name,
                "model_version": str(model.bundle.version),
                **({"id": asked.id} if asked.id is not None else {}),
                "outputs": [
                    {
                        "name": output,
                        "datatype": "FP32",
                        "shape": list(tensors[output].shape),
                        "data": tensors[output].ravel().tolist(),
                    }
                    for output in wanted
                ],
            }
        )

    return routes


def _tensor(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}


def _parse(model: Model, body: bytes, *, max_images: int) -> tuple[InferRequest, np.ndarray[Any, np.dtype[np.uint8]]]:
    try:
        asked = InferRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"])
        raise BadRequest(f"malformed inference request: {place}: {first['msg']}") from error
    return asked, _pixels(model, asked, max_images=max_images)


def _pixels(model: Model, asked: InferRequest, *, max_images: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    _, *image_shape = model.manifest.input.shape
    expected = f"one input 'image', datatype UINT8, shape [n,{','.join(map(str, image_shape))}]"
    if len(asked.inputs) != 1:
        raise BadRequest(f"expected {expected}; got {len(asked.inputs)} inputs")
    tensor = asked.inputs[0]
    if (tensor.name, tensor.datatype) != ("image", "UINT8") or tensor.shape[1:] != image_shape:
        raise BadRequest(f"expected {expected}; got {tensor.name!r} {tensor.datatype} {tensor.shape}")
    if not 1 <= tensor.shape[0] <= max_images:
        raise BadRequest(f"a request carries 1 to {max_images} images; got {tensor.shape[0]}")
    needed = math.prod(tensor.shape)
    whole_numbers = f"input 'image': data must be {needed} whole numbers from 0 to 255"
    if len(tensor.data) > needed:
        raise BadRequest(f"{whole_numbers}, got {len(tensor.data)}")
    try:
        values = np.array(tensor.data)
    except ValueError as error:  # ragged lists
        raise BadRequest(whole_numbers) from error
    if values.size != needed:
        raise BadRequest(f"{whole_numbers}, got {values.size}")
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255:
        raise BadRequest(whole_numbers)
    return values.astype(np.uint8).reshape(tensor.shape)
