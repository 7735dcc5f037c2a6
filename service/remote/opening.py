"""Opens a mirror from its address; the code for a kind of store is imported only then."""

from collections.abc import Collection, Sequence
from pathlib import Path

from service.remote.address import Address
from service.remote.cache import Cache, default_cache
from service.remote.mirror import Mirror
from service.remote.store import Key, Store


def open_mirror(
    address: Address,
    *,
    cache: Path | None,
    cache_bytes: int,
    timeout_seconds: float,
    names: Sequence[str],
    versions_to_serve: int,
    on_trial: Collection[Key] = (),
) -> Mirror:
    """The mirror of a repository, whose folder may hold what an earlier process has left; `close` it.

    Raises StartupError without the packages for its kind, and RepositoryError if the cache cannot be used.
    """
    store: Store
    if address.scheme in ("s3", "gs"):
        from service.remote.bucket import BucketStore  # noqa: PLC0415

        store = BucketStore(address, timeout_seconds=timeout_seconds)
    else:
        from service.remote.web import WebStore  # noqa: PLC0415

        store = WebStore(address, timeout_seconds=timeout_seconds)
    folder = Cache((cache or default_cache()) / address.folder_name, max_bytes=cache_bytes)
    return Mirror(store, folder, names=names, versions_to_serve=versions_to_serve, on_trial=on_trial)
