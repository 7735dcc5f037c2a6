"""NVIDIA's tritonclient, unmodified, against /v2: every call that the service answers.

python -m tests.clients.triton_client --url http://127.0.0.1:8000 --model cifar100-csra-r2 [--admin-key KEY]
"""

import asyncio
import base64
import itertools
import json
from functools import partial
from typing import Any

import numpy as np
import tritonclient.http as triton  # type: ignore[import-not-found]
import tritonclient.http.aio as triton_aio  # type: ignore[import-not-found]
from tritonclient.utils import InferenceServerException  # type: ignore[import-not-found]

from tests.clients.checks import Target, check, classify, png, post, read_target, refused, same

EXTENSIONS = {
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
}
DURATIONS = (
    "success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss"
)  # fmt: skip
IMAGES = 8


class Session:
    """The client, the model's shape, and images with the outputs that every form of request must return."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.client = triton.InferenceServerClient(target.authority, concurrency=4)
        self.metadata = self.client.get_model_metadata(target.model)
        _, self.height, self.width, _ = self.metadata["inputs"][0]["shape"]
        shape = (IMAGES, self.height, self.width, 3)
        self.pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        self.files = [png(image.tobytes(), width=self.width, height=self.height) for image in self.pixels]
        self.wanted = [classify(target, file, 5) for file in self.files]
        self.logits, self.probabilities = self.both(self.infer(self.pixel_input()))

    def pixel_input(self, *, binary: bool = True) -> Any:
        tensor = triton.InferInput("image", list(self.pixels.shape), "UINT8")
        return tensor.set_data_from_numpy(self.pixels, binary_data=binary)

    def file_input(self, shape: list[int], *, binary: bool) -> Any:
        # JSON cannot hold an image's bytes: there, a string is base64.
        elements = self.files if binary else [base64.b64encode(file) for file in self.files]
        tensor = triton.InferInput("image", shape, "BYTES")
        return tensor.set_data_from_numpy(np.array(elements, dtype=np.object_).reshape(shape), binary_data=binary)

    def outputs(self, *, binary: bool, classes: int = 0) -> list[Any]:
        return [
            triton.InferRequestedOutput(name, binary_data=binary, class_count=classes)
            for name in ("logits", "probabilities")
        ]

    def infer(self, tensor: Any, outputs: list[Any] | None = None, **options: Any) -> Any:
        return self.client.infer(self.target.model, [tensor], outputs=outputs, **options)

    def both(self, result: Any) -> tuple[Any, Any]:
        return result.as_numpy("logits"), result.as_numpy("probabilities")

    def agrees(self, result: Any) -> None:
        """The result equals that of all other forms of request, and its best classes are /v1's."""
        logits, probabilities = self.both(result)
        same(logits.dtype, np.dtype(np.float32), "dtype")
        # Batches of other sizes add up in another order, on a GPU more so.
        np.testing.assert_allclose(logits, self.logits, atol=1e-3)
        np.testing.assert_allclose(probabilities, self.probabilities, atol=1e-4)
        for row, wanted in zip(probabilities, self.wanted, strict=True):
            same(int(row.argmax()), wanted[0]["index"], "best class")
            np.testing.assert_allclose(row.max(), wanted[0]["probability"], atol=1e-4)


def describes_itself(session: Session) -> None:
    client, model = session.client, session.target.model
    with check("server and model are live and ready, another model is not"):
        same((client.is_server_live(), client.is_server_ready(), client.is_model_ready(model)), (True,) * 3)
        same(client.is_model_ready("none"), False)
    with check("server metadata"):
        metadata = client.get_server_metadata()
        same(metadata["name"], "stridevit")
        same(EXTENSIONS - set(metadata["extensions"]), set(), "missing extensions")
    metadata, classes = session.metadata, session.logits.shape[1]
    version = metadata["versions"][-1]
    with check("model metadata, with and without a version"):
        same(client.get_model_metadata(model, version)["inputs"], metadata["inputs"])
        same((metadata["name"], metadata["platform"]), (model, "onnxruntime_onnx"))
        shape = [-1, session.height, session.width, 3]
        same(metadata["inputs"], [{"name": "image", "datatype": "UINT8", "shape": shape}])
        wanted = [{"name": name, "datatype": "FP32", "shape": [-1, classes]} for name in ("logits", "probabilities")]
        same(metadata["outputs"], wanted)
    with check("model configuration, with and without a version"):
        config = client.get_model_config(model)
        same(client.get_model_config(model, version), config)
        same(config["name"], model)
        same(config["max_batch_size"] >= IMAGES, True, "max_batch_size")
        (tensor,) = config["input"]
        same((tensor["name"], tensor["data_type"], tensor["dims"]), ("image", "TYPE_UINT8", shape[1:]))
        for name, tensor in zip(("logits", "probabilities"), config["output"], strict=True):
            same((tensor["name"], tensor["data_type"], tensor["dims"]), (name, "TYPE_FP32", [classes]))
    with check("readiness and inference of a version"):
        same(client.is_model_ready(model, version), True)
        same(client.is_model_ready(model, "999999"), False)
        result = session.infer(session.pixel_input(), model_version=version)
        session.agrees(result)
        same(result.get_response()["model_version"], version)


def infers(session: Session) -> None:
    target = session.target
    for binary_in, binary_out in itertools.product((True, False), repeat=2):
        kinds = f"{'binary' if binary_in else 'JSON'} in, {'binary' if binary_out else 'JSON'} out"
        with check(f"pixels: {kinds}"):
            session.agrees(session.infer(session.pixel_input(binary=binary_in), session.outputs(binary=binary_out)))
        for shape in ([IMAGES], [IMAGES, 1]):
            with check(f"encoded images, shape {shape}: {kinds}"):
                tensor = session.file_input(shape, binary=binary_in)
                session.agrees(session.infer(tensor, session.outputs(binary=binary_out)))
    with check("one output alone, and one binary beside one in JSON"):
        mixed = [
            triton.InferRequestedOutput("probabilities", binary_data=False),
            triton.InferRequestedOutput("logits", binary_data=True),
        ]
        session.agrees(session.infer(session.pixel_input(), mixed))
        alone = session.infer(session.pixel_input(), mixed[:1])
        same([output["name"] for output in alone.get_response()["outputs"]], ["probabilities"])
    with check("request id, priority, timeout, sequence id and parameters of one's own"):
        options: dict[str, Any] = {"priority": 1, "timeout": 60_000_000, "sequence_id": 7, "parameters": {"mine": "x"}}
        result = session.infer(session.pixel_input(), request_id="a/7", **options)
        session.agrees(result)
        same(result.get_response()["id"], "a/7")
        session.agrees(session.infer(session.pixel_input(), priority=9))
    for algorithm in ("gzip", "deflate"):
        with check(f"{algorithm}: request and response compressed"):
            for outputs in (None, session.outputs(binary=False)):
                session.agrees(
                    session.infer(
                        session.pixel_input(),
                        outputs,
                        request_compression_algorithm=algorithm,
                        response_compression_algorithm=algorithm,
                    )
                )
    infer_url = f"{target.url}/v2/models/{target.model}/infer"
    parse = triton.InferenceServerClient.parse_response_body
    with check("generate_request_body and parse_response_body, sent by hand; gzip answers when asked to"):
        body, length = triton.InferenceServerClient.generate_request_body([session.pixel_input()])
        for accepted in ("identity", "gzip"):
            sent = {"Inference_Header_Content_Length": str(length), "Accept_Encoding": accepted}
            answer, headers = post(infer_url, body, **sent)
            same(headers.get("content-encoding", "identity"), accepted, "Content-Encoding")
            same(headers["content-type"], "application/octet-stream")
            json_length = int(headers["inference-header-content-length"])
            session.agrees(parse(answer, header_length=json_length, content_encoding=headers.get("content-encoding")))
    with check("raw pixels (header length 0) get binary outputs"):
        answer, headers = post(infer_url, session.pixels.tobytes(), Inference_Header_Content_Length="0")
        session.agrees(parse(answer, header_length=int(headers["inference-header-content-length"])))
    with check("async_infer: 12 requests on 4 connections"):
        model, tensor = target.model, session.pixel_input()
        waiting = [session.client.async_infer(model, [tensor], request_id=str(number)) for number in range(12)]
        for number, request in enumerate(waiting):
            result = request.get_result()
            session.agrees(result)
            same(result.get_response()["id"], str(number))
    with check("the asyncio client"):
        session.agrees(asyncio.run(_infer_on_a_loop(session)))


async def _infer_on_a_loop(session: Session) -> Any:
    async with triton_aio.InferenceServerClient(session.target.authority) as client:
        same(await client.is_server_ready(), True)
        return await client.infer(session.target.model, [session.pixel_input()], outputs=session.outputs(binary=False))


def ranks(session: Session) -> None:
    for binary in (True, False):
        with check(f"classification of 3 classes, {'binary' if binary else 'JSON'}"):
            result = session.infer(session.pixel_input(), session.outputs(binary=binary, classes=3))
            for name in ("logits", "probabilities"):
                same(result.get_output(name)["datatype"], "BYTES")
                rows = result.as_numpy(name)
                same(rows.shape, (IMAGES, 3))
                for row, wanted in zip(rows, session.wanted, strict=True):
                    texts = [text.decode() if isinstance(text, bytes) else text for text in row]
                    parts = [text.split(":", 2) for text in texts]
                    same([(int(index), label) for _, index, label in parts],
                         [(item["index"], item["label"]) for item in wanted[:3]])  # fmt: skip
                    if name == "probabilities":
                        values = [item["probability"] for item in wanted[:3]]
                        np.testing.assert_allclose([float(value) for value, _, _ in parts], values, atol=1e-4)


def counts(session: Session) -> None:
    client, model = session.client, session.target.model
    version = session.metadata["versions"][-1]

    def read() -> dict[str, Any]:
        (entry,) = client.get_inference_statistics(model, version)["model_stats"]
        return dict(entry)

    with check("statistics count images and requests"):
        before = read()
        for _ in range(3):
            session.infer(session.pixel_input())
        refused(lambda: session.infer(session.file_input([IMAGES], binary=False).set_shape([1])), Exception)
        after = read()
        same((after["name"], after["version"]), (model, version))
        same(after["inference_count"] - before["inference_count"], 3 * IMAGES, "inference_count")
        same(1 <= after["execution_count"] - before["execution_count"] <= 3 * IMAGES, True, "execution_count")
        success = [entry["inference_stats"]["success"] for entry in (before, after)]
        same(success[1]["count"] - success[0]["count"], 3, "success")
        same(after["last_inference"] >= before["last_inference"] > 1e12, True, "milliseconds since the epoch")
        for name in DURATIONS:
            duration = after["inference_stats"][name]
            same([type(duration[key]) for key in ("count", "ns")], [int, int], name)
        for name in ("success", "queue", "compute_infer"):
            same(after["inference_stats"][name]["ns"] > 0, True, name)
        for entry in after["batch_stats"]:
            same(entry["batch_size"] >= 1, True)
            same(entry["compute_infer"]["count"] >= 1, True)
    with check("statistics of a model and of all models"):
        same([entry["name"] for entry in client.get_inference_statistics(model)["model_stats"]], [model])
        names = {entry["name"] for entry in client.get_inference_statistics()["model_stats"]}
        same(model in names, True)


def explains(session: Session) -> None:
    client, model = session.client, session.target.model
    float_input = triton.InferInput("image", list(session.pixels.shape), "FP32")
    float_input.set_data_from_numpy(session.pixels.astype(np.float32))
    small = triton.InferInput("image", [1, 2, 2, 3], "UINT8").set_data_from_numpy(session.pixels[:1, :2, :2])
    broken = triton.InferInput("image", [1], "BYTES").set_data_from_numpy(np.array([b"no image"], dtype=np.object_))
    shared = triton.InferInput("image", list(session.pixels.shape), "UINT8")
    shared.set_shared_memory("region", session.pixels.nbytes)
    secret = [triton.InferRequestedOutput("secret")]
    calls: list[tuple[str, str, str, Any]] = [
        ("unknown model", "404", "no model 'none'", lambda: client.get_model_metadata("none")),
        ("inference with an unknown model", "404", "none", lambda: client.infer("none", [session.pixel_input()])),
        ("unknown version", "404", "999999", lambda: client.get_model_config(model, "999999")),
        ("wrong datatype", "400", "FP32", lambda: session.infer(float_input)),
        ("wrong shape", "400", f"[n,{session.height},{session.width},3]", lambda: session.infer(small)),
        ("two inputs", "400", "2 inputs", lambda: client.infer(model, [session.pixel_input()] * 2)),
        ("unknown output", "400", "outputs.0.name", lambda: session.infer(session.pixel_input(), secret)),
        ("not an image", "415", "", lambda: session.infer(broken)),
        ("shared memory", "400", "shared memory is not offered", lambda: session.infer(shared)),
        ("a deadline of 1 µs", "429 504", "", lambda: session.infer(session.pixel_input(), timeout=1)),
        ("shared memory regions", "404", "", client.get_system_shared_memory_status),
        ("trace settings", "404", "", client.get_trace_settings),
        ("log settings", "404", "", client.get_log_settings),
    ]
    for name, status, message, call in calls:
        with check(f"error: {name}"):
            error: Any = refused(call, InferenceServerException)
            same(error.status() in status.split(), True, f"status {error.status()} of {error.message()!r}")
            same("decoding" in error.message(), False, error.message())
            same(message in error.message(), True, f"{message!r} in {error.message()!r}")


def loads(session: Session, key: str) -> None:
    client, model = session.client, session.target.model
    admin = {"Authorization": f"Bearer {key}"}

    def index() -> list[dict[str, str]]:
        entries: list[dict[str, str]] = client.get_model_repository_index(headers=dict(admin))
        return entries

    def states() -> set[str]:
        return {entry["state"] for entry in index() if entry["name"] == model}

    with check("repository index"):
        for entry in index():
            same({"name", "version", "state", "reason"} - entry.keys(), set(), "missing keys")
        same("READY" in states(), True, f"ready in {states()}")
        listed, _ = post(f"{session.target.url}/v2/repository/index", b'{"ready": true}', **admin)
        same(json.loads(listed), [entry for entry in index() if entry["state"] == "READY"], "only the ready")
    for verb in (client.load_model, client.unload_model):
        for kind, headers in (("no", {}), ("a wrong", {"Authorization": "Bearer wrong"})):
            with check(f"{verb.__name__} with {kind} key is refused"):
                error: Any = refused(partial(verb, model, headers=dict(headers)), InferenceServerException)
                same(error.status() in ("401", "403"), True, f"status {error.status()}")
                same("key" in error.message(), True, error.message())
                same(client.is_model_ready(model), True)
    with check("unload: the model is gone, and says so"):
        client.unload_model(model, headers=dict(admin))
        same(client.is_model_ready(model), False)
        same("READY" in states(), False, f"ready in {states()}")
        refused(lambda: session.infer(session.pixel_input()), InferenceServerException)
        same(client.is_server_live(), True)
    with check("load: the same answers again"):
        client.load_model(model, headers=dict(admin))
        same(client.is_model_ready(model), True)
        session.agrees(session.infer(session.pixel_input()))
    with check("reload: a load of a loaded model"):
        client.load_model(model, headers=dict(admin))
        session.agrees(session.infer(session.pixel_input()))
    with check("load of a model that is not there, or with a configuration of one's own, is refused"):
        for name, config in (("none", None), (model, "{}")):
            load = partial(client.load_model, name, headers=dict(admin), config=config)
            error = refused(load, InferenceServerException)
            same(error.status() in ("400", "404"), True, f"status {error.status()}")
        same(client.is_model_ready(model), True)


def main() -> None:
    """Run all checks."""
    target = read_target("tritonclient's calls against /v2.")
    with check("the first answer, pixels binary both ways, agrees with /v1"):
        session = Session(target)
        session.agrees(session.infer(session.pixel_input()))
    describes_itself(session)
    infers(session)
    ranks(session)
    counts(session)
    explains(session)
    if target.admin_key is None:
        print("  left out: loading and unloading (no --admin-key)", flush=True)
    else:
        loads(session, target.admin_key)
    session.client.close()


if __name__ == "__main__":
    main()
