"""Keeps a local repository folder in sync with a store: adds new versions, drops removed ones, never takes wrong ones.

Of each model the newest versions are copied: as many as serve, one more to fall back on if the newest cannot be loaded,
and those that are named, however old they are. Files are read one at a time, into a cache that several processes
may share: one of them fetches, the others wait and find them there.
"""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog

from service.bundle import MAX_FILE_BYTES, SUMS_FILE, parse_sums
from service.errors import BundleError, NotReady, RepositoryError
from service.remote.attempts import Attempts
from service.remote.cache import Cache
from service.remote.loop import LoopThread
from service.remote.store import FILES, Interrupted, Key, Listing, RemoteVersion, Store

log = structlog.get_logger()

_READS: Final = 3
"""Immediate attempts to read a file; polling makes later ones."""
_READ_PAUSE_SECONDS: Final = 0.2
_LOCK_PAUSE_SECONDS: Final = 0.1
_LOCK_SECONDS: Final = 600.0
"""How long another process may fetch before this one gives up: if it takes longer, it hangs."""


class Mirror:
    """The copy of one repository. `update` blocks; `close` ends it, from any thread."""

    def __init__(
        self,
        store: Store,
        cache: Cache,
        *,
        names: Sequence[str],
        versions_to_serve: int,
        on_trial: Collection[Key] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`names`: the models to copy, empty for all. `on_trial`: versions to copy besides the newest. The
        mirror owns `cache` and `store` from now on."""
        self._store, self._cache, self._names = store, cache, frozenset(names)
        self._to_keep, self._on_trial = versions_to_serve + 1, frozenset(on_trial)
        self._clock = clock
        self._here: dict[Key, str] = {}
        """Tags of the versions whose copy is known to be right."""
        self._attempts = Attempts(clock)
        self._loop = LoopThread("repository", at_end=store.close)
        self._one: asyncio.Lock | None = None

    @property
    def folder(self) -> Path:
        """The repository folder."""
        return self._cache.folder

    def update(self, serving: Collection[Key] = (), *, force: bool = False) -> Mapping[Key, str]:
        """Bring the folder up to date, and return why versions that it should hold are missing.

        `serving`: versions that stay although there are newer ones. Unless `force`, what failed is not tried again
        before a pause. Raises RepositoryError if the store cannot be listed; NotReady once it is closed.
        """
        try:
            return self._loop.run(self._update(frozenset(serving), force=force))
        except (CancelledError, asyncio.CancelledError):
            raise NotReady("the service is shutting down") from None

    def close(self) -> None:
        """End an update that is running, and allow no other. What is half written is removed."""
        self._loop.close()

    async def _update(self, serving: frozenset[Key], *, force: bool) -> dict[Key, str]:
        self._one = self._one or asyncio.Lock()
        async with self._one:
            if force:
                self._attempts.clear()
            if error := self._attempts.pending("store"):
                raise error
            try:
                listing = await self._store.list()
                wanted = {key: listing[key] for key in listing if not self._names or key[0] in self._names}
                missing = await self._with_lock(wanted, listing, serving)
            except RepositoryError as error:
                self._attempts.failed("store", error)
                raise
            except OSError as error:
                raise RepositoryError(f"the cache {self.folder.parent} cannot be used ({error.strerror})") from error
            self._attempts.forget("store")
            return missing

    async def _with_lock(self, wanted: Listing, listing: Listing, serving: frozenset[Key]) -> dict[Key, str]:
        give_up_at = self._clock() + _LOCK_SECONDS
        while True:
            with self._cache.locked() as mine:
                if mine:
                    self._cache.clear_partial()
                    try:
                        return await self._bring(wanted, listing, serving)
                    finally:
                        self._cache.clear_partial()
            if self._clock() > give_up_at:
                raise RepositoryError(f"another process holds the lock of the cache {self.folder.parent}: end it")
            await asyncio.sleep(_LOCK_PAUSE_SECONDS)

    async def _bring(self, wanted: Listing, listing: Listing, serving: frozenset[Key]) -> dict[Key, str]:
        """Remove models that are gone first, which makes room; gone or superseded versions once others are there."""
        self._attempts.forget_others({"store", *wanted})
        listed = {name for name, _ in listing}
        ours = [key for key in self._cache.present() if not self._names or key[0] in self._names]
        for key in ours:
            if key[0] not in listed:
                self._forget(key)
        self._cache.sweep()
        missing: dict[Key, str] = {}
        for name in sorted({name for name, _ in wanted}):
            kept: set[Key] = set()
            for key in sorted((key for key in wanted if key[0] == name), reverse=True):
                if len(kept - self._on_trial) == self._to_keep and key not in self._on_trial:
                    continue
                reason = await self._ensure(key, wanted[key])
                if reason is None:
                    kept.add(key)
                else:
                    missing[key] = reason
            for key in ours:
                superseded = key in listing and key not in missing and key not in serving
                if kept and key[0] == name and key not in kept and (superseded or key not in listing):
                    self._forget(key)
        self._cache.sweep()
        return missing

    def _forget(self, key: Key) -> None:
        self._cache.remove(key)
        self._here.pop(key, None)
        self._attempts.forget(key)

    async def _ensure(self, key: Key, remote: RemoteVersion) -> str | None:
        """Make sure that a version is there; returns why it is not. Raises RepositoryError if the store is gone."""
        if self._here.get(key) == remote.tag and (self.folder / key[0] / str(key[1])).is_dir():
            return None
        if error := self._attempts.pending(key, remote.tag):
            return str(error)
        try:
            await self._fetch(key, remote)
        except (BundleError, OSError) as error:
            reason = str(error)
            if isinstance(error, OSError):
                reason = f"{key[0]}/{key[1]}: the cache cannot be written to ({error.strerror})"
            if self._attempts.failed(key, BundleError(reason), remote.tag):
                log.error("version not fetched", model=key[0], version=key[1], reason=reason)
            if isinstance(error, Interrupted):
                # Raises if the store is gone: every other version would take as long to fail.
                await self._store.list()
            return reason
        self._attempts.forget(key)
        self._here[key] = remote.tag
        return None

    async def _fetch(self, key: Key, remote: RemoteVersion) -> None:
        """Copy a version, unless its copy is there. Raises BundleError."""
        path, began, fetched = f"{key[0]}/{key[1]}", self._clock(), 0
        for file in FILES:
            if file not in remote.sizes:
                raise BundleError(f"{path}/{file}: missing")
            if (remote.sizes[file] or 0) > MAX_FILE_BYTES[file]:
                raise BundleError(f"{path}/{file}: {remote.sizes[file]} bytes, more than {MAX_FILE_BYTES[file]}")
        sums = await self._read_sums(f"{path}/{SUMS_FILE}", remote)
        if self._cache.holds(key, sums):
            return
        digests = parse_sums(sums, f"{path}/{SUMS_FILE}")
        lacking = [file for file, digest in digests.items() if not self._cache.has(digest)]
        needed, room = sum(remote.sizes[file] or 0 for file in lacking), self._cache.room()
        if needed > room:
            raise BundleError(f"{path}: {needed} bytes, but repository_cache_bytes leaves {room}")
        for file in lacking:
            if not self._cache.has(digests[file]):  # two files may be the same
                fetched += await self._read_file(f"{path}/{file}", remote.sizes[file], file, digests[file])
        self._cache.publish(key, sums, digests)
        seconds = round(self._clock() - began, 3)
        log.info("version fetched", model=key[0], version=key[1], bytes=fetched, seconds=seconds)

    async def _read_sums(self, path: str, remote: RemoteVersion) -> bytes:
        pieces = bytearray()

        def take(piece: bytes) -> None:
            pieces.extend(piece)
            if len(pieces) > MAX_FILE_BYTES[SUMS_FILE]:
                raise BundleError(f"{path}: exceeds {MAX_FILE_BYTES[SUMS_FILE]} bytes")

        async def read() -> None:
            pieces.clear()
            await self._store.read(path, remote.sizes[SUMS_FILE], take)

        await _again(read)
        digest = hashlib.sha256(pieces).hexdigest()
        if remote.sums_digest not in (None, digest):
            raise BundleError(f"{path}: sha256 is {digest}, but the index says {remote.sums_digest}")
        return bytes(pieces)

    async def _read_file(self, path: str, size: int | None, file: str, digest: str) -> int:
        """Read a file into the cache, and return its size."""
        received = 0

        async def read() -> None:
            nonlocal received
            with self._cache.blob(digest, label=path, file=file) as blob:
                await self._store.read(path, size, blob.take)
                received = blob.size

        await _again(read)
        return received


async def _again(read: Callable[[], Awaitable[None]]) -> None:
    """Read, and retry if interrupted."""
    for _ in range(_READS - 1):
        with suppress(Interrupted):
            return await read()
        await asyncio.sleep(_READ_PAUSE_SECONDS)
    return await read()
