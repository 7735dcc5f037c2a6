"""Where a repository's folder comes from, if it is a copy of something elsewhere."""

from collections.abc import Collection, Mapping
from typing import Protocol

Key = tuple[str, int]
"""Name and version."""


class Source(Protocol):
    """Keeps the folder up to date. Its methods block, and may be called from any thread."""

    def update(
        self, serving: Collection[tuple[str, int]] = (), *, force: bool = False
    ) -> Mapping[tuple[str, int], str]:
        """Bring the folder up to date; returns why versions that it should hold are not there.

        `serving`: versions that stay in it although there are newer ones; `force`: retry at once what failed.
        Raises RepositoryError, and NotReady once it is closed.
        """

    def close(self) -> None:
        """End an update that is running, and allow no other."""
