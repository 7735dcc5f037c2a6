"""The cost model: how long a batch of a model will take, measured at warm-up and kept current by live timings.

    predicted seconds = baseline of (model, batch size)  ×  slowdown of the device

Warm-up measures the baselines on an idle device. Under traffic, decoding and other processes take their share of the
cores. That slows all models alike, so one fast-moving factor of the device follows it, and models that have not run for
a while are predicted well too. A slower factor for each batch size follows what the first does not explain. Both decay.

Decoding is predicted in the same way, from the work of each image in pixels: see `service.image_work`.
"""

import math
import time
from collections.abc import Callable, Mapping

_FAST_WEIGHT, _SLOW_WEIGHT = 0.2, 0.02
"""Weights of a new timing: in the device's slowdown, and in the drift of its own batch size."""

_GOOD_ENOUGH = 1.1
"""A larger batch pays only if the smaller one takes over this factor longer per image; less is noise."""

_HALF_LIFE_SECONDS, _DRIFT_HALF_LIFE_SECONDS = 5.0, 60.0

_SECONDS_PER_PIXEL = 1e-8
"""Decoding a pixel of a JPEG, where it was not measured."""

_OUTLIER = 4.0
"""A decoding that took longer than predicted counts as this many times longer at most; likewise if it was faster."""

LARGE_WORK = 2_000_000
"""Work of decoding, in pixels, above which an image goes to a lane of its own, so that small ones need not wait for it.

At 10 ms of CPU per megapixel smaller images take at most 20 ms; docs/service.md has times of larger ones.
"""

_HANDOVER_SECONDS = 0.0003
"""Cost of a batch beside the engine: two changes of thread. Measured; it matters to the smallest models only."""


class Load:
    """How busy the machine is, according to the timings of all its models and decoders.

    Observations decay with time. Otherwise one stall could reject every request with a tight deadline for ever, because
    rejected requests are not timed.
    """

    def __init__(
        self,
        *,
        decode_threads: int = 1,
        seconds_per_pixel: float = _SECONDS_PER_PIXEL,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`seconds_per_pixel`: the time of decoding on an idle machine, for each pixel of work."""
        self.decode_threads = decode_threads
        self.large_threads = max(1, decode_threads // 2)
        """Threads of the lane for images of more than LARGE_WORK."""
        self.clock = clock
        self.slowdown = Decaying(1.0, clock)
        """Recent duration of batches divided by their baselines; its value is 1 on an idle device."""
        self._seconds_per_pixel = seconds_per_pixel
        self._decode_slowdown = Decaying(1.0, clock)
        self._decode_drift = Decaying(1.0, clock, _DRIFT_HALF_LIFE_SECONDS)
        self._work = Decaying(0.0, clock)

    @property
    def decode_seconds(self) -> float:
        """Predicted duration of decoding an image like the recent small ones; 0 before the first."""
        return self._work.value * self.seconds_per_pixel

    @property
    def seconds_per_pixel(self) -> float:
        """Predicted duration of decoding, for each pixel of work."""
        return self._seconds_per_pixel * self._decode_slowdown.value * self._decode_drift.value

    def decoded(self, seconds: float, work: int) -> None:
        """Record the decoding of one image."""
        # One image that is far slower than its header says, by chance or by design, must not shut out the others.
        ratio = min(max(seconds / (work * self.seconds_per_pixel), 1 / _OUTLIER), _OUTLIER)
        self._decode_slowdown.value *= ratio**_FAST_WEIGHT
        self._decode_drift.value *= ratio**_SLOW_WEIGHT
        if work <= LARGE_WORK:
            # Large images say nothing about how long the next small one will take.
            self._work.mix(work, _FAST_WEIGHT)


class Decaying:
    """A value that returns to its resting value, by half every `half_life` seconds since it was last set."""

    def __init__(self, rest: float, clock: Callable[[], float], half_life: float = _HALF_LIFE_SECONDS) -> None:
        self._rest = self._last = rest
        self._clock, self._half_life = clock, half_life
        self._set_at = -math.inf

    @property
    def value(self) -> float:
        """The value by now."""
        return self._rest + (self._last - self._rest) * self._freshness()

    @value.setter
    def value(self, value: float) -> None:
        self._last, self._set_at = value, self._clock()

    def mix(self, new: float, weight: float) -> None:
        """Move towards `new` by `weight`, and by more the longer nothing was observed."""
        known, weight = self.value, 1 - (1 - weight) * self._freshness()
        self.value = known + (new - known) * weight

    def _freshness(self) -> float:
        return float(0.5 ** ((self._clock() - self._set_at) / self._half_life))


class Cost:
    """What batches of one model cost. `sizes` are the warmed-up batch sizes: no other is ever run."""

    def __init__(self, baseline: Mapping[int, float], load: Load) -> None:
        """`baseline`: seconds of a batch on an idle device, by its size."""
        if not baseline or min(baseline) < 1:
            raise ValueError("a cost model needs the time of at least one batch size")
        self._baseline = dict(sorted(baseline.items()))
        self._drift = {size: Decaying(1.0, load.clock, _DRIFT_HALF_LIFE_SECONDS) for size in self._baseline}
        """What the load does not explain, by size."""
        self._load = load
        self.sizes = tuple(self._baseline)

    @property
    def limit(self) -> int:
        """Largest number of images in a batch."""
        return self.sizes[-1]

    @property
    def least(self) -> float:
        """Predicted seconds of the smallest batch."""
        return self.seconds(self.sizes[0])

    def padded(self, images: int) -> int:
        """The warmed-up size that holds `images`. Raises ValueError above the limit."""
        for size in self.sizes:
            if size >= images:
                return size
        raise ValueError(f"{images} images exceed the largest batch, {self.limit}")

    def take(self, waiting: int) -> int:
        """How many of the waiting images the next batch should hold: the number with the best throughput.

        Five images padded to eight may take longer than four of them now and the fifth afterwards.
        """
        if waiting >= self.limit:
            return self.limit
        up = self.padded(waiting)
        down = max((size for size in self.sizes if size <= waiting), default=0)
        if not down or up == waiting:
            return waiting
        return waiting if waiting / self.seconds(up) >= down / self.seconds(down) else down

    def seconds(self, size: int) -> float:
        """Predicted duration of one batch of a warmed-up size."""
        return self._baseline[size] * self._drift[size].value * self._load.slowdown.value

    def per_image(self) -> float:
        """Predicted seconds per image in full batches."""
        return self.seconds(self.limit) / self.limit

    def total(self, images: int) -> float:
        """Predicted seconds of the device for `images`, in batches as they would be formed."""
        full, rest = divmod(images, self.limit)
        seconds = full * self.seconds(self.limit)
        while rest:
            taken = self.take(rest)
            seconds += self.seconds(self.padded(taken))
            rest -= taken
        return seconds

    def observe(self, size: int, seconds: float) -> None:
        """Record how long a batch of a warmed-up size took."""
        ratio = seconds / self.seconds(size)
        self._load.slowdown.value *= ratio**_FAST_WEIGHT
        self._drift[size].value *= ratio**_SLOW_WEIGHT

    def as_dict(self) -> dict[int, float]:
        """Predicted seconds of a batch at present, by its size."""
        return {size: self.seconds(size) for size in self.sizes}


def worthwhile_sizes(seconds: Mapping[int, float]) -> tuple[int, ...]:
    """The batch sizes to use, of those timed: up to the smallest that is about as fast per image as the fastest.

    On a CPU a large batch of a large model is no faster per image than a single one, and only costs latency and memory.
    """
    per_image = {size: (taken + _HANDOVER_SECONDS) / size for size, taken in sorted(seconds.items())}
    best = min(per_image.values())
    limit = next(size for size, taken in per_image.items() if taken <= best * _GOOD_ENOUGH)
    return tuple(size for size in per_image if size <= limit)


def candidate_sizes(max_batch: int) -> tuple[int, ...]:
    """The batch sizes that warm-up tries: powers of two, and `max_batch` itself."""
    powers = [1 << power for power in range(max_batch.bit_length()) if 1 << power < max_batch]
    return (*powers, max_batch)
