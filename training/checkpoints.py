"""The state to resume from: `last.pt`, or `previous.pt` if `last.pt` is damaged."""

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from training.runs import RunError, write_atomically

LAST_FILE, PREVIOUS_FILE = "last.pt", "previous.pt"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` to last.pt, atomically; the file that was last.pt becomes previous.pt.

    Raises OSError if it cannot be written (disk full); then both files stay as they were.
    """
    # Serialise in memory first: torch itself reports a full disk as "unexpected pos 704 vs 598".
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(folder / LAST_FILE, buffer.getbuffer(), keep_old_as=folder / PREVIOUS_FILE)


def can_resume(folder: Path) -> bool:
    """Whether `folder` has a checkpoint."""
    return any((folder / name).is_file() for name in (LAST_FILE, PREVIOUS_FILE))


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], str]:
    """The last good state, and a warning if it is not the newest one, else "".

    Raises RunError if there is none.
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


def _load(path: Path) -> dict[str, Any]:
    # torch.load does not verify the checksums of its own zip format: a flipped bit would end up in the weights.
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return state
