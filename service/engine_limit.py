"""The engine limit: what decoding and the engine reach together without HTTP.

Decode threads keep a bounded queue full, and the lanes of the engine take full batches from it: the path of an image
through the service, without requests. All layouts of lanes and threads that the service would try are tried. Served
throughput is quoted as a fraction of this limit.
"""

import io
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from queue import Empty, Queue

import numpy as np
import numpy.typing as npt
from PIL import Image

from service.bundle import read_bundle, versions
from service.engine import Engine, require_one_engine
from service.engine_memory import measure_memory
from service.engine_timer import time_runs
from service.errors import ImageError, StartupError
from service.host import available_cores
from service.images import ImageRules
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
    engine_lanes: int
    """Batches at once, each computed by `intra_op_threads` threads: the fastest layout that the settings allow."""
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
        return "\n".join(f"{name.replace('_', ' '):40}{_shown(value)}" for name, value in asdict(self).items())


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(inner)}" for key, inner in value.items())
    return f"{value:.1f}" if isinstance(value, float) else "unknown" if value is None else str(value)


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
        raise StartupError(f"--data {data}: no image found there")
    return images


def measure_engine_limit(settings: Settings, name: str, images: list[bytes], *, seconds: float) -> EngineLimit:
    """Try batch sizes 1, 2, 4, … up to the largest that settings and model allow, then measure the best for `seconds`.

    Raises StartupError, BundleError or EngineError if the model cannot be loaded, or an image cannot be decoded.
    """
    options = settings.engine_options()
    device = options.device
    published = versions(settings.folder, name)
    if not published:
        raise StartupError(f"model {name!r}: no version of it in {settings.folder}")
    bundle = read_bundle(settings.folder / name / str(published[-1]))
    decode_threads = settings.decode_threads or settings.threads or available_cores()
    layouts = options.candidates()
    sizes = candidate_sizes(min(settings.max_batch, bundle.manifest.max_batch or settings.max_batch))
    # Before this process loads ONNX Runtime: see measure_memory.
    one, largest = measure_memory(bundle, threads=max(layouts)[0], batch=sizes[-1]) if device == "cpu" else (None, None)
    rules = ImageRules(
        max_pixels=settings.max_pixels, formats=settings.image_formats, exact=settings.exact_preprocessing
    )

    def decode_one(image: bytes) -> Pixels:
        return rules.open(image, bundle.manifest.preprocessing).render()

    try:
        decoded = [decode_one(image) for image in images][: sizes[-1]]
    except ImageError as error:
        raise StartupError(f"not all of the images can be decoded: {error}") from error
    trial_seconds = min(_MAX_TRIAL_SECONDS, max(_MIN_TRIAL_SECONDS, seconds / 10))
    decode_only = _decode_rate(decode_one, images, threads=decode_threads, seconds=trial_seconds)
    trials = []
    for threads, lanes in layouts:
        engine = options.open(bundle.model_path, threads, packed=False)
        pipeline = partial(_pipeline_rate, engine, decode_one, images, decode_threads=decode_threads, lanes=lanes)
        alone = {size: _engine_rate(engine, decoded, batch=size, lanes=lanes, seconds=trial_seconds) for size in sizes}
        # Forwards and backwards, so that a momentary disturbance does not affect one size alone.
        rates = [(size, pipeline(batch=size, seconds=trial_seconds)) for size in (*sizes, *reversed(sizes))]
        together = {size: sum(rate for other, rate in rates if other == size) / 2 for size in sizes}
        trials.append((max(together.values()), threads, lanes, alone, together))
        engine.close()
    _, threads, lanes, alone, together = max(trials, key=lambda trial: trial[0])
    engine = options.open(bundle.model_path, threads, packed=False)
    pipeline = partial(_pipeline_rate, engine, decode_one, images, decode_threads=decode_threads, lanes=lanes)
    batch_size = max(together, key=lambda size: together[size])
    return EngineLimit(
        model=name,
        version=bundle.version,
        device=device,
        intra_op_threads=threads,
        engine_lanes=lanes,
        decode_threads=decode_threads,
        allow_spinning=settings.allow_spinning,
        images=len(images),
        median_image_bytes=int(np.median([len(image) for image in images])),
        seconds=seconds,
        images_per_second=pipeline(batch=batch_size, seconds=seconds),
        batch_size=batch_size,
        images_per_second_by_batch_size=together,
        decode_images_per_second=decode_only,
        engine_images_per_second_by_batch_size=alone,
        baseline_pss_bytes=largest,
        baseline_pss_one_image_bytes=one,
        versions={package: version(package) for package in (require_one_engine(), "pillow", "numpy")},
    )


def generated_jpeg() -> bytes:
    """Blurred noise with grain, 640 × 480, about 100 kB: costs about what a photo costs to decode."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, size=(12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), np.int16)
    pixels = (smooth + generator.normal(0, 9, size=smooth.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def _pipeline_rate(
    engine: Engine,
    decode_one: Callable[[bytes], Pixels],
    images: list[bytes],
    *,
    decode_threads: int,
    lanes: int,
    batch: int,
    seconds: float,
) -> float:
    """Images per second through decode threads, a bounded queue and the engine."""
    ready: Queue[Pixels] = Queue(maxsize=2 * max(lanes * batch, decode_threads))
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
            return _rate(run_batch, images=batch, seconds=seconds, warm_up_runs=_WARM_UP_BATCHES, lanes=lanes)
        finally:
            stop.set()
            while not all(feeder.done() for feeder in feeders):
                # A feeder may be waiting for room in the queue.
                try:
                    ready.get(timeout=0.01)
                except Empty:
                    continue


def _decode_rate(decode_one: Callable[[bytes], Pixels], images: list[bytes], *, threads: int, seconds: float) -> float:
    supply, lock = itertools.cycle(images), threading.Lock()

    def run() -> None:
        with lock:
            image = next(supply)
        decode_one(image)

    return _rate(run, images=1, seconds=seconds, warm_up_runs=0, lanes=threads)


def _engine_rate(engine: Engine, decoded: list[Pixels], *, batch: int, lanes: int, seconds: float) -> float:
    pixels = np.stack(list(itertools.islice(itertools.cycle(decoded), batch)))
    return _rate(lambda: engine.run(pixels), images=batch, seconds=seconds, warm_up_runs=1, lanes=lanes)


def _rate(run: Callable[[], object], *, images: int, seconds: float, warm_up_runs: int, lanes: int) -> float:
    """Images per second of runs that process `images` each, in `lanes` threads at once."""

    def work(_: int) -> float:
        runs = time_runs(run, seconds=seconds, warm_up_runs=warm_up_runs)
        return images * len(runs) / sum(runs)

    with ThreadPoolExecutor(lanes) as pool:
        return sum(pool.map(work, range(lanes)))
