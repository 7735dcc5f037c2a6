"""The cost model: how long a batch of a model will take, measured at warm-up and kept current by live timings.

    predicted seconds = baseline of (model, layout, batch size)  ×  slowdown of the device

Warm-up measures the baselines on an idle device, for each layout of lanes and threads (`service.scheduling.layouts`).
Under traffic, decoding and other processes take their share of the cores. That slows all models alike, so one
fast-moving factor of the device tracks it, and models that have not run for a while are predicted well too. A slower
factor for each layout and batch size tracks what the first does not explain. Both decay.

Decoding is predicted in the same way, from the work of each image in pixels: see `service.image_work`.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from service.images import LARGE_PIXELS
from service.scheduling.layouts import Layout, single

_FAST_WEIGHT, _SLOW_WEIGHT = 0.2, 0.02
"""Weights of a new timing: in the device's slowdown, and in the drift of its own batch size."""

_GOOD_ENOUGH = 1.1
"""A larger batch pays off only if the smaller one takes more than this factor longer per image; less is noise."""

_HALF_LIFE_SECONDS, _DRIFT_HALF_LIFE_SECONDS = 5.0, 60.0

_SECONDS_PER_PIXEL = 1e-8
"""Time to decode a pixel of a JPEG, if it was not measured."""

_OUTLIER = 4.0
"""A decoding that took longer than predicted counts as this many times longer at most; likewise if it was faster."""

LARGE_WORK = LARGE_PIXELS
"""Decoding work, in pixels, above which an image goes to a lane of its own, so that small ones need not wait for it.

At 10 ms of CPU per megapixel, smaller images take at most 20 ms; docs/images.md has times of larger ones.
"""

_BUSY = 0.9
"""A layout that would be busy for more than this part of the time is used only at lower arrival rates."""

_RECENT_SECONDS, _LEAST_BUSY_SECONDS = 2.0, 0.02
"""For the arrival rate: the time in which an arrival's weight falls to 1/e, and what is added to the time that the
engine was busy, so that a single arrival weighs little."""

_HANDOVER_SECONDS = 0.0003
"""Cost of a batch besides the engine's: two thread switches. Measured; it matters to the smallest models only."""


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
        """`seconds_per_pixel`: the decoding time on an idle machine, for each pixel of work."""
        self.decode_threads = decode_threads
        self.large_threads = max(1, decode_threads // 2)
        """Threads of the lane for images of more than LARGE_WORK."""
        self.clock = clock
        self.slowdown = Decaying(1.0, clock)
        """Recent duration of batches divided by their baselines; its value is 1 on an idle device."""
        self.arrivals = Arrivals(clock)
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


class Arrivals:
    """The work that arrives while batches run: seconds of the device under full load, per second.

    What arrives while nothing runs does not count. A client that waits for each answer never has two images to be
    computed at once, however often it asks; arrivals that do not wait for answers are as frequent at either time.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        """The event loop calls `add`, and the engine's lanes call `busy`."""
        self._busy = False
        self._work = self._busy_seconds = 0.0
        """Recent ones: both decay by `_RECENT_SECONDS`."""
        self._since = clock()

    @property
    def value(self) -> float:
        """The recent rate."""
        with self._lock:
            self._forget()
            return self._work / (self._busy_seconds + _LEAST_BUSY_SECONDS)

    def add(self, seconds: float) -> None:
        """Count work that arrives now."""
        with self._lock:
            self._forget()
            if self._busy:
                self._work += seconds

    def busy(self, busy: bool) -> None:
        """Record whether batches run from now on."""
        with self._lock:
            self._forget()
            self._busy = busy

    def _forget(self) -> None:
        now = self._clock()
        kept = math.exp((self._since - now) / _RECENT_SECONDS)
        self._since = now
        self._work *= kept
        self._busy_seconds *= kept
        if self._busy:
            self._busy_seconds += _RECENT_SECONDS * (1 - kept)


class Decaying:
    """A value that returns to its resting value, by half every `half_life` seconds since it was last set."""

    def __init__(self, rest: float, clock: Callable[[], float], half_life: float = _HALF_LIFE_SECONDS) -> None:
        self._rest = self._last = rest
        self._clock, self._half_life = clock, half_life
        self._set_at = -math.inf

    @property
    def value(self) -> float:
        """The current value."""
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


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run next: the images of a batch, and the threads that compute it."""

    images: int
    threads: int


class Cost:
    """What batches of one model cost. Only the warmed-up sizes of its layouts are ever run."""

    def __init__(self, layouts: Sequence[Layout] | Mapping[int, float], load: Load) -> None:
        """`layouts`: those in use, the one for full load first; or the seconds of a batch on an idle device, by its
        size, for a model that runs one batch at a time on one core."""
        self.layouts = single(layouts) if isinstance(layouts, Mapping) else tuple(layouts)
        if not self.layouts or any(not layout.seconds or min(layout.seconds) < 1 for layout in self.layouts):
            raise ValueError("a cost model needs the time of at least one batch size")
        self._loaded = self.layouts[0]
        self._drift = {
            (layout.threads, size): Decaying(1.0, load.clock, _DRIFT_HALF_LIFE_SECONDS)
            for layout in self.layouts
            for size in layout.seconds
        }
        """What the load does not explain."""
        self._by_threads = {layout.threads: layout for layout in self.layouts}
        self._load = load
        self.sizes = self._loaded.sizes
        self.lanes = max(layout.lanes for layout in self.layouts)

    @property
    def limit(self) -> int:
        """Largest number of images in a batch under full load."""
        return self.sizes[-1]

    @property
    def least(self) -> float:
        """Predicted seconds of the fastest batch."""
        return min(self.seconds(layout.sizes[0], layout.threads) for layout in self.layouts)

    def plan(self, waiting: int, *, free: int, elsewhere: int = 0, decoding: int = 0) -> Plan | None:
        """The next batch for one or more of the waiting images, on `free` cores; None if those are too few for any.

        The layout is the one that answers all waiting images first, including those of other models (`elsewhere`) and
        those that arrive in the meantime, as if they were of this one. Layouts that could not keep up with the recent
        arrivals are left out. The waiting images are shared among the lanes whose cores are not busy `decoding`: if
        every core is, one batch of all costs least.
        """
        lanes = {layout: min(layout.lanes, free // layout.threads) for layout in self.layouts}
        fitting = [layout for layout in self.layouts if lanes[layout]]
        if not fitting:
            return None
        layout = fitting[0]
        if len(fitting) > 1:
            images, rate = waiting + elsewhere, self._rate()
            layout = min(self._able(fitting), key=lambda layout: self._cleared(layout, lanes[layout], images, rate))
        share = min(lanes[layout], max(1, (free - decoding) // layout.threads))
        return Plan(self._take(layout, -(-waiting // share)), layout.threads)

    def padded(self, images: int, threads: int | None = None) -> int:
        """The warmed-up size that holds `images`. Raises ValueError above the limit."""
        return _padded(self._layout(threads).sizes, images)

    def _take(self, layout: Layout, waiting: int) -> int:
        """How many of the images waiting for a lane its next batch should hold: those with the best throughput.

        Five images padded to eight may take longer than four of them now and the fifth afterwards.
        """
        sizes = layout.sizes
        if waiting >= sizes[-1]:
            return sizes[-1]
        up = _padded(sizes, waiting)
        down = max((size for size in sizes if size <= waiting), default=0)
        if not down or up == waiting:
            return waiting
        threads = layout.threads
        return waiting if waiting / self.seconds(up, threads) >= down / self.seconds(down, threads) else down

    def seconds(self, size: int, threads: int | None = None) -> float:
        """Predicted duration of one batch of a warmed-up size; by default as under full load."""
        layout = self._layout(threads)
        return layout.seconds[size] * self._drift[layout.threads, size].value * self._load.slowdown.value

    def per_image(self) -> float:
        """Predicted seconds of the device per image under full load."""
        return self._per_image(self._loaded) / self._loaded.lanes

    def total(self, images: int) -> float:
        """Predicted seconds of the device for `images` under full load, in batches as they would be formed.

        While several lanes work, a batch costs the device only its lane's share.
        """
        return self._in_turn(self._loaded, images) / self._loaded.lanes

    def finish(self, images: int, *, idle: bool) -> float:
        """Predicted seconds until `images` are answered, with nothing else ahead of them.

        `idle`: whether all cores are free, so that a few images get more cores than those of one lane.
        """
        layouts = self._able(self.layouts) if idle else self.layouts[:1]
        return min(self._in_turn(layout, -(-images // layout.lanes)) for layout in layouts)

    def tail(self, images: int) -> float:
        """By how much the last batch of many takes longer than its share of `total`: the other lanes do not help it."""
        if self._loaded.lanes == 1:
            return 0.0
        share = -(-images // self._loaded.lanes)
        last = self.seconds(_padded(self.sizes, self._take(self._loaded, share)))
        return last * (1 - 1 / self._loaded.lanes)

    def _rate(self) -> float:
        """Recent arrivals of all models while batches run, as images of this one per second."""
        return self._load.arrivals.value / self.per_image()

    def _able(self, layouts: Sequence[Layout]) -> Sequence[Layout]:
        """Those that keep up with the recent arrivals, at least the first one, which is for full load."""
        if len(layouts) == 1:
            return layouts
        rate = self._rate()
        return [layout for layout in layouts if rate * self._per_image(layout) <= layout.lanes * _BUSY] or layouts[:1]

    def _cleared(self, layout: Layout, lanes: int, images: int, rate: float) -> float:
        """Seconds until `images`, and those that arrive during the first batch, are answered in `lanes` lanes."""
        first = self.seconds(layout.sizes[0], layout.threads)
        return max(first, (images + rate * first) * self._per_image(layout) / lanes)

    def _per_image(self, layout: Layout) -> float:
        """Predicted seconds of a lane per image in full batches."""
        return self.seconds(layout.sizes[-1], layout.threads) / layout.sizes[-1]

    def _layout(self, threads: int | None) -> Layout:
        return self._loaded if threads is None else self._by_threads[threads]

    def _in_turn(self, layout: Layout, images: int) -> float:
        """Predicted seconds of one lane for `images`."""
        full, rest = divmod(images, layout.sizes[-1])
        seconds = full * self.seconds(layout.sizes[-1], layout.threads)
        while rest:
            taken = self._take(layout, rest)
            seconds += self.seconds(_padded(layout.sizes, taken), layout.threads)
            rest -= taken
        return seconds

    def observe(self, size: int, seconds: float, threads: int | None = None) -> None:
        """Record how long a batch of a warmed-up size took."""
        threads = self._loaded.threads if threads is None else threads
        ratio = seconds / self.seconds(size, threads)
        self._load.slowdown.value *= ratio**_FAST_WEIGHT
        self._drift[threads, size].value *= ratio**_SLOW_WEIGHT

    def as_dict(self) -> dict[int, float]:
        """Predicted seconds of a batch at present under full load, by its size."""
        return {size: self.seconds(size) for size in self.sizes}


def _padded(sizes: Sequence[int], images: int) -> int:
    """The smallest of the ascending sizes that holds `images`. Raises ValueError above the limit."""
    for size in sizes:
        if size >= images:
            return size
    raise ValueError(f"{images} images exceed the largest batch, {sizes[-1]}")


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
