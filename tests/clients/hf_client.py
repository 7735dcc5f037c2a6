"""huggingface_hub's InferenceClient, unmodified, against /hf.

python -m tests.clients.hf_client --url http://127.0.0.1:8000 --model cifar100-csra-r2
"""

import asyncio
import os
import random
import tempfile
from pathlib import Path

from tests.clients.checks import Target, check, classify, png, read_target, refused, same

# `tests` keeps its tests off the hub; this one asks the service on this machine, which would be refused too.
os.environ["HF_HUB_OFFLINE"] = "0"
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import BadRequestError, HfHubHTTPError

SIDE = 32


def main() -> None:
    """Run all checks."""
    target = read_target("InferenceClient's image_classification against /hf.")
    pixels = random.Random(1).randbytes(SIDE * SIDE * 3)  # noqa: S311 (a picture)
    image = png(pixels, width=SIDE, height=SIDE)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.png"
        file.write_bytes(image)
        answers(target, image, file)
        asyncio.run(answers_async(target, image, file))
    explains(target, image)


def answers(target: Target, image: bytes, file: Path) -> None:
    """The same classes and probabilities as /v1, whatever holds the image."""
    client = InferenceClient(model=f"{target.url}/hf/{target.model}")
    wanted = scores(target, image, 5)
    contents: dict[str, Path | str | bytes] = {"a path": file, "a path in a string": str(file), "bytes": image}
    for kind, content in contents.items():
        with check(f"{kind} is classified"):
            same([(best.label, best.score) for best in client.image_classification(content)], wanted)
    with check("top_k"):
        same([best.label for best in client.image_classification(file, top_k=2)], [label for label, _ in wanted[:2]])
    with check("function_to_apply"):
        logits = client.image_classification(file, function_to_apply="none")
        same([best.label for best in logits], [label for label, _ in wanted])
        best = client.image_classification(file, function_to_apply="sigmoid", top_k=1)[0]
        same(0.5 < best.score < 1, logits[0].score > 0)
    with check("the model in the call, a family, and a deadline in the URL"):
        family = target.model.partition("-")[0]
        url = f"{target.url}/hf/{family}?deadline_ms=60000"
        same(len(InferenceClient().image_classification(file, model=url)), 5)
    with check("a token, where no key is needed"):
        other = InferenceClient(model=f"{target.url}/hf/{target.model}", token="hf_any")  # noqa: S106 (none)
        same(len(other.image_classification(file)), 5)


async def answers_async(target: Target, image: bytes, file: Path) -> None:
    """The same through the asynchronous client."""
    with check("the asynchronous client"):
        client = AsyncInferenceClient(model=f"{target.url}/hf/{target.model}")
        got = await client.image_classification(file)
        same([(best.label, best.score) for best in got], scores(target, image, 5))


def explains(target: Target, image: bytes) -> None:
    """Errors arrive with their status and their message."""
    client = InferenceClient(model=f"{target.url}/hf/{target.model}")
    unknown = InferenceClient(model=f"{target.url}/hf/none")
    for status, message, call in (
        (404, "no model 'none'", lambda: unknown.image_classification(image)),
        (400, "bad-image", lambda: client.image_classification(image[:100])),
        (415, "a PDF document", lambda: client.image_classification(b"%PDF-1.7")),
        (422, "top_k", lambda: client.image_classification(image, top_k=0)),
    ):
        with check(f"error {status} arrives with its message"):
            error = refused(call, BadRequestError if status == 400 else HfHubHTTPError)
            assert isinstance(error, HfHubHTTPError)
            same(error.response.status_code, status)
            if message != "bad-image":
                same(message in str(error), True, f"{message!r} in {error}")


def scores(target: Target, image: bytes, top_k: int) -> list[tuple[str, float]]:
    """What /v1 answers."""
    return [(best["label"], best["probability"]) for best in classify(target, image, top_k)]


if __name__ == "__main__":
    main()
