"""How much memory workers take: what each has of its own, and what all of them share."""

from dataclasses import dataclass
from pathlib import Path

from service.errors import StartupError

_PROC = Path("/proc")
_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """Memory of a process, in bytes."""

    resident: int
    proportional: int
    """Resident, with what several processes map divided among them (PSS)."""
    shareable: int
    """The part of the resident memory that other processes can map as well: pages of libraries and weights."""

    @property
    def own(self) -> int:
        """What one more process takes."""
        return self.resident - self.shareable


def taken_by(pid: int, *, proc: Path = _PROC) -> Taken | None:
    """The memory of a process; None where the system does not report it."""
    try:
        lines = (proc / str(pid) / "smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    resident = proportional = shareable = 0
    of_file = False
    for line in lines:
        name, *values = line.split()
        if not name.endswith(":"):
            # The first line of a mapping: address, permissions, offset, device, inode and path.
            of_file = len(values) > 4 and values[4].startswith("/") and not line.endswith("(deleted)")
        elif name == "Rss:":
            resident += int(values[0])
        elif name == "Pss:":
            proportional += int(values[0])
        elif of_file and name in ("Shared_Clean:", "Private_Clean:"):
            shareable += int(values[0])
    return (
        Taken(resident=resident << 10, proportional=proportional << 10, shareable=shareable << 10) if resident else None
    )


def require_room(workers: int, one: Taken, left: int | None) -> None:
    """Raise StartupError unless there is room for the other workers besides the first.

    `one`: what the first has taken, `left`: what is left besides; None if that is not known.
    """
    if left is None or (workers - 1) * one.own <= left:
        return
    most = 1 + left // max(1, one.own)
    raise StartupError(
        f"--workers {workers}: each worker takes {one.own // _MIB} MiB of its own, as measured, and {left // _MIB} MiB "
        f"are left beside the first: use --workers {most}, fewer models, or more memory"
    )


def described(workers: int, one: Taken) -> dict[str, int]:
    """What all workers will take, for the log, in MiB."""
    return {
        "workers": workers,
        "of_each_mib": one.own // _MIB,
        "shared_mib": one.shareable // _MIB,
        "together_mib": (workers * one.own + one.shareable) // _MIB,
    }
