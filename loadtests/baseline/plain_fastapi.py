"""A model behind FastAPI in its simplest form: one thread per request, each of which calls `session.run` itself.

    python -m loadtests.baseline.plain_fastapi models/cifar100-mha/4 --port 8001

The baseline of `stridevit loadtest limit`: the service's own model and decoding, ONNX Runtime's defaults, and no
queue, batches, limits, golden outputs or metrics.
"""

import argparse
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import uvicorn
from fastapi import Depends, FastAPI, Request

from service.bundle import read_bundle
from service.images import MAX_PIXELS, decode


async def body(request: Request) -> bytes:
    """All bytes of a request."""
    return await request.body()


def create_app(folder: Path) -> FastAPI:
    """Answer `POST /v1/classify` with the five most probable classes, whatever the query says."""
    bundle = read_bundle(folder)
    session = onnxruntime.InferenceSession(bundle.model_path)
    app = FastAPI()

    @app.post("/v1/classify")
    def classify(data: Annotated[bytes, Depends(body)]) -> dict[str, Any]:
        pixels = decode(data, bundle.manifest.preprocessing, max_pixels=MAX_PIXELS)
        (probabilities,) = session.run(["probabilities"], {"image": pixels[np.newaxis]})[0]
        best = np.argsort(-probabilities)[:5]
        classes = [{"index": int(i), "label": bundle.labels[i], "probability": float(probabilities[i])} for i in best]
        return {"results": [{"predictions": classes}]}

    @app.get("/readyz")
    def ready() -> dict[str, bool]:
        return {"ready": True}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder NAME/VERSION of a repository")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    uvicorn.run(create_app(arguments.bundle), port=arguments.port, log_level="warning")
