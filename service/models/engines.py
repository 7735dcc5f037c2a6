"""The sessions of one model: one for each of its layouts, all with the same weights in memory."""

import numpy as np
import numpy.typing as npt

from service.bundle import Bundle
from service.engine import Device, Engine
from service.scheduling.layouts import Layout
from service.scheduling.outputs import Outputs, Pixels


class Engines:
    """An engine for each layout, by its number of threads; must be closed."""

    def __init__(self, bundle: Bundle, engines: dict[int, Engine]) -> None:
        self._bundle, self._engines = bundle, engines

    @property
    def device(self) -> Device:
        """Where all of them run."""
        return next(iter(self._engines.values())).device

    def engine(self, threads: int) -> Engine:
        """The engine of a layout."""
        return self._engines[threads]

    def run(self, images: Pixels, threads: int) -> Outputs:
        """uint8 images (n,H,W,3) -> logits and probabilities, float32 (n, classes). Raises EngineError."""
        return self._engines[threads].run(images)

    def shrink(self, layout: Layout) -> None:
        """Free what the layout's engine holds beyond the needs of its largest batch. Raises EngineError."""
        self._engines[layout.threads].shrink(blank(self._bundle, layout.sizes[-1]))

    def close(self) -> None:
        """Free the memory of all of them."""
        for engine in self._engines.values():
            engine.close()


def blank(bundle: Bundle, size: int) -> npt.NDArray[np.uint8]:
    """A batch of black images, uint8 (size,H,W,3)."""
    return np.zeros((size, *bundle.manifest.input.shape[1:]), dtype=np.uint8)
