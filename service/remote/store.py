"""The interface to the place where a repository is, as a mirror uses it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from service.bundle import CONTENT_FILES, SUMS_FILE
from service.errors import BundleError

FILES: Final = (SUMS_FILE, *CONTENT_FILES)
BLOCK_BYTES: Final = 4 * 1024 * 1024
"""The most of a file that is requested, and held in memory, at once; the store's time limit is for each block."""

Key = tuple[str, int]
"""Name and version."""


class Interrupted(BundleError):
    """A file could not be read to its end, perhaps only temporarily."""


@dataclass(frozen=True, kw_only=True)
class RemoteVersion:
    """A version as a store lists it."""

    tag: str
    """Changes whenever anything in the version changes."""
    sizes: Mapping[str, int | None]
    """By file name, in bytes; None if the listing does not give it. Files of a bundle only."""
    sums_digest: str | None = None
    """SHA-256 of `SHA256SUMS`, if the listing gives it."""


Listing = dict[Key, RemoteVersion]


class Store(Protocol):
    """A place with bundles as `<name>/<version>/<file>`. Its methods run on one event loop."""

    async def list(self) -> Listing:
        """All versions, complete or not. Raises RepositoryError if they cannot be listed, or if there is none."""

    async def read(self, path: str, size: int | None, take: Callable[[bytes], None]) -> None:
        """Give `take` the bytes of a file, in pieces of at most a block. `size` as listed.

        Raises Interrupted, another BundleError if trying again is pointless, and what `take` raises.
        """

    async def close(self) -> None:
        """Close its connections."""
