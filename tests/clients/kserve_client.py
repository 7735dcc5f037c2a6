"""The KServe SDK's InferenceRESTClient, unmodified, against /v2.

python -m tests.clients.kserve_client --url http://127.0.0.1:8000 --model cifar100-csra-r2
"""

import asyncio
import base64
from typing import Any

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig  # type: ignore[import-not-found]
from kserve.protocol.infer_type import RequestedOutput  # type: ignore[import-not-found]

from tests.clients.checks import Target, check, classify, metadata, png, read_target, same

IMAGES = 4


async def main() -> None:
    """Run all checks."""
    target = read_target("The KServe SDK's calls against /v2.")
    # Not through the environment's proxies.
    transport = httpx.AsyncHTTPTransport()
    async with InferenceRESTClient(RESTConfig(protocol="v2", transport=transport)) as client:
        await answers(client, target)
        await explains(client, target)


async def answers(client: Any, target: Target) -> None:
    """Health, and the same outputs in every format."""
    with check("server and model are live and ready, another model is not"):
        same(await client.is_server_live(target.url), True)
        same(await client.is_server_ready(target.url), True)
        same(await client.is_model_ready(target.url, target.model), True)
        same(await client.is_model_ready(target.url, "none"), False)
    _, height, width, _ = metadata(target)["inputs"][0]["shape"]
    pixels = np.random.default_rng(1).integers(0, 256, (IMAGES, height, width, 3), dtype=np.uint8)
    files = [png(image.tobytes(), width=width, height=height) for image in pixels]
    wanted = [classify(target, file, 1)[0] for file in files]

    def pixel_input(*, binary: bool) -> Any:
        tensor = InferInput("image", list(pixels.shape), "UINT8")
        tensor.set_data_from_numpy(pixels, binary_data=binary)
        return tensor

    def file_input(*, binary: bool) -> Any:
        # JSON cannot hold an image's bytes: there, a string is base64.
        elements = files if binary else [base64.b64encode(file) for file in files]
        tensor = InferInput("image", [IMAGES], "BYTES")
        tensor.set_data_from_numpy(np.array(elements, dtype=np.object_), binary_data=binary)
        return tensor

    inputs = {
        "pixels in JSON": pixel_input(binary=False),
        "pixels in binary": pixel_input(binary=True),
        "encoded images in JSON": file_input(binary=False),
        "encoded images in binary": file_input(binary=True),
    }
    outputs: dict[str, dict[str, Any]] = {
        "outputs in JSON": {},
        "all outputs in binary": {"parameters": {"binary_data_output": True}},
        "outputs in binary one by one": {
            "request_outputs": [RequestedOutput(name, {"binary_data": True}) for name in ("logits", "probabilities")]
        },
    }
    for given, tensor in inputs.items():
        for taken, options in outputs.items():
            with check(f"{given}, {taken}"):
                request = InferRequest(target.model, [tensor], request_id="a-7", **options)
                headers: dict[str, str] = {}
                response = await client.infer(target.url, request, model_name=target.model, response_headers=headers)
                same((response.id, response.model_name), ("a-7", target.model))
                same("inference-header-content-length" in headers, taken != "outputs in JSON", "binary")
                same([output.name for output in response.outputs], ["logits", "probabilities"])
                probabilities = response.get_output_by_name("probabilities").as_numpy()
                same(response.get_output_by_name("logits").as_numpy().dtype, np.dtype(np.float32))
                for row, best in zip(probabilities, wanted, strict=True):
                    same(int(row.argmax()), best["index"], "best class")
                    np.testing.assert_allclose(row.max(), best["probability"], atol=1e-4)
    with check("a request as a dict"):
        tensor = {"name": "image", "shape": list(pixels.shape), "datatype": "UINT8", "data": pixels.tolist()}
        response = await client.infer(target.url, {"inputs": [tensor]}, model_name=target.model)
        np.testing.assert_allclose(response.get_output_by_name("probabilities").as_numpy(), probabilities, atol=1e-4)


async def explains(client: Any, target: Target) -> None:
    """Errors arrive with their message."""
    tensor = {"name": "image", "shape": [1, 1], "datatype": "FP32", "data": [1.0]}
    for name, status, message in ((target.model, 400, "datatype UINT8"), ("none", 404, "no model 'none'")):
        with check(f"error {status} arrives with its message"):
            try:
                answer = await client.infer(target.url, {"inputs": [tensor]}, model_name=name)
            except httpx.HTTPStatusError as error:
                same(error.response.status_code, status)
                same(message in str(error), True, f"{message!r} in {error}")
            else:
                raise AssertionError(f"wanted an error, got {answer!r}")


if __name__ == "__main__":
    asyncio.run(main())
