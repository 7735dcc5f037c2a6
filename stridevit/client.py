"""Clients of a service: `Client` for synchronous code, `AsyncClient` for asyncio. They do the I/O of `calls`."""

import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from types import TracebackType
from typing import Final, Literal, Self, TypeVar, cast

import anyio
import anyio.to_thread
import httpx

from stridevit.answers import Classification, Comparison, Models
from stridevit.calls import DEFAULT_URL, Calls, Deadline, Steps, listed
from stridevit.pictures import Image, Images, all_encoded, encoded

T = TypeVar("T")
Priority = Literal["interactive", "batch"]

_PIECE_BYTES: Final = 64 * 1024
_LIMITS: Final = httpx.Limits(max_connections=None, max_keepalive_connections=None)


class _Upload(httpx.SyncByteStream):
    """A body that ends with the deadline: httpcore's own timeout starts again with every part that is sent."""

    def __init__(self, body: bytes, deadline: Deadline) -> None:
        self._body, self._deadline = body, deadline

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self._body), _PIECE_BYTES):
            if self._deadline.left <= 0:
                raise httpx.WriteTimeout("the deadline passed while the body was sent")
            yield self._body[start : start + _PIECE_BYTES]


class _Download(httpx.SyncByteStream):
    """An answer that ends with the deadline: httpcore's own timeout starts again with every part that arrives."""

    def __init__(self, answer: httpx.SyncByteStream | httpx.AsyncByteStream, deadline: Deadline) -> None:
        self._answer, self._deadline = cast(httpx.SyncByteStream, answer), deadline

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._answer:
            if self._deadline.left <= 0:
                raise httpx.ReadTimeout("the deadline passed while the answer arrived")
            yield piece

    def close(self) -> None:
        self._answer.close()


class Client:
    """A client for synchronous code. Threads may share one. Use it in a `with` statement, or `close` it."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`url`: where the service is, perhaps under a path. `api_key`: by default that of STRIDEVIT_API_KEY.

        `timeout`: seconds within which a call without a deadline ends. `retries`: how often to retry failed connections
        (twice at most), 429 and 503, after the time that the service names.
        """
        self._calls = Calls(url, api_key, timeout, retries, clock)
        self._http = httpx.Client(trust_env=self._calls.trust_env, limits=_LIMITS)
        self._sleep = sleep

    def classify(
        self,
        images: Images,
        *,
        model: str | None = None,
        deadline_ms: float | None = None,
        top_k: int | None = None,
        priority: Priority | None = None,
    ) -> Classification:
        """Classify one or many images in one request: with several, a broken one has its error among the results.

        `model`: a model or a family; for a family, its most accurate model that is in time answers. `deadline_ms`: the
        call ends within it, retries and pauses included; the service keeps what is left of it. Raises StrideViTError.
        """
        deadline = self._calls.deadline(deadline_ms)
        query = {"model": model, "top_k": top_k, "priority": priority}
        return self._run(self._calls.classifying(all_encoded(images), deadline, query))

    def compare(
        self,
        image: Image,
        *,
        models: Sequence[str] | None = None,
        deadline_ms: float | None = None,
        top_k: int | None = None,
    ) -> Comparison:
        """Several models' answers to one image: those of all ready models, or of `models`, which may name families."""
        deadline = self._calls.deadline(deadline_ms)
        query = {"models": listed(models), "top_k": top_k}
        return self._run(self._calls.comparing(encoded(image), deadline, query))

    def models(self) -> Models:
        """All models of the repository, and the families of those that serve. Raises StrideViTError."""
        return self._run(self._calls.listing())

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Return once models take traffic. Raises DeadlineExceeded after `timeout` seconds."""
        self._run(self._calls.becoming_ready(timeout))

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._calls.url!r})"

    def _run(self, steps: Steps[T]) -> T:
        reply: httpx.Response | httpx.TransportError | None = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            reply = None
            if isinstance(step, httpx.Request):
                try:
                    reply = self._answer(step, step.extensions["timeout"])
                except httpx.TransportError as error:
                    reply = error
            else:
                self._sleep(step)

    def _answer(self, request: httpx.Request, deadline: Deadline) -> httpx.Response:
        request.stream = _Upload(request.read(), deadline)
        response = self._http.send(request, stream=True)
        try:
            response.stream = _Download(response.stream, deadline)
            response.read()
        finally:
            response.close()
        return response


class AsyncClient:
    """The same for asyncio. Tasks may share one. Use it in `async with`, or `aclose` it."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        """As `Client`."""
        self._calls = Calls(url, api_key, timeout, retries, clock)
        self._http = httpx.AsyncClient(trust_env=self._calls.trust_env, limits=_LIMITS)
        self._sleep = sleep

    async def classify(
        self,
        images: Images,
        *,
        model: str | None = None,
        deadline_ms: float | None = None,
        top_k: int | None = None,
        priority: Priority | None = None,
    ) -> Classification:
        """As `Client.classify`."""
        deadline = self._calls.deadline(deadline_ms)
        query = {"model": model, "top_k": top_k, "priority": priority}
        bodies = await anyio.to_thread.run_sync(all_encoded, images)
        return await self._run(self._calls.classifying(bodies, deadline, query))

    async def compare(
        self,
        image: Image,
        *,
        models: Sequence[str] | None = None,
        deadline_ms: float | None = None,
        top_k: int | None = None,
    ) -> Comparison:
        """As `Client.compare`."""
        deadline = self._calls.deadline(deadline_ms)
        query = {"models": listed(models), "top_k": top_k}
        body = await anyio.to_thread.run_sync(encoded, image)
        return await self._run(self._calls.comparing(body, deadline, query))

    async def models(self) -> Models:
        """As `Client.models`."""
        return await self._run(self._calls.listing())

    async def wait_ready(self, timeout: float = 60.0) -> None:  # noqa: ASYNC109 (the seconds of its polls)
        """As `Client.wait_ready`."""
        await self._run(self._calls.becoming_ready(timeout))

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"AsyncClient({self._calls.url!r})"

    async def _run(self, steps: Steps[T]) -> T:
        reply: httpx.Response | httpx.TransportError | TimeoutError | None = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            reply = None
            if isinstance(step, httpx.Request):
                try:
                    with anyio.fail_after(step.extensions["timeout"].get("total")):
                        reply = await self._http.send(step)
                except (httpx.TransportError, TimeoutError) as error:
                    reply = error
            else:
                await self._sleep(step)
