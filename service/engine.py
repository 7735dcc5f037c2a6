"""The engine: one ONNX Runtime session for one model on one device. Fails loud, never falls back silently."""

import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from service.errors import EngineError

Device = Literal["cpu", "cuda", "tensorrt"]

INPUT = "image"
OUTPUTS = ("logits", "probabilities")
"""The names that every graph has; export writes them."""

_INSTALL = "install exactly one engine: pip install 'stridevit[cpu]' or pip install 'stridevit[gpu]'"


def require_one_engine() -> str:
    """The one ONNX Runtime distribution that is installed. Raises EngineError for none or two.

    `onnxruntime` and `onnxruntime-gpu` unpack into the same folder, so with both the last one installed wins by chance.
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


def resolve_device(asked: str) -> tuple[Device, int]:
    """`auto`, `cpu`, `cuda`, `cuda:N` or `tensorrt` as (device, GPU number). Raises EngineError if it cannot be had."""
    ort = _onnxruntime()
    kind, _, number = asked.partition(":")
    if kind not in ("auto", "cpu", "cuda", "tensorrt") or (number and not number.isdecimal()):
        raise EngineError(f"unknown device {asked!r}: use auto, cpu, cuda, cuda:N or tensorrt")
    available = ort.get_available_providers()
    if kind == "auto":
        has_gpu = "CUDAExecutionProvider" in available and Path("/proc/driver/nvidia/version").exists()
        kind = "cuda" if has_gpu else "cpu"
    if kind == "cpu":
        return "cpu", 0
    device: Device = "cuda" if kind == "cuda" else "tensorrt"
    if _PROVIDERS[device] not in available:
        raise EngineError(
            f"device {asked!r} was asked for, but this ONNX Runtime has only {', '.join(available)}: "
            "pip install 'stridevit[gpu]', or use --device cpu"
        )
    return device, int(number or 0)


_PROVIDERS: dict[Device, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


class Engine:
    """Runs one ONNX file. `run` may be called from one thread at a time."""

    def __init__(
        self,
        model: Path | bytes,
        *,
        device: Device = "cpu",
        number: int = 0,
        threads: int = 1,
        trace: Path | None = None,
    ) -> None:
        """Load a model. Raises EngineError if the device does not take every node of it.

        `trace` begins the name of a file with the time of every node, complete after `end_trace`.
        """
        ort = _onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # With it, the second run of a batch size reserves one more block, as large as all that the first one needed.
        options.enable_mem_pattern = device != "cpu"
        if trace is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(trace)
        provider_options: dict[str, Any] = {}
        if device != "cpu":
            # CUDA and cuDNN come as wheels of their own, where the loader does not look by itself.
            ort.preload_dlls()
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            provider_options["device_id"] = str(number)
        provider = _PROVIDERS[device]
        try:
            self._session = ort.InferenceSession(
                model if isinstance(model, bytes) else str(model),
                sess_options=options,
                providers=[(provider, provider_options)],
            )
        except Exception as error:  # ONNX Runtime raises classes of its own that share only Exception.
            raise EngineError(f"ONNX Runtime cannot load the model on {device}: {error}") from error
        if provider not in self._session.get_providers():
            raise EngineError(
                f"ONNX Runtime left {device} for {', '.join(self._session.get_providers())}; see its log above"
            )
        self._session.disable_fallback()
        self.device, self._number = device, number

    def run(self, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """uint8 images (n,H,W,3) -> logits and probabilities, float32 (n, classes). Raises EngineError."""
        try:
            logits, probabilities = self._session.run(OUTPUTS, {INPUT: images})
        except Exception as error:  # as above
            raise EngineError(f"ONNX Runtime cannot run the model on {self.device}: {error}") from error
        return logits, probabilities

    def end_trace(self) -> Path:
        """Stop tracing and return the file, in Chrome's trace format."""
        return Path(self._session.end_profiling())

    def bind(self, images: npt.NDArray[np.uint8]) -> Callable[[], None]:
        """A function that runs the same images (n,H,W,3) again and waits for the end, to time the model alone.

        On a GPU they are copied to its memory once, and the outputs stay there.
        """
        if self.device == "cpu":

            def run() -> None:
                self._session.run(OUTPUTS, {INPUT: images})

            return run
        ort = _onnxruntime()
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(INPUT, ort.OrtValue.ortvalue_from_numpy(images, "cuda", self._number))
        for name in OUTPUTS:
            binding.bind_output(name, "cuda", self._number)

        def run_bound() -> None:
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run_bound


def _onnxruntime() -> Any:
    """Import ONNX Runtime after the check, so that its absence is a clear error, and with its telemetry off.

    The published wheels report usage to their maker on every platform unless this variable says no.
    """
    require_one_engine()
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime  # noqa: PLC0415

    return onnxruntime


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
