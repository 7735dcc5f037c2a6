"""The state to resume from: `last.pt`, and `previous.pt` in case the last one is damaged."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from training.runs import RunError, durably

LAST_FILE, PREVIOUS_FILE = "last.pt", "previous.pt"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write the state in one step; what was the last becomes the one before.

    Raises OSError where it cannot be written (a full disk); the checkpoints that there are stay as they are.
    """
    last, previous = folder / LAST_FILE, folder / PREVIOUS_FILE
    with durably(last, _writer(state)) as partial:
        if last.exists():
            last.replace(previous)
        partial.replace(last)


def can_resume(folder: Path) -> bool:
    """Whether there is a checkpoint in `folder`."""
    return any((folder / name).is_file() for name in (LAST_FILE, PREVIOUS_FILE))


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], str]:
    """The last good state, and a warning where it is not the newest, else "".

    Raises RunError where there is none.
    """
    if not can_resume(folder):
        raise RunError(f"{folder} has no {LAST_FILE} to resume from: start it without --resume")
    damage: list[str] = []
    for name in (LAST_FILE, PREVIOUS_FILE):
        try:
            return _load(folder / name), "; ".join(damage)
        except Exception as error:  # noqa: BLE001 (a damaged file makes zipfile and torch raise almost anything)
            damage.append(f"{folder / name} cannot be read ({(str(error) or repr(error)).splitlines()[0]})")
    raise RunError("; ".join(damage) + ": remove the folder and start the run again")


def _writer(state: dict[str, Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("wb") as stream:
            try:
                torch.save(state, stream)
            except RuntimeError as error:
                # torch's message ("unexpected pos 704 vs 598") hides what the disk said.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    return write


def _load(path: Path) -> dict[str, Any]:
    # torch.load does not look at the checksums of its own zip format: a flipped bit would go into the weights.
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return state
