"""What a mirror asks of the place where a repository is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from service.bundle import CONTENT_FILES, SUMS_FILE
from service.errors import BundleError

FILES: Final = (SUMS_FILE, *CONTENT_FILES)
BLOCK_BYTES: Final = 4 * 1024 * 1024
"""So much of a file is asked for, and held in memory, at once; each has the store's time limit for itself."""

Key = tuple[str, int]
"""Name and version."""


class Interrupted(BundleError):
    """A file could not be read to its end, perhaps only for the moment."""


@dataclass(frozen=True, kw_only=True)
class RemoteVersion:
    """A version as a store lists it."""

    tag: str
    """Another one whenever anything in the version changes."""
    sizes: Mapping[str, int | None]
    """By the name of the file, in bytes; None where the listing does not say. Files of a bundle only."""
    sums_digest: str | None = None
    """SHA-256 of `SHA256SUMS`, where the listing says."""


Listing = dict[Key, RemoteVersion]


class Store(Protocol):
    """A place with bundles as `<name>/<version>/<file>`. Its methods run on one event loop."""

    async def list(self) -> Listing:
        """All versions, complete or not. Raises RepositoryError if they cannot be listed, or if there is none."""

    async def read(self, path: str, size: int | None, take: Callable[[bytes], None]) -> None:
        """Give `take` the bytes of a file, in pieces of at most a block. `size` as listed.

        Raises Interrupted, another BundleError if there is no use in trying again, and what `take` raises.
        """

    async def close(self) -> None:
        """Close its connections."""
