"""The engine: one ONNX Runtime session for one model on one device, without silent fallback to another."""

import contextlib
import ctypes
import importlib.metadata
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from service.errors import EngineError

Device = Literal["cpu", "cuda", "tensorrt"]

INPUT = "image"
OUTPUTS = ("logits", "probabilities")
"""Names of the input and the outputs of every graph that export writes."""

_PACKED = "packed.onnx"

_INSTALL = "install exactly one engine: pip install 'stridevit[cpu]' or pip install 'stridevit[gpu]'"


def require_one_engine() -> str:
    """The installed distribution of ONNX Runtime. Raises EngineError for none or two.

    `onnxruntime` and `onnxruntime-gpu` unpack into the same folder, so the one that was installed last would win.
    """
    found = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]
    if not found:
        raise EngineError(f"ONNX Runtime is not installed: {_INSTALL}")
    if len(found) > 1:
        raise EngineError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            f"pip uninstall both, then {_INSTALL}"
        )
    return found[0]


def resolve_device(requested: str) -> tuple[Device, int]:
    """`auto`, `cpu`, `cuda`, `cuda:N` or `tensorrt` as (device, GPU number). Raises EngineError if unavailable."""
    ort = _onnxruntime()
    kind, _, number = requested.partition(":")
    if kind not in ("auto", "cpu", "cuda", "tensorrt") or (number and not number.isdecimal()):
        raise EngineError(f"unknown device {requested!r}: use auto, cpu, cuda, cuda:N or tensorrt")
    available = ort.get_available_providers()
    if kind == "auto":
        has_gpu = "CUDAExecutionProvider" in available and Path("/proc/driver/nvidia/version").exists()
        kind = "cuda" if has_gpu else "cpu"
    if kind == "cpu":
        return "cpu", 0
    device: Device = "cuda" if kind == "cuda" else "tensorrt"
    if _PROVIDERS[device] not in available:
        raise EngineError(
            f"device {requested!r} is unavailable: this ONNX Runtime has only {', '.join(available)}: "
            "pip install 'stridevit[gpu]', or use --device cpu"
        )
    return device, int(number or 0)


_PROVIDERS: dict[Device, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Options of an engine besides device and threads. The defaults are ONNX Runtime's, not those of the service."""

    allow_spinning: bool = True
    """Threads that shared a batch spin for some milliseconds after it, and not only between its operators."""
    gpu_memory_bytes: int = 0
    """Limit of the GPU's memory arena; 0: no limit."""
    tf32: bool = False
    """Matrix products in TF32: faster on Ampere and later, with a mantissa of 10 bits."""
    cuda_graphs: bool = False
    """Record each batch size once and replay it: no launch costs, but memory for each size."""
    tensorrt_cache: Path | None = None
    """Folder to keep TensorRT's engines, which take minutes to build."""


class Engine:
    """Runs one ONNX file. On the CPU `run` may be called from several threads at once, which share the weights."""

    def __init__(
        self,
        model: Path | bytes,
        *,
        device: Device = "cpu",
        number: int = 0,
        threads: int = 1,
        tuning: Tuning | None = None,
        packed: bool = False,
        trace: Path | None = None,
    ) -> None:
        """Load a model from a file or its bytes. Raises EngineError if the device cannot run every node of it.

        `packed`: the file is one that `pack` wrote. `trace` is the prefix of a file with the time of every node,
        complete after `end_trace`.
        """
        ort = _onnxruntime()
        tuning = tuning or Tuning()
        options = _session_options(threads)
        if not tuning.allow_spinning:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        # With patterns, the second run of a batch size reserves another block as large as all those of the first run.
        options.enable_mem_pattern = device != "cpu"
        if packed:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if trace is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(trace)
        if device != "cpu":
            # CUDA and cuDNN come as separate wheels, outside the loader's search path.
            ort.preload_dlls()
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        provider = _PROVIDERS[device]
        with _engine_errors(f"load the model on {device}"):
            self._session = ort.InferenceSession(
                model if isinstance(model, bytes) else str(model),
                sess_options=options,
                providers=[(provider, _provider_options(device, number, tuning))],
            )
        if provider not in self._session.get_providers():
            raise EngineError(
                f"ONNX Runtime fell back from {device} to {', '.join(self._session.get_providers())}; see its log above"
            )
        self._session.disable_fallback()
        self.device, self._number = device, number
        self._cuda_graphs = tuning.cuda_graphs and device != "cpu"
        self._bound: dict[tuple[int, int], _Bound] = {}

    def run(self, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """uint8 images (n,H,W,3) -> logits and probabilities, float32 (n, classes). Raises EngineError."""
        with _engine_errors(f"run the model on {self.device}"):
            on_cpu = self.device == "cpu"
            logits, probabilities = self._session.run(OUTPUTS, {INPUT: images}) if on_cpu else self._run_bound(images)
        return logits, probabilities

    def shrink(self, images: npt.NDArray[np.uint8]) -> None:
        """Run once, and free the memory that the arena holds beyond what this run needs."""
        ort = _onnxruntime()
        options = ort.RunOptions()
        arena = "cpu:0" if self.device == "cpu" else f"gpu:{self._number}"
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", arena)
        with _engine_errors(f"run the model on {self.device}"):
            self._session.run(OUTPUTS, {INPUT: images}, options)
        _return_freed_memory()

    def close(self) -> None:
        """Free the session's memory and its arena. The engine cannot be used afterwards."""
        for bound in self._bound.values():
            bound.close()
        self._bound.clear()
        self._session = None
        _return_freed_memory()

    def _run_bound(self, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], ...]:
        """Run on a GPU through persistent buffers, one set per thread and batch size. Not yet run on a GPU."""
        key = threading.get_ident(), len(images)
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = _Bound(self._session, images.shape, self._number)
        ort = _onnxruntime()
        options = ort.RunOptions()
        if self._cuda_graphs:
            options.add_run_config_entry("gpu_graph_id", str(len(images)))
        return bound.run(images, options)

    def end_trace(self) -> Path:
        """Stop tracing and return the file, which is in Chrome's trace format."""
        return Path(self._session.end_profiling())

    def bind(self, images: npt.NDArray[np.uint8]) -> Callable[[], object]:
        """A function that runs the same images (n,H,W,3) and waits for the end, to time the model alone.

        On a GPU the images are copied to its memory once, and the outputs stay there.
        """
        if self.device == "cpu":
            return partial(self._session.run, OUTPUTS, {INPUT: images})
        ort = _onnxruntime()
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(INPUT, ort.OrtValue.ortvalue_from_numpy(images, "cuda", self._number))
        for name in OUTPUTS:
            binding.bind_output(name, "cuda", self._number)

        def run_bound() -> None:
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run_bound


class _Bound:
    """Buffers for one batch size: on the device, and a page-locked one on the host, from which the GPU copies."""

    def __init__(self, session: Any, shape: tuple[int, ...], number: int) -> None:
        ort = _onnxruntime()
        self._session, self._binding = session, session.io_binding()
        self._input_host = host = np.zeros(shape, dtype=np.uint8)
        _cuda("cudaHostRegister", ctypes.c_void_p(host.ctypes.data), ctypes.c_size_t(host.nbytes), 0)
        self._input = ort.OrtValue.ortvalue_from_numpy(self._input_host, "cuda", number)
        self._binding.bind_ortvalue_input(INPUT, self._input)
        classes = {output.name: output.shape[1] for output in session.get_outputs()}
        self._outputs = []
        for name in OUTPUTS:
            value = ort.OrtValue.ortvalue_from_shape_and_type((shape[0], classes[name]), np.float32, "cuda", number)
            self._binding.bind_ortvalue_output(name, value)
            self._outputs.append(value)

    def run(self, images: npt.NDArray[np.uint8], options: Any) -> tuple[npt.NDArray[np.float32], ...]:
        self._input_host[...] = images
        self._input.update_inplace(self._input_host)
        self._binding.synchronize_inputs()
        self._session.run_with_iobinding(self._binding, options)
        self._binding.synchronize_outputs()
        return tuple(value.numpy() for value in self._outputs)

    def close(self) -> None:
        _cuda("cudaHostUnregister", ctypes.c_void_p(self._input_host.ctypes.data))


def pack(model: Path, folder: Path) -> Path:
    """Write a model into a folder as its CPU kernels need it: the optimised graph, and the weights in their layout.

    Sessions that load the returned file map the same weights, so several take the memory of one; the files may be
    removed once the sessions are open. They are for this machine and this version of ONNX Runtime only. Raises
    EngineError.
    """
    ort = _onnxruntime()
    packed = folder / _PACKED
    options = _session_options(1)
    options.optimized_model_filepath = str(packed)
    for name, value in (
        ("optimized_model_external_initializers_file_name", "packed.bin"),
        ("optimized_model_external_initializers_min_size_in_bytes", "1024"),
        ("save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(f"session.{name}", value)
    with _engine_errors("pack the model's weights"):
        ort.InferenceSession(str(model), sess_options=options, providers=[(_PROVIDERS["cpu"], {})])
    _return_freed_memory()
    return packed


def packed_in(folder: Path) -> Path | None:
    """The file that `pack` wrote into a folder; None if there is none."""
    return packed if (packed := folder / _PACKED).is_file() else None


def _session_options(threads: int) -> Any:
    options = _onnxruntime().SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def _return_freed_memory() -> None:
    """Return freed memory to the system, where the C library would keep it."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _engine_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # ONNX Runtime raises classes of its own that share only Exception
        raise EngineError(f"ONNX Runtime cannot {what}: {error}") from error


def _cuda(function: str, *arguments: Any) -> None:
    status = getattr(ctypes.CDLL("libcudart.so.13"), function)(*arguments)
    if status:
        raise OSError(f"{function} failed with CUDA error {status}")


def _provider_options(device: Device, number: int, tuning: Tuning) -> dict[str, str]:
    if device == "cpu":
        return {"arena_extend_strategy": "kSameAsRequested"}
    if device == "tensorrt":
        options = {"device_id": str(number), "trt_cuda_graph_enable": str(int(tuning.cuda_graphs))}
        if tuning.tensorrt_cache is not None:
            folder = str(tuning.tensorrt_cache)
            options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": folder}
            options |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": folder}
        return options
    options = {
        "device_id": str(number),
        "arena_extend_strategy": "kSameAsRequested",
        # An exhaustive search takes seconds per batch size, and much memory.
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": str(int(tuning.tf32)),
        "enable_cuda_graph": str(int(tuning.cuda_graphs)),
    }
    if tuning.gpu_memory_bytes:
        options["gpu_mem_limit"] = str(tuning.gpu_memory_bytes)
    return options


def _onnxruntime() -> Any:
    """Import ONNX Runtime after the check, so that its absence is a clear error, and with its telemetry off.

    The published wheels report usage to their maker unless this variable is set.
    """
    require_one_engine()
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime  # noqa: PLC0415

    return onnxruntime


def _installed(distribution: str) -> bool:
    return any(True for _ in importlib.metadata.distributions(name=distribution))
