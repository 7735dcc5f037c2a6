"""Buckets, `s3://` and `gs://`, through fsspec's interface for asynchronous file systems.

`gs://` has not been run against Google's service.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable
from typing import Any, Final

from service.bundle import parse_key
from service.errors import RepositoryError, StartupError
from service.remote.address import Address
from service.remote.store import BLOCK_BYTES, FILES, Interrupted, Listing, RemoteVersion

MAX_OBJECTS: Final = 100_000
"""Those of 20,000 bundles: a folder with more is not a repository."""

_PACKAGES: Final = {"s3": "s3fs", "gs": "gcsfs"}
_CREDENTIALS: Final = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role, with s3:ListBucket and s3:GetObject",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, with storage.objects.list and storage.objects.get",
}


class BucketStore:
    """A folder in a bucket. Credentials come from the environment, as for every client of that service."""

    def __init__(self, address: Address, *, timeout_seconds: float) -> None:
        """`timeout_seconds`: of a listing, and of each block of a file. Raises StartupError without the packages."""
        self._address, self._timeout = address, timeout_seconds
        self._root = f"{address.place}/{address.path}".rstrip("/")
        self._kind = _filesystem_class(address.scheme)
        self._files: Any = None
        self._session: Any = None
        for name in ("botocore", "aiobotocore", "s3fs", "gcsfs", "fsspec"):
            # Their debugging output contains request headers.
            logging.getLogger(name).setLevel(logging.WARNING)

    async def list(self) -> Listing:
        """See Store."""
        try:
            async with asyncio.timeout(self._timeout):
                files = await self._opened()
                bound = {"max_items": MAX_OBJECTS + 1} if self._address.scheme == "s3" else {}
                found: dict[str, dict[str, Any]] = await files._find(self._root, detail=True, **bound)
        except Exception as error:  # of four packages
            if isinstance(error, FileNotFoundError):
                raise RepositoryError(
                    f"there is no {self._address}: create the bucket, or name another one with --repository"
                ) from error
            raise RepositoryError(f"{self._address}: {self._why(error)}") from error
        if len(found) > MAX_OBJECTS:
            raise RepositoryError(f"{self._address} has more than {MAX_OBJECTS} objects: name the folder of the models")
        return self._versions(found)

    async def read(self, path: str, size: int | None, take: Callable[[bytes], None]) -> None:
        """See Store."""
        assert size is not None  # noqa: S101 (every listing of a bucket gives it)
        for start in range(0, size, BLOCK_BYTES):
            end = min(start + BLOCK_BYTES, size)
            try:
                async with asyncio.timeout(self._timeout):
                    files = await self._opened()
                    block: bytes = await files._cat_file(f"{self._root}/{path}", start=start, end=end)
            except Exception as error:  # of four packages
                raise Interrupted(f"{path}: {self._why(error)}") from error
            if len(block) != end - start:
                raise Interrupted(f"{path}: ends after {start + len(block)} of {size} bytes")
            take(block)

    async def close(self) -> None:
        """See Store."""
        if self._session is not None:
            await self._session.close()

    async def _opened(self) -> Any:
        if self._files is None:
            options: dict[str, Any] = {"asynchronous": True, "loop": asyncio.get_running_loop()}
            options |= {"skip_instance_cache": True, "use_listings_cache": False}
            if self._address.scheme == "s3":
                waits = {"connect_timeout": self._timeout, "read_timeout": self._timeout}
                options["config_kwargs"] = {**waits, "retries": {"max_attempts": 1}}
            files = self._kind(**options)
            if hasattr(files, "set_session"):
                self._session = await files.set_session()
            self._files = files
        return self._files

    def _versions(self, found: dict[str, dict[str, Any]]) -> Listing:
        """The versions among the objects; what is not a file of a bundle is ignored, as in a folder."""
        sizes: dict[tuple[str, int], dict[str, int | None]] = {}
        tags: dict[tuple[str, int], list[str]] = {}
        for path, about in sorted(found.items()):
            folder, _, file = path.lstrip("/").removeprefix(f"{self._root}/").rpartition("/")
            key = parse_key(folder)
            if key is not None and file in FILES:
                sizes.setdefault(key, {})[file] = int(about["size"])
                marks = (about.get(mark) for mark in ("ETag", "etag", "generation", "LastModified", "updated"))
                tags.setdefault(key, []).append(f"{file} {about['size']} {[str(mark) for mark in marks if mark]}")
        if not sizes:
            what = f"holds {len(found)} objects, but no bundle" if found else "is empty"
            raise RepositoryError(
                f"{self._address} {what}: name the folder above <name>/<version>/, and upload bundles as they are"
            )
        return {
            key: RemoteVersion(tag=hashlib.sha256("\n".join(tags[key]).encode()).hexdigest(), sizes=sizes[key])
            for key in sizes
        }

    def _why(self, error: Exception) -> str:
        """What happened, in our own words: theirs may repeat what was sent. Clients see it, so it names no bucket."""
        names = {kind.__name__ for kind in type(error).__mro__}
        if isinstance(error, FileNotFoundError):
            return "it has gone"
        if isinstance(error, PermissionError) or names & {"NoCredentialsError", "HttpError"}:
            lacking = "no credentials" if "NoCredentialsError" in names else "access denied"
            return f"{lacking}: set {_CREDENTIALS[self._address.scheme]}"
        if isinstance(error, TimeoutError):
            return f"took longer than {self._timeout:g} s (repository_timeout_seconds)"
        if "FlexibleChecksumError" in names:
            return "it is damaged on its way, or changed while it was read"
        if names & {"ClientPayloadError", "IncompleteReadError", "ResponseStreamingError"}:
            return "the connection ended before the file did"
        return f"cannot be reached ({type(error).__name__})"


def _filesystem_class(scheme: str) -> Any:
    try:
        import fsspec  # noqa: PLC0415 (an extra)

        return fsspec.get_filesystem_class(scheme)
    except ImportError:
        package = "" if scheme == "s3" else f" {_PACKAGES[scheme]}"
        raise StartupError(
            f"a repository at {scheme}:// needs {_PACKAGES[scheme]}: pip install 'stridevit[remote]'{package}"
        ) from None
