"""A static web server, `https://`: `index.json` lists the versions, see `service.remote.web_index`."""

import asyncio
import base64
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import httpx

from service.errors import BundleError, RepositoryError
from service.remote.address import Address
from service.remote.store import BLOCK_BYTES, FILES, Interrupted, Listing, RemoteVersion
from service.remote.web_index import INDEX_FILE, MAX_INDEX_BYTES, parse_index

_MAX_REDIRECTS: Final = 5


class WebStore:
    """A folder of a web server. Proxies and certificates come from the environment, as for every client of httpx."""

    def __init__(self, address: Address, *, timeout_seconds: float) -> None:
        """`timeout_seconds`: time limit for an answer, for the index, and for each block of a file."""
        self._address, self._timeout = address, timeout_seconds
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "stridevit"}
        if address.user:
            secret = base64.b64encode(f"{address.user}:{address.password}".encode()).decode("ascii")
            self._headers["Authorization"] = f"Basic {secret}"
        self._client: httpx.AsyncClient | None = None
        self._known: Listing = {}
        self._validators: dict[str, str] = {}
        for name in ("httpx", "httpcore"):
            logging.getLogger(name).setLevel(logging.WARNING)

    async def list(self) -> Listing:
        """See Store. An index that has not changed is not sent again."""
        try:
            async with asyncio.timeout(self._timeout), self._answer(INDEX_FILE, self._validators) as answer:
                if answer.status_code == httpx.codes.NOT_MODIFIED:
                    return self._known
                self._require_ok(answer)
                text = b"".join([piece async for piece in _pieces(answer, MAX_INDEX_BYTES)])
        except (httpx.HTTPError, TimeoutError) as error:
            raise RepositoryError(f"{self._address} cannot be reached ({self._why(error)})") from error
        except BundleError as error:
            raise RepositoryError(f"{self._address}: {INDEX_FILE}: {error}") from error
        try:
            digests = parse_index(text)
        except ValueError as error:
            raise RepositoryError(f"{self._address}: {error}") from error
        if not digests:
            raise RepositoryError(f"{self._address} is empty: its {INDEX_FILE} lists no bundle")
        self._known = {
            key: RemoteVersion(tag=digest, sizes=dict.fromkeys(FILES), sums_digest=digest)
            for key, digest in digests.items()
        }
        conditions = {"etag": "If-None-Match", "last-modified": "If-Modified-Since"}
        self._validators = {conditions[name]: answer.headers[name] for name in conditions if name in answer.headers}
        return self._known

    async def read(self, path: str, size: int | None, take: Callable[[bytes], None]) -> None:  # noqa: ARG002
        """See Store."""
        try:
            async with asyncio.timeout(self._timeout) as limit, self._answer(path, {}) as answer:
                self._require_ok(answer)
                received = 0
                async for piece in _pieces(answer, None):
                    if received // BLOCK_BYTES != (received + len(piece)) // BLOCK_BYTES:
                        limit.reschedule(asyncio.get_running_loop().time() + self._timeout)
                    received += len(piece)
                    take(piece)
        except (httpx.HTTPError, TimeoutError) as error:
            raise Interrupted(f"{path}: {self._why(error)}") from error
        except BundleError as error:
            raise type(error)(f"{path}: {error}") from error

    async def close(self) -> None:
        """See Store."""
        if self._client is not None:
            await self._client.aclose()

    @asynccontextmanager
    async def _answer(self, path: str, headers: dict[str, str]) -> AsyncIterator[httpx.Response]:
        """The answer to a GET, after redirects to https:// only. Raises httpx.HTTPError or BundleError."""
        if self._client is None:
            self._client = httpx.AsyncClient(timeout=self._timeout, follow_redirects=False)
        request = self._client.build_request("GET", f"{self._address.url}/{path}", headers={**self._headers, **headers})
        for _ in range(_MAX_REDIRECTS + 1):
            answer = await self._client.send(request, stream=True)
            try:
                if answer.next_request is None:
                    yield answer
                    return
                # httpx drops the credentials if it leads to another host.
                request = answer.next_request
                if request.url.scheme != "https":
                    raise BundleError("is redirected to an address that is not https://")
            finally:
                await answer.aclose()
        raise BundleError(f"is redirected more than {_MAX_REDIRECTS} times")

    def _require_ok(self, answer: httpx.Response) -> None:
        """Raises BundleError, as Interrupted if the error may be temporary."""
        status = answer.status_code
        if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise BundleError(f"access denied ({status}): give https://USER:PASSWORD@HOST in STRIDEVIT_REPOSITORY")
        if status == httpx.codes.NOT_FOUND:
            raise BundleError(
                "there is none (404): upload bundles as they are, then the file that `stridevit export index` writes"
            )
        if status != httpx.codes.OK:
            raise Interrupted(f"the server answers {status}")
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise BundleError("the server compresses it: switch that off for this folder")

    def _why(self, error: Exception) -> str:
        if isinstance(error, TimeoutError | httpx.TimeoutException):
            return f"took longer than {self._timeout:g} s (repository_timeout_seconds)"
        if isinstance(error, httpx.ConnectError):
            return str(error) or "no connection"
        if isinstance(error, httpx.RemoteProtocolError):
            return "the connection ended before the file did"
        return type(error).__name__


async def _pieces(answer: httpx.Response, max_bytes: int | None) -> AsyncIterator[bytes]:
    received = 0
    async for piece in answer.aiter_raw():
        received += len(piece)
        if max_bytes is not None and received > max_bytes:
            raise BundleError(f"exceeds {max_bytes} bytes")
        yield piece
