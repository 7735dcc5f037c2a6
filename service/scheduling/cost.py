"""The cost model: how long a batch of a model will take, measured at warm-up and kept current by live timings.

    predicted seconds = baseline of (model, batch size)  ×  slowdown of the device

Warm-up fills the baselines on an idle device. Live, decoding and other processes take their share of the cores; that
strikes all models alike, so one fast-moving factor of the device follows it, and models that have not run for a
while are predicted well too. A slower factor for each size follows what the first does not explain. Both fade.
"""

import math
import time
from collections.abc import Mapping

_FAST, _SLOW = 0.2, 0.02
"""Weights of a new timing: in the device's slowdown, and in the baseline of its own batch size."""

_GOOD_ENOUGH = 1.1
"""A batch size pays if a smaller one takes over this factor longer an image; less than that is noise and latency."""


_HALF_LIFE_SECONDS, _DRIFT_HALF_LIFE_SECONDS = 5.0, 60.0


class Load:
    """How busy the machine is, as seen by the timings of all its models and decoders.

    What was seen fades with time. Else a stall that is long over could have every request with a tight deadline refused
    for ever: what is refused is not timed.
    """

    def __init__(self, *, decode_threads: int = 1) -> None:
        self.decode_threads = decode_threads
        self._slowdown = _Fading(1.0)
        self._decode_seconds = _Fading(0.0)

    @property
    def slowdown(self) -> float:
        """Recent duration of batches over what the baselines say; 1 on an idle device."""
        return self._slowdown.value

    @slowdown.setter
    def slowdown(self, value: float) -> None:
        self._slowdown.value = value

    @property
    def decode_seconds(self) -> float:
        """Recent mean of an image's decoding; 0 before the first."""
        return self._decode_seconds.value

    def decoded(self, seconds: float) -> None:
        """Take note of one image's decoding."""
        self._decode_seconds.mix(seconds, _FAST)


class _Fading:
    """A value that goes back to what it is at rest, by half every `half_life` seconds since it was last set."""

    def __init__(self, rest: float, half_life: float = _HALF_LIFE_SECONDS) -> None:
        self._rest = self._last = rest
        self._half_life = half_life
        self._at = -math.inf

    @property
    def value(self) -> float:
        return self._rest + (self._last - self._rest) * self._freshness()

    @value.setter
    def value(self, value: float) -> None:
        self._last, self._at = value, time.perf_counter()

    def mix(self, new: float, weight: float) -> None:
        """Move towards `new` by `weight`, and by more the longer nothing was seen."""
        known, weight = self.value, 1 - (1 - weight) * self._freshness()
        self.value = known + (new - known) * weight

    def _freshness(self) -> float:
        return float(0.5 ** ((time.perf_counter() - self._at) / self._half_life))


class Cost:
    """What batches of one model cost. `sizes` are those that were warmed up: no other is ever run."""

    def __init__(self, baseline: Mapping[int, float], load: Load) -> None:
        """`baseline`: seconds of a batch, by its size, on an idle device."""
        if not baseline or min(baseline) < 1:
            raise ValueError("a cost model needs the time of at least one batch size")
        self._baseline = dict(sorted(baseline.items()))
        # What the load does not explain, by size. It fades too, else a slow hour would be believed for ever.
        self._drift = {size: _Fading(1.0, _DRIFT_HALF_LIFE_SECONDS) for size in self._baseline}
        self._load = load
        self.sizes = tuple(self._baseline)

    @property
    def limit(self) -> int:
        """Images in a batch, at most."""
        return self.sizes[-1]

    def padded(self, images: int) -> int:
        """The warmed-up size that holds `images`. Raises ValueError above the limit."""
        for size in self.sizes:
            if size >= images:
                return size
        raise ValueError(f"{images} images exceed the largest batch, {self.limit}")

    def take(self, waiting: int) -> int:
        """How many of the waiting images the next batch should hold: those that give most images a second.

        Five images padded to eight may take longer than four of them now and the fifth afterwards.
        """
        if waiting >= self.limit:
            return self.limit
        up = self.padded(waiting)
        down = max((size for size in self.sizes if size <= waiting), default=0)
        if not down:
            return waiting
        return waiting if waiting / self.seconds(up) >= down / self.seconds(down) else down

    def seconds(self, size: int) -> float:
        """Predicted duration of one batch of a warmed-up size."""
        return self._baseline[size] * self._drift[size].value * self._load.slowdown

    def per_image(self) -> float:
        """Predicted seconds of an image in full batches."""
        return self.seconds(self.limit) / self.limit

    def total(self, images: int) -> float:
        """Predicted time that the device needs for `images`, in batches as they would be formed."""
        full, rest = divmod(images, self.limit)
        seconds = full * self.seconds(self.limit)
        while rest:
            taken = self.take(rest)
            seconds += self.seconds(self.padded(taken))
            rest -= taken
        return seconds

    def observe(self, size: int, seconds: float) -> None:
        """Take note of how long a batch of a warmed-up size took."""
        ratio = seconds / self.seconds(size)
        self._load.slowdown *= ratio**_FAST
        self._drift[size].value *= ratio**_SLOW

    def as_dict(self) -> dict[int, float]:
        """Predicted seconds of a batch by size, now."""
        return {size: self.seconds(size) for size in self.sizes}


_HANDOVER_SECONDS = 0.0003
"""What a batch costs beside the engine: two changes of thread. Measured; it matters to the smallest models only."""


def worthwhile_sizes(seconds: Mapping[int, float]) -> tuple[int, ...]:
    """The batch sizes to use, of those timed: up to the smallest that is about as fast an image as the fastest.

    On a CPU a large batch of a large model is no faster an image than a single one, and only costs latency and memory.
    """
    per_image = {size: (taken + _HANDOVER_SECONDS) / size for size, taken in sorted(seconds.items())}
    best = min(per_image.values())
    limit = next(size for size, taken in per_image.items() if taken <= best * _GOOD_ENOUGH)
    return tuple(size for size in per_image if size <= limit)


def candidate_sizes(max_batch: int) -> tuple[int, ...]:
    """The sizes that warm-up tries: powers of two, and `max_batch` itself."""
    powers = [1 << power for power in range(max_batch.bit_length()) if 1 << power < max_batch]
    return (*powers, max_batch)
