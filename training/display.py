"""A run while it runs: the progress bar, and TensorBoard's log."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from training.world import World

MetricsRow = dict[str, float | int]
"""One epoch of metrics.csv."""


class Board:
    """TensorBoard's log of the main process; the others have none."""

    def __init__(self, out: Path, world: World, *, purge_step: int) -> None:
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=purge_step) if world.main else None

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer:
            self._writer.close()

    def add(self, values: MetricsRow, *, epoch: int) -> None:
        """Log the values of one epoch."""
        if self._writer:
            for key, value in values.items():
                self._writer.add_scalar(key, value, epoch)


def progress_bar(console: Console, *, disable: bool) -> Progress:
    """Steps done, loss, throughput and time left. A task needs the fields `loss` and `rate`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:.0f} images/s"),
        TimeRemainingColumn(),
        console=console,
        disable=disable,
    )
