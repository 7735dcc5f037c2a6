"""How a model uses the cores: as lanes, each of which computes one batch at a time with some threads.

All threads on one batch give a single image the shortest time. They wait for each other at every operator, though, so
many narrow lanes get more images done. Both ways are measured for each model, and those that pay off are kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

_SAME_THROUGHPUT = 1.02
"""Of layouts whose throughput is within this factor of the best one, the one with the most threads is used."""

_MIN_SPEEDUP, _MIN_SAVED_SECONDS = 1.2, 0.001
"""More threads must make a single image faster by this factor and by this much: otherwise they only wait for each
other, and take cores from the decoders and from the next image. They also go on looking for work for some milliseconds
after it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """One way to use the cores."""

    threads: int
    """Threads that compute a batch."""
    lanes: int
    """Batches that are computed at once."""
    seconds: dict[int, float]
    """Duration of a batch by its size, while all lanes work."""

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes in use, in ascending order."""
        return tuple(sorted(self.seconds))

    @cached_property
    def least(self) -> float:
        """Seconds of the smallest batch."""
        return self.seconds[min(self.seconds)]

    @property
    def images_per_second(self) -> float:
        """Throughput with the best batch size."""
        return self.lanes * max(size / seconds for size, seconds in self.seconds.items())


def candidate_layouts(cores: int, *, max_lanes: int | None = None) -> tuple[tuple[int, int], ...]:
    """(threads, lanes) to try, from all cores for one batch to a lane on each core, by halving the threads."""
    found = []
    threads = cores
    while True:
        found.append((threads, min(cores // threads, max_lanes or cores)))
        if threads == 1:
            return tuple(found)
        threads //= 2


def worthwhile_layouts(measured: Sequence[Layout]) -> tuple[Layout, ...]:
    """Of the layouts measured, the one with the best throughput and those that are faster for single images.

    In ascending order of their threads. The first one is for full load.
    """
    best = max(layout.images_per_second for layout in measured)
    ascending = sorted(measured, key=lambda layout: layout.threads)
    loaded = [layout for layout in ascending if layout.images_per_second * _SAME_THROUGHPUT >= best][-1]
    kept = [loaded]
    for layout in ascending:
        enough = min(kept[-1].least / _MIN_SPEEDUP, kept[-1].least - _MIN_SAVED_SECONDS)
        if layout.threads > loaded.threads and layout.least < enough:
            kept.append(_faster_than(loaded, layout))
    return tuple(kept)


def _faster_than(loaded: Layout, layout: Layout) -> Layout:
    """The layout with those batch sizes whose images it answers sooner than the one for full load."""

    def seconds(images: int) -> float:
        share = -(-images // loaded.lanes)
        size = next((size for size in loaded.sizes if size >= share), loaded.sizes[-1])
        return loaded.seconds[size] * -(-share // size)

    pays = {size: taken for size, taken in layout.seconds.items() if taken < seconds(size * layout.lanes)}
    return replace(layout, seconds=pays or {min(layout.seconds): layout.least})


def single(seconds: Mapping[int, float], *, threads: int = 1) -> tuple[Layout, ...]:
    """The only layout of a model that computes one batch at a time."""
    return (Layout(threads=threads, lanes=1, seconds=dict(seconds)),)
