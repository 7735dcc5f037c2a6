"""A run while it runs: the progress bar, and TensorBoard's log."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from training.distributed import World

MetricsRow = dict[str, float | int]
"""One epoch of metrics.csv."""


class Board:
    """TensorBoard's log of the main process; the others have none."""

    def __init__(self, out: Path, world: World, console: Console, *, next_epoch: int) -> None:
        self._console = console
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=next_epoch) if world.main else None

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_: object) -> None:
        self._quietly(lambda writer: writer.close())

    def add(self, values: MetricsRow, *, epoch: int) -> None:
        """Log the values of one epoch."""
        for key, value in values.items():
            self._quietly(partial(_add, key, value, epoch))

    def _quietly(self, use: Callable[[SummaryWriter], None]) -> None:
        """A log that cannot be written (a full disk) is given up, and the run goes on."""
        if self._writer:
            try:
                use(self._writer)
            except OSError as error:
                self._console.print(f"[yellow]warning:[/] no TensorBoard log from here on ({error})", soft_wrap=True)
                self._writer = None


def _add(key: str, value: float, epoch: int, writer: SummaryWriter) -> None:
    writer.add_scalar(key, value, epoch)


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
