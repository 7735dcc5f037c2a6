"""A model behind FastAPI as one writes it on the first day: a thread a request, each calls `session.run` by itself.

    python loadtests/baseline/plain_fastapi.py models/cifar100-mha/1 --port 8001

The yardstick of `python -m loadtests limit`: same decoding, resizing and model as the service's, ONNX Runtime's
defaults, and no queue, batches, limits, proof or metrics.
"""

import argparse
import io
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import uvicorn
from fastapi import Depends, FastAPI, Request
from PIL import Image


async def body(request: Request) -> bytes:
    """All bytes of a request."""
    return await request.body()


def create_app(bundle: Path) -> FastAPI:
    """Answer `POST /v1/classify` with the five most probable classes, whatever the query says."""
    session = onnxruntime.InferenceSession(bundle / "model.onnx")
    labels = (bundle / "labels.txt").read_text(encoding="utf-8").splitlines()
    how = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["preprocessing"]
    app = FastAPI()

    @app.post("/v1/classify")
    def classify(data: Annotated[bytes, Depends(body)]) -> dict[str, Any]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        width, height = (int(how["resize"] * side / min(image.size)) for side in image.size)
        image = image.resize((width, height), Image.Resampling[how["interpolation"].upper()])
        left, top = round((width - how["crop"]) / 2), round((height - how["crop"]) / 2)
        pixels = np.asarray(image.crop((left, top, left + how["crop"], top + how["crop"])))
        (probabilities,) = session.run(["probabilities"], {"image": pixels[np.newaxis]})[0]
        best = np.argsort(-probabilities)[:5]
        classes = [{"index": int(i), "label": labels[i], "probability": float(probabilities[i])} for i in best]
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
