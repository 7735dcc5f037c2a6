"""Progress of a run: the progress bar, and the log for TensorBoard."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

MetricsRow = dict[str, float | int]
"""One epoch in metrics.csv."""


class TensorBoard:
    """The log for TensorBoard in `folder`, or none. If it cannot be written (disk full), warn and go on without it."""

    def __init__(self, folder: Path | None, warn: Callable[[str], None], *, next_epoch: int) -> None:
        self._warn = warn
        self._writer = SummaryWriter(str(folder), purge_step=next_epoch) if folder else None

    def add(self, values: MetricsRow, *, epoch: int) -> None:
        """Write the values of one epoch."""
        if self._writer:
            try:
                for key, value in values.items():
                    self._writer.add_scalar(key, value, epoch)
                self._writer.flush()
            except OSError as error:
                self._warn(f"[yellow]warning:[/] no TensorBoard log from here on ({error})")
                self._writer = None

    def close(self) -> None:
        """End the log."""
        with suppress(OSError):
            if self._writer:
                self._writer.close()


def progress_bar(console: Console, *, disable: bool) -> Progress:
    """Steps done, loss, throughput and time left. A task needs the fields `loss` and `rate` (images/s)."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:.0f} images/s"),
        TimeRemainingColumn(),
        console=console,
        disable=disable,
    )
