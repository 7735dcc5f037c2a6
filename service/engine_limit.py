"""The engine limit: what decoding and the engine reach together without HTTP.

Decode threads keep a bounded queue full, and one thread takes full batches from it: the path of an image through the
service, without requests. Served throughput is quoted as a fraction of this.
"""

import io
import itertools
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from queue import Empty, Queue

import numpy as np
import numpy.typing as npt
from PIL import Image

from service.bundle import Bundle, read_bundle, versions
from service.engine import Engine, require_one_engine, resolve_device
from service.engine_memory import EngineMemory, measure_memory
from service.engine_timer import time_runs
from service.errors import BundleError, ImageError, StartupError
from service.host import available_cores
from service.images import decode
from service.scheduling.cost import candidate_sizes
from service.settings import Settings

Pixels = npt.NDArray[np.uint8]

_MIN_TRIAL_SECONDS, _MAX_TRIAL_SECONDS = 0.1, 1.0
_WARM_UP_BATCHES = 2
_STALLED_SECONDS = 120


@dataclass(frozen=True, kw_only=True)
class EngineLimit:
    """What one process reached."""

    model: str
    version: int
    device: str
    intra_op_threads: int
    """One or all, whichever was faster, unless the settings give a number."""
    decode_threads: int
    allow_spinning: bool
    images: int
    """Number of different images, which were decoded in turn."""
    median_image_bytes: int
    seconds: float
    images_per_second: float
    """The limit: decoding and engine together, in batches of `batch_size`."""
    batch_size: int
    """The fastest one."""
    images_per_second_by_batch_size: dict[int, float]
    """Decoding and engine together, in short trials."""
    decode_images_per_second: float
    """Decoding alone."""
    engine_images_per_second_by_batch_size: dict[int, float]
    """The engine alone, on decoded images."""
    baseline_pss_bytes: int | None
    """Memory of a process with ONNX Runtime and the model alone, after one run of the largest batch. Null where the
    system does not report it, and on a GPU."""
    baseline_pss_one_image_bytes: int | None
    """The same after a run of one image only."""
    versions: dict[str, str]

    def text(self) -> str:
        """For the terminal: one line per figure."""
        pairs = ", ".join(f"{size}: {rate:.1f}" for size, rate in self.images_per_second_by_batch_size.items())
        alone = ", ".join(f"{size}: {rate:.1f}" for size, rate in self.engine_images_per_second_by_batch_size.items())
        memory = "not known on this system or device"
        if self.baseline_pss_bytes is not None and self.baseline_pss_one_image_bytes is not None:
            memory = (
                f"{self.baseline_pss_bytes / 1e6:.1f} MB PSS after a batch of "
                f"{max(self.images_per_second_by_batch_size)}, "
                f"{self.baseline_pss_one_image_bytes / 1e6:.1f} MB after one image"
            )
        return "\n".join(
            (
                f"engine limit   {self.images_per_second:.1f} images/s: {self.model}, version {self.version}, in "
                f"batches of {self.batch_size}, for {self.seconds:g} s",
                f"by batch size  {pairs}",
                f"engine alone   {alone}",
                f"decode alone   {self.decode_images_per_second:.1f} ({self.images} images, median "
                f"{self.median_image_bytes / 1e3:.1f} kB)",
                f"threads        engine {self.intra_op_threads}, {'' if self.allow_spinning else 'not '}spinning; "
                f"decode {self.decode_threads}; device {self.device}",
                f"memory         {memory}: ONNX Runtime and the model alone",
            )
        )


def read_images(data: Path | None) -> list[bytes]:
    """The image files in a folder, by name; without one, a generated JPEG of about 100 kB. Raises StartupError.

    Hidden files, `labels.csv` and folders are left out.
    """
    if data is None:
        return [generated_jpeg()]
    try:
        files = sorted(file for file in data.iterdir() if file.is_file() and not file.name.startswith("."))
        images = [file.read_bytes() for file in files if file.name != "labels.csv"]
    except OSError as error:
        raise StartupError(f"--data {data}: cannot be read ({error.strerror})") from error
    if not images:
        raise StartupError(f"--data {data}: there is no image in it")
    return images


def measure_engine_limit(settings: Settings, name: str, images: list[bytes], *, seconds: float) -> EngineLimit:
    """Try batch sizes 1, 2, 4, … up to the largest of the settings and the model, then measure the best for `seconds`.

    Raises StartupError if the model cannot be loaded, or an image not be decoded.
    """
    device, number = resolve_device(settings.device)
    bundle = _newest(settings.repository, name)
    cores = settings.threads or available_cores()
    decode_threads = settings.decode_threads or cores
    # The service chooses between one thread and all as well; here both are measured at each batch size.
    thread_counts = (
        {settings.intra_op_threads} if settings.intra_op_threads else {cores, 1 if device == "cpu" else cores}
    )
    sizes = candidate_sizes(min(settings.max_batch, bundle.manifest.max_batch or settings.max_batch))
    # Before this process loads the model: see measure_memory.
    memory = _memory(bundle, threads=max(thread_counts), batch=sizes[-1]) if device == "cpu" else None
    decode_one = partial(decode, preprocessing=bundle.manifest.preprocessing, max_pixels=settings.max_pixels)
    try:
        decoded = [decode_one(image) for image in images][: sizes[-1]]
    except ImageError as error:
        raise StartupError(f"not all of the images can be decoded: {error}") from error
    trial_seconds = min(_MAX_TRIAL_SECONDS, max(_MIN_TRIAL_SECONDS, seconds / 10))
    decode_only = _decode_rate(decode_one, images, threads=decode_threads, seconds=trial_seconds)
    trials: list[_Trial] = []
    for threads in sorted(thread_counts):
        engine = Engine(bundle.model_path, device=device, number=number, threads=threads, tuning=settings.tuning())
        pipeline = partial(_pipeline_rate, engine, decode_one, images, decode_threads=decode_threads)
        engine_only = {size: _engine_rate(engine, decoded, batch=size, seconds=trial_seconds) for size in sizes}
        # Forwards and backwards: interference of a moment does not hit one size alone.
        forwards = {size: pipeline(batch=size, seconds=trial_seconds) for size in sizes}
        backwards = {size: pipeline(batch=size, seconds=trial_seconds) for size in reversed(sizes)}
        by_size = {size: (forwards[size] + backwards[size]) / 2 for size in sizes}
        trials.append(_Trial(threads=threads, pipeline=pipeline, engine_only=engine_only, by_size=by_size))
    best = max(trials, key=lambda trial: max(trial.by_size.values()))
    batch = max(best.by_size, key=lambda size: best.by_size[size])
    return EngineLimit(
        model=name,
        version=bundle.version,
        device=device,
        intra_op_threads=best.threads,
        decode_threads=decode_threads,
        allow_spinning=settings.allow_spinning,
        images=len(images),
        median_image_bytes=int(np.median([len(image) for image in images])),
        seconds=seconds,
        images_per_second=best.pipeline(batch=batch, seconds=seconds),
        batch_size=batch,
        images_per_second_by_batch_size=best.by_size,
        decode_images_per_second=decode_only,
        engine_images_per_second_by_batch_size=best.engine_only,
        baseline_pss_bytes=memory.largest_batch_bytes if memory else None,
        baseline_pss_one_image_bytes=memory.one_image_bytes if memory else None,
        versions={package: version(package) for package in (require_one_engine(), "pillow", "numpy")},
    )


@dataclass(frozen=True, kw_only=True)
class _Trial:
    threads: int
    pipeline: Callable[..., float]
    engine_only: dict[int, float]
    by_size: dict[int, float]


def generated_jpeg() -> bytes:
    """Blurred noise with grain, 640 × 480, about 100 kB: costs about what a photo costs to decode."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, size=(12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), np.int16)
    pixels = (smooth + generator.normal(0, 9, size=smooth.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def _newest(repository: Path, name: str) -> Bundle:
    published = versions(repository, name)
    if not published:
        raise StartupError(f"model {name!r}: no version of it in {repository}")
    try:
        return read_bundle(repository / name / str(published[-1]))
    except BundleError as error:
        raise StartupError(f"model {name!r}: {error}") from error


def _memory(bundle: Bundle, *, threads: int, batch: int) -> EngineMemory | None:
    side = bundle.manifest.input.shape[1]
    try:
        return measure_memory(bundle.model_path, side=side, threads=threads, batch=batch)
    except subprocess.SubprocessError as error:
        log = getattr(error, "stderr", None) or ""
        raise StartupError(
            f"the process with ONNX Runtime and the model alone failed: {error}\n{log[-1000:]}"
        ) from error


def _pipeline_rate(
    engine: Engine,
    decode_one: Callable[[bytes], Pixels],
    images: list[bytes],
    *,
    decode_threads: int,
    batch: int,
    seconds: float,
) -> float:
    """Images per second through decode threads, a bounded queue and the engine."""
    ready: Queue[Pixels] = Queue(maxsize=2 * max(batch, decode_threads))
    supply, lock, stop = itertools.cycle(images), threading.Lock(), threading.Event()

    def feed() -> None:
        while not stop.is_set():
            with lock:
                image = next(supply)
            ready.put(decode_one(image))

    def run_batch() -> None:
        engine.run(np.stack([ready.get(timeout=_STALLED_SECONDS) for _ in range(batch)]))

    with ThreadPoolExecutor(decode_threads, thread_name_prefix="decode") as pool:
        feeders = [pool.submit(feed) for _ in range(decode_threads)]
        try:
            return _rate(run_batch, images=batch, seconds=seconds, warm_up_runs=_WARM_UP_BATCHES)
        finally:
            stop.set()
            while not all(feeder.done() for feeder in feeders):
                # A feeder may be waiting for room in the queue.
                try:
                    ready.get(timeout=0.01)
                except Empty:
                    continue


def _decode_rate(decode_one: Callable[[bytes], Pixels], images: list[bytes], *, threads: int, seconds: float) -> float:
    def work(offset: int) -> float:
        supply = itertools.cycle(images[offset:] + images[:offset])
        return _rate(lambda: decode_one(next(supply)), images=1, seconds=seconds, warm_up_runs=0)

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, [number * len(images) // threads for number in range(threads)]))


def _engine_rate(engine: Engine, decoded: list[Pixels], *, batch: int, seconds: float) -> float:
    pixels = np.stack(list(itertools.islice(itertools.cycle(decoded), batch)))
    return _rate(lambda: engine.run(pixels), images=batch, seconds=seconds, warm_up_runs=1)


def _rate(run: Callable[[], object], *, images: int, seconds: float, warm_up_runs: int) -> float:
    """Images per second of runs that process `images` each."""
    runs = time_runs(run, seconds=seconds, warm_up_runs=warm_up_runs)
    return images * len(runs) / sum(runs)
