"""The engine limit: what decoding and the engine reach together with no HTTP, and the least memory that a model needs.

Decode threads keep a bounded queue full, and one thread takes full batches from it: the way of an image through the
service, without requests. Served throughput is quoted as a fraction of this.
"""

import io
import itertools
import json
import subprocess
import sys
import threading
import time
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
from service.engine import INPUT, Engine, require_one_engine, resolve_device
from service.errors import BundleError, ImageError, StartupError
from service.host import available_cores
from service.images import decode
from service.scheduling.cost import candidate_sizes
from service.settings import Settings

Pixels = npt.NDArray[np.uint8]

_SHORTEST_TRIAL, _LONGEST_TRIAL = 0.1, 1.0
_WARM_UP_BATCHES = 2
_STALLED_SECONDS = 120
_BASELINE_SECONDS = 300

# No package of ours: what ONNX Runtime and this model need, with the session options of service/engine.py.
_BASELINE = """
import json, os, sys
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy, onnxruntime

def pss():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024

model, name, shape, threads, batch = json.loads(sys.argv[1])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
options.log_severity_level, options.enable_mem_pattern = 3, False
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
session.run(None, {name: numpy.zeros((1, *shape), numpy.uint8)})
one = pss()
session.run(None, {name: numpy.zeros((batch, *shape), numpy.uint8)})
print(json.dumps([one, pss()]))
"""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What one process reached; rates in images a second."""

    model: str
    version: int
    device: str
    intra_op_threads: int
    """One or all, whichever was faster, unless the settings say how many."""
    decode_threads: int
    allow_spinning: bool
    images: int
    """How many different ones were decoded, round and round."""
    image_bytes: int
    """Median of their sizes."""
    seconds: float
    images_per_second: float
    """The limit: decoding and engine together, in batches of `batch`."""
    batch: int
    """The fastest of `by_batch`."""
    by_batch: dict[int, float]
    """The same in short trials of each batch size."""
    decode_only: float
    engine_only: dict[int, float]
    """By batch size, on images decoded before."""
    baseline_bytes: int | None
    """PSS of a process with ONNX Runtime and the model alone, after one run of the largest batch. Null where the system
    does not tell, and off the CPU."""
    baseline_batch1_bytes: int | None
    """The same after a run of one image only."""
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class _Trial:
    threads: int
    pipeline: Callable[..., float]
    engine_only: dict[int, float]
    by_batch: dict[int, float]


def run(settings: Settings, name: str, images_folder: Path | None, seconds: float) -> Limit:
    """Measure the newest version of `name` on the files of a folder; without one, on a JPEG of about 100 kB.

    Raises StartupError, in words for the user.
    """
    if images_folder is None:
        return measure_limit(settings, name, [drawn_jpeg()], seconds=seconds)
    try:
        files = sorted(file for file in images_folder.iterdir() if file.is_file())
        images = [file.read_bytes() for file in files]
    except OSError as error:
        raise StartupError(f"--images {images_folder}: cannot be read ({error.strerror})") from error
    if not images:
        raise StartupError(f"--images {images_folder}: there is no file in it")
    return measure_limit(settings, name, images, seconds=seconds)


def measure_limit(settings: Settings, name: str, images: list[bytes], *, seconds: float) -> Limit:
    """Try batch sizes 1, 2, 4, … up to the settings' and the model's largest, then measure the best for `seconds`.

    Raises StartupError if the model cannot be loaded, or an image not be decoded.
    """
    device, number = resolve_device(settings.device)
    bundle = _newest(settings.repository, name)
    cores = settings.threads or available_cores()
    decoders = settings.decode_threads or cores
    # As the service would, and more thoroughly: one thread may be worth as much as all of them.
    options = (
        [settings.intra_op_threads] if settings.intra_op_threads else sorted({1, cores} if device == "cpu" else {cores})
    )
    sizes = candidate_sizes(min(settings.max_batch, bundle.manifest.max_batch or settings.max_batch))
    # First: a process shares with this one what both have loaded, and PSS then counts only half of it.
    one, largest = _baseline(bundle, threads=options[-1], batch=sizes[-1]) if device == "cpu" else (None, None)
    decode_one = partial(decode, preprocessing=bundle.manifest.preprocessing, max_pixels=settings.max_pixels)
    try:
        decoded = [decode_one(image) for image in images][: sizes[-1]]
    except ImageError as error:
        raise StartupError(f"not all of the images can be decoded: {error}") from error
    trial = min(_LONGEST_TRIAL, max(_SHORTEST_TRIAL, seconds / 10))
    decode_only = _decode_rate(decode_one, images, threads=decoders, seconds=trial)
    trials: list[_Trial] = []
    for threads in options:
        engine = Engine(bundle.model_path, device=device, number=number, threads=threads, tuning=settings.tuning())
        pipeline = partial(_pipeline, engine, decode_one, images, decoders=decoders)
        engine_only = {size: _engine_rate(engine, decoded, batch=size, seconds=trial) for size in sizes}
        # There and back again: what slows the machine for a moment does not hit one size alone.
        there = {size: pipeline(batch=size, seconds=trial) for size in sizes}
        back = {size: pipeline(batch=size, seconds=trial) for size in sizes[::-1]}
        by_batch = {size: (there[size] + back[size]) / 2 for size in sizes}
        trials.append(_Trial(threads=threads, pipeline=pipeline, engine_only=engine_only, by_batch=by_batch))
    best = max(trials, key=lambda trial: max(trial.by_batch.values()))
    batch = max(best.by_batch, key=lambda size: best.by_batch[size])
    return Limit(
        model=name,
        version=bundle.version,
        device=device,
        intra_op_threads=best.threads,
        decode_threads=decoders,
        allow_spinning=settings.allow_spinning,
        images=len(images),
        image_bytes=int(np.median([len(image) for image in images])),
        seconds=seconds,
        images_per_second=best.pipeline(batch=batch, seconds=seconds),
        batch=batch,
        by_batch=best.by_batch,
        decode_only=decode_only,
        engine_only=best.engine_only,
        baseline_bytes=largest,
        baseline_batch1_bytes=one,
        versions={package: version(package) for package in (require_one_engine(), "pillow", "numpy")},
    )


def render(limit: Limit) -> str:
    """For the terminal: a line a figure."""
    pairs = ", ".join(f"{size}: {rate:.1f}" for size, rate in limit.by_batch.items())
    alone = ", ".join(f"{size}: {rate:.1f}" for size, rate in limit.engine_only.items())
    memory = "not known on this system or device"
    if limit.baseline_bytes is not None and limit.baseline_batch1_bytes is not None:
        memory = (
            f"{limit.baseline_bytes / 1e6:.1f} MB PSS after a batch of {max(limit.by_batch)}, "
            f"{limit.baseline_batch1_bytes / 1e6:.1f} MB after one image"
        )
    return "\n".join(
        (
            f"engine limit   {limit.images_per_second:.1f} images/s: {limit.model}, version {limit.version}, in "
            f"batches of {limit.batch}, for {limit.seconds:g} s",
            f"by batch size  {pairs}",
            f"engine alone   {alone}",
            f"decode alone   {limit.decode_only:.1f} ({limit.images} images, median {limit.image_bytes / 1e3:.1f} kB)",
            f"threads        engine {limit.intra_op_threads}, {'' if limit.allow_spinning else 'not '}allow_spinning; "
            f"decode {limit.decode_threads}; device {limit.device}",
            f"memory         {memory}: ONNX Runtime and the model alone",
        )
    )


def drawn_jpeg() -> bytes:
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


def _pipeline(
    engine: Engine,
    decode_one: Callable[[bytes], Pixels],
    images: list[bytes],
    *,
    decoders: int,
    batch: int,
    seconds: float,
) -> float:
    """Images a second through decode threads, a bounded queue and the engine, from one end of a batch to another."""
    ready: Queue[Pixels] = Queue(maxsize=2 * max(batch, decoders))
    supply, lock, stop = itertools.cycle(images), threading.Lock(), threading.Event()

    def feed() -> None:
        while not stop.is_set():
            with lock:
                image = next(supply)
            ready.put(decode_one(image))

    def run_batch() -> None:
        engine.run(np.stack([ready.get(timeout=_STALLED_SECONDS) for _ in range(batch)]))

    with ThreadPoolExecutor(decoders, thread_name_prefix="decode") as pool:
        feeders = [pool.submit(feed) for _ in range(decoders)]
        try:
            for _ in range(_WARM_UP_BATCHES):
                run_batch()
            started, done = time.perf_counter(), 0
            while (elapsed := time.perf_counter() - started) < seconds or not done:
                run_batch()
                done += batch
        finally:
            stop.set()
            while not all(feeder.done() for feeder in feeders):
                # A feeder may wait for room in the queue.
                try:
                    ready.get(timeout=0.01)
                except Empty:
                    continue
    return done / elapsed


def _decode_rate(decode_one: Callable[[bytes], Pixels], images: list[bytes], *, threads: int, seconds: float) -> float:
    def work(offset: int) -> float:
        started, done = time.perf_counter(), 0
        for image in itertools.cycle(images[offset:] + images[:offset]):
            if (elapsed := time.perf_counter() - started) >= seconds and done:
                break
            decode_one(image)
            done += 1
        return done / elapsed

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, [number * len(images) // threads for number in range(threads)]))


def _engine_rate(engine: Engine, decoded: list[Pixels], *, batch: int, seconds: float) -> float:
    pixels = np.stack(list(itertools.islice(itertools.cycle(decoded), batch)))
    engine.run(pixels)
    started, done = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds or not done:
        engine.run(pixels)
        done += batch
    return done / elapsed


def _baseline(bundle: Bundle, *, threads: int, batch: int) -> tuple[int | None, int | None]:
    """PSS of a fresh process after a run of one image, and of `batch`."""
    if not Path("/proc/self/smaps_rollup").exists():
        return None, None
    _, *shape = bundle.manifest.input.shape
    asked = json.dumps([str(bundle.model_path), INPUT, shape, threads, batch])
    try:
        ended = subprocess.run(  # noqa: S603 (our own command)
            [sys.executable, "-c", _BASELINE, asked],
            capture_output=True,
            text=True,
            timeout=_BASELINE_SECONDS,
            check=True,
        )
    except subprocess.SubprocessError as error:
        said = getattr(error, "stderr", None) or ""
        raise StartupError(
            f"the process with ONNX Runtime and the model alone failed: {error}\n{said[-1000:]}"
        ) from error
    one, largest = json.loads(ended.stdout)
    return one, largest
