"""What /v2 says about models: metadata, configuration and statistics, as Triton's protocol writes them."""

from dataclasses import asdict
from typing import Any

from service.manifest import Tensor
from service.models.model import Model, Sum

_DATA_TYPES = {"UINT8": "TYPE_UINT8", "FP32": "TYPE_FP32"}


def metadata(name: str, model: Model, *, versions: list[int]) -> dict[str, Any]:
    """A model's versions, inputs and outputs, under the name that the request uses for it."""

    def described(tensor: Tensor) -> dict[str, Any]:
        return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}

    return {
        "name": name,
        "versions": [str(version) for version in versions],
        "platform": "onnxruntime_onnx",
        "inputs": [described(model.manifest.input)],
        "outputs": [described(output) for output in model.manifest.outputs],
    }


def config(name: str, model: Model, *, max_images_per_request: int, versions_to_serve: int) -> dict[str, Any]:
    """A model's configuration, as Triton would write it."""

    def described(tensor: Tensor) -> dict[str, Any]:
        return {"name": tensor.name, "data_type": _DATA_TYPES[tensor.datatype], "dims": list(tensor.shape[1:])}

    return {
        "name": name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "version_policy": {"latest": {"num_versions": versions_to_serve}},
        "max_batch_size": max_images_per_request,
        "input": [{**described(model.manifest.input), "format": "FORMAT_NONE"}],
        "output": [{**described(output), "label_filename": "labels.txt"} for output in model.manifest.outputs],
        "dynamic_batching": {"preferred_batch_size": list(model.queue.cost.sizes), "max_queue_delay_microseconds": 0},
        "parameters": {},
    }


def statistics(model: Model) -> dict[str, Any]:
    """What a model has done so far, in the form of the statistics extension."""
    done, nothing = model.statistics, asdict(Sum())
    return {
        "name": model.name,
        "version": str(model.version),
        "last_inference": done.last_inference_ms,
        "inference_count": done.images,
        "execution_count": sum(batch.count for batch in done.batches.values()),
        "inference_stats": {
            "success": asdict(done.success),
            "fail": asdict(done.fail),
            "queue": asdict(done.queue),
            "compute_input": asdict(done.decode),
            "compute_infer": asdict(done.inference),
            "compute_output": asdict(done.answer),
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "batch_stats": [
            {
                "batch_size": size,
                "compute_input": {"count": batch.count, "ns": 0},
                "compute_infer": asdict(batch),
                "compute_output": {"count": batch.count, "ns": 0},
            }
            for size, batch in sorted(done.batches.items())
        ],
        "memory_usage": [],
    }
