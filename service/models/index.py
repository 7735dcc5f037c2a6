"""The index: every version that is or could be served, its state, and the reason."""

from dataclasses import dataclass, replace
from typing import Literal

import structlog

log = structlog.get_logger()

State = Literal["ready", "loading", "unloading", "unavailable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A version in the index."""

    name: str
    version: int | None
    """None if even that is unknown."""
    state: State
    reason: str = ""


class Index:
    """Entries by name and version."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, int | None], Entry] = {}

    @property
    def entries(self) -> list[Entry]:
        """All of them, by name and version."""
        return sorted(self._entries.values(), key=lambda entry: (entry.name, entry.version or 0))

    def entries_during(self, hang: str | None) -> list[Entry]:
        """All of them; none is ready while the engine hangs, which all models share. `hang`: why it hangs."""
        if hang is None:
            return self.entries
        return [
            replace(entry, state="unavailable", reason=hang) if entry.state == "ready" else entry
            for entry in self.entries
        ]

    def state(self, name: str, version: int) -> State | None:
        """The state of a version, if it is known."""
        entry = self._entries.get((name, version))
        return entry.state if entry else None

    def note(self, name: str, version: int, state: State, reason: str = "") -> None:
        """Set the state of a version."""
        self._entries[name, version] = Entry(name=name, version=version, state=state, reason=reason)

    def note_unlisted(self, name: str, reason: str) -> None:
        """Note that the versions of a model are not known; logged if that is new."""
        entry = Entry(name=name, version=None, state="unavailable", reason=reason)
        if self._entries.get((name, None)) != entry:
            log.error("model unavailable", model=name, reason=reason)
            self._entries[name, None] = entry

    @property
    def names(self) -> set[str]:
        """The models with entries."""
        return {name for name, _ in list(self._entries)}

    def note_listed(self, name: str, published: list[int], *, expected: bool) -> list[int]:
        """Note the versions of a model: unavailable ones that are gone are forgotten, and returned.

        `expected`: whether a model without versions is to stay in the index.
        """
        if published or not expected:
            self._entries.pop((name, None), None)
        gone = [
            entry.version
            for entry in self.entries
            if entry.name == name
            and entry.state == "unavailable"
            and entry.version is not None
            and entry.version not in published
        ]
        for version in gone:
            self.remove(name, version)
        return gone

    def remove(self, name: str, version: int) -> None:
        """Forget a version."""
        self._entries.pop((name, version), None)
