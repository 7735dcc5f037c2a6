"""What to send to a service, what its answers mean, and what may be retried. Does no I/O.

A call is a generator. It yields a request to send or seconds to wait, and is sent the outcome. The clients carry these
out, each in its own way.
"""

import errno
import itertools
import json
import os
import random
from collections.abc import Callable, Generator, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeVar

import httpx
from pydantic import ValidationError

from stridevit.answers import (
    Busy,
    Classification,
    Comparison,
    DeadlineExceeded,
    Models,
    Problem,
    Rejected,
    StrideViTError,
    Unreachable,
)

T = TypeVar("T")
DEFAULT_URL: Final = "http://127.0.0.1:8000"
KEY_VARIABLE: Final = "STRIDEVIT_API_KEY"

_CONNECT_RETRIES = 2
"""Where nobody listens, waiting seldom helps."""
_LONGEST_PAUSE_SECONDS = 2.0
_SHORTEST_PAUSE_SECONDS = 0.05
"""A proxy may say `Retry-After: 0` for as long as nothing is behind it."""
_POLL_SECONDS = 0.2
LONGEST_DEADLINE_SECONDS: Final = 24 * 3600
_NOT_READY = frozenset({429, 502, 503, 504})
"""What the service, or a proxy before it, answers while it is not ready."""


class Deadline:
    """When a call must end. It replaces httpx's timeouts: each phase gets what is left when it begins."""

    def __init__(self, seconds: float, clock: Callable[[], float], *, told: bool) -> None:
        """`told`: whether it is sent to the service, which then keeps it, too.

        Raises ValueError beyond a day, as for infinity and NaN.
        """
        if not seconds <= LONGEST_DEADLINE_SECONDS:
            raise ValueError(
                f"a call must have a deadline of at most {LONGEST_DEADLINE_SECONDS:g} s, not {seconds:g} s"
            )
        self._clock, self._ends, self.told, self.seconds = clock, clock() + seconds, told, seconds

    @property
    def left(self) -> float:
        return self._ends - self._clock()

    def get(self, phase: str, default: float | None = None) -> float:  # noqa: ARG002 (httpcore asks like this)
        return max(self.left, 0.001)


Reply = httpx.Response | httpx.TransportError | TimeoutError | None
Steps = Generator[httpx.Request | float, Reply, T]


class Calls:
    """What both clients have in common."""

    def __init__(self, url: str, api_key: str | None, timeout: float, retries: int, clock: Callable[[], float]) -> None:
        form = f"the service's address must look like {DEFAULT_URL}"
        try:
            self._url = httpx.URL(url.rstrip("/"))
        except httpx.InvalidURL as error:  # no ValueError
            raise ValueError(f"{form}: {error}") from error
        if self._url.scheme not in ("http", "https") or not self._url.host:
            raise ValueError(form)
        if self._url.userinfo:
            raise ValueError(f"the service's address must hold no password: give a key as {KEY_VARIABLE} or api_key")
        self.url = str(self._url)
        # A service on this machine is not behind the environment's proxy.
        self.trust_env = self._url.host not in ("localhost", "127.0.0.1", "::1")
        key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE, "")
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise ValueError(  # without the key
                f"the API key ({KEY_VARIABLE} or api_key) has characters that no header can hold: copy it again, "
                "without spaces and line ends"
            )
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout, self._retries, self._clock = timeout, retries, clock

    def deadline(self, deadline_ms: float | None) -> Deadline:
        seconds = self._timeout if deadline_ms is None else deadline_ms / 1000
        return Deadline(seconds, self._clock, told=deadline_ms is not None)

    def classifying(self, images: list[bytes], deadline: Deadline, query: dict[str, Any]) -> Steps[Classification]:
        body: dict[str, Any] = {"content": images[0]} if len(images) == 1 else {"files": [("image", i) for i in images]}
        answer = yield from self._asking("POST", "/v1/classify", deadline, query, **body)
        return _read(answer, lambda: Classification.model_validate_json(answer.content))

    def comparing(self, image: bytes, deadline: Deadline, query: dict[str, Any]) -> Steps[Comparison]:
        answer = yield from self._asking("POST", "/v1/compare", deadline, query, content=image)
        return _read(answer, lambda: Comparison.of([json.loads(line) for line in answer.iter_lines()]))

    def listing(self) -> Steps[Models]:
        answer = yield from self._asking("GET", "/v1/models", self.deadline(None), {})
        return _read(answer, lambda: Models.model_validate_json(answer.content))

    def becoming_ready(self, timeout: float) -> Steps[None]:
        deadline = Deadline(timeout, self._clock, told=False)
        while True:
            reply = yield self._request("GET", "/readyz", deadline, {})
            if isinstance(reply, httpx.Response) and reply.is_success:
                return
            error = self._error(reply, deadline)
            if not isinstance(error, Unreachable) and error.status not in (None, *_NOT_READY):
                raise error
            if deadline.left <= _POLL_SECONDS:
                problem = Problem(detail=f"not ready within {timeout:g} s: {error.detail}", code="deadline-exceeded")
                raise DeadlineExceeded(problem) from error
            yield _POLL_SECONDS

    def _asking(
        self, method: str, path: str, deadline: Deadline, query: dict[str, Any], **body: Any
    ) -> Steps[httpx.Response]:
        """The answer to a request, which is retried if nothing was done and the deadline allows it."""
        for attempt in itertools.count():
            if deadline.left <= 0:
                raise self._error(TimeoutError(), deadline)
            reply = yield self._request(method, path, deadline, query, **body)
            if isinstance(reply, httpx.Response) and reply.is_success:
                return reply
            error = self._error(reply, deadline)
            seconds = self._pause(error, attempt, deadline)
            if seconds is None:
                raise error
            yield seconds
        raise AssertionError  # never: the loop has no end of its own

    def _request(self, method: str, path: str, deadline: Deadline, query: dict[str, Any], **body: Any) -> httpx.Request:
        asked = {name: value for name, value in query.items() if value is not None}
        if deadline.told:
            asked["deadline_ms"] = f"{max(deadline.left * 1000, 0.001):.3f}"
        url = self._url.copy_with(path=self._url.path.rstrip("/") + path, params=asked)
        # Without it, a service may take a picture file that holds text for a request in JSON.
        kind = {"Content-Type": "application/octet-stream"} if "content" in body else {}
        return httpx.Request(method, url, headers=self._headers | kind, extensions={"timeout": deadline}, **body)

    def _pause(self, error: StrideViTError, attempt: int, deadline: Deadline) -> float | None:
        """Seconds to wait before the next try; None if there is none."""
        connects = isinstance(error, Unreachable) and isinstance(error.__cause__, httpx.ConnectError)
        if not connects and not isinstance(error, Busy):
            return None
        if attempt >= (min(self._retries, _CONNECT_RETRIES) if connects else self._retries):
            return None
        # Clients that were refused at the same moment should not all retry at the same moment.
        if error.retry_after_ms is not None:
            seconds = pause_as_told(error.retry_after_ms)
        else:
            seconds = min(_LONGEST_PAUSE_SECONDS, 0.1 * 2**attempt) * random.uniform(0.5, 1.0)  # noqa: S311
        return seconds if seconds < deadline.left else None

    def _error(self, reply: Reply, deadline: Deadline) -> StrideViTError:
        """The error that came in place of an answer."""
        if isinstance(reply, httpx.Response):
            return _answered(reply)
        error: StrideViTError
        if isinstance(reply, httpx.TimeoutException | TimeoutError):
            detail = f"no answer from {self.url} within {deadline.seconds * 1000:g} ms"
            error = DeadlineExceeded(Problem(detail=detail, code="deadline-exceeded"))
        else:
            error = Unreachable(Problem(detail=self._unreachable(reply), code="unreachable"))
        error.__cause__ = reply
        return error

    def _unreachable(self, reply: httpx.TransportError | None) -> str:
        """Why there was no connection, or why it broke, and what to do."""
        if _no_files_left(reply):
            return (
                f"no connection to {self.url}: this process has too many files open. Raise its limit with ulimit -n, "
                "or make fewer calls at once (--at-once)"
            )
        reason = str(reply) or type(reply).__name__
        if isinstance(reply, httpx.ConnectError):
            return (
                f"no service answers at {self.url}: {reason}. Start one with `stridevit serve`, or give its address "
                "with --url or Client(url)"
            )
        return (
            f"the connection to {self.url} broke: {reason}. See in the service's log whether it ended, then call again"
        )


def listed(models: str | Sequence[str] | None) -> str | None:
    """Names as the query has them: one alone is a name, too, and not a sequence of letters."""
    if models is None or isinstance(models, str):
        return models
    return ",".join(models) or None


def pause_as_told(retry_after_ms: float) -> float:
    """Seconds to wait when told to: never none, and a little more by chance, so that not all come back together."""
    return max(_SHORTEST_PAUSE_SECONDS, retry_after_ms / 1000) * random.uniform(1.0, 1.1)  # noqa: S311


def _no_files_left(error: BaseException | None) -> bool:
    """Whether the limit of open files is behind an error."""
    while error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            return True
        error = error.__cause__ or error.__context__
    return False


def _answered(response: httpx.Response) -> StrideViTError:
    """The error in an answer, which may be a proxy's."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        text = " ".join(response.text.split())[:200]
        detail = f"{response.status_code} {response.reason_phrase}: {text}"
        problem = Problem(detail=detail, code=f"http-{response.status_code}")
    if problem.retry_after_ms is None:
        problem = problem.model_copy(update={"retry_after_ms": _retry_after_ms(response)})
    problem = problem.model_copy(update={"status": response.status_code})
    if response.status_code == 401:
        problem = problem.model_copy(update={"detail": f"{problem.detail}; keys come from {KEY_VARIABLE} or api_key"})
    kinds: dict[int, type[StrideViTError]] = {429: Busy, 503: Busy, 504: DeadlineExceeded}
    return kinds.get(response.status_code, Rejected)(problem)


def _retry_after_ms(response: httpx.Response) -> int | None:
    """What `Retry-After` says: seconds, or a date, which is compared with the answer's own. None if it says nothing."""
    told = response.headers.get("Retry-After", "")
    if told.isdecimal():
        return int(told) * 1000
    try:
        pause = parsedate_to_datetime(told) - parsedate_to_datetime(response.headers.get("Date", ""))
    except (TypeError, ValueError):  # no date, or one without a zone
        return None
    return round(pause.total_seconds() * 1000)


def _read(response: httpx.Response, read: Callable[[], T]) -> T:
    try:
        return read()
    except ValueError as error:
        detail = f"{response.url.copy_with(query=None)} does not answer as StrideViT does: {error}"
        raise Rejected(Problem(detail=detail, code="malformed", status=response.status_code)) from error
