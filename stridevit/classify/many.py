"""Many images, each in a request of its own, as many at once as the service takes."""

import errno
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio

from stridevit.answers import Busy, Classification, DeadlineExceeded, Problem, StrideViTError
from stridevit.calls import pause_as_told
from stridevit.client import AsyncClient, Priority

OF_THE_IMAGE: Final = frozenset(
    {"bad-request", "bad-image", "unsupported-image", "too-many-pixels", "body-too-large", "model-fault"}
)
"""Codes of errors that a retry would repeat, and that say nothing about the other images."""
_PATIENCE_SECONDS = 30.0
"""How long an image may be refused before the run ends, if no deadline says it."""
_PAUSE_MS = 500.0
_OF_THIS_PROCESS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Errors in reading a file that say nothing about the file."""


@dataclass(frozen=True, eq=False)
class Source:
    """An image to classify."""

    name: str
    content: Path | bytes | OSError
    """An error if it could not even be looked for."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What is asked for each image."""

    model: str | None
    deadline_ms: float | None
    whole: bool
    """Whether the deadline holds for an image with all its tries and pauses, or for each try."""
    top_k: int
    priority: Priority | None


@dataclass(frozen=True)
class Outcome:
    """The outcome of an image: an answer, or a problem."""

    source: Source
    answer: Classification | None = None
    problem: Problem | None = None

    @property
    def final(self) -> bool:
        """Whether another run would give the same outcome."""
        return self.problem is None or self.problem.code in OF_THE_IMAGE or self.problem.code == "unreadable"


class Window:
    """How many requests may be in work, found as TCP does: more while they are answered, half when one is refused."""

    def __init__(self, most: int) -> None:
        self._most, self._size, self._doubling = most, float(min(2, most)), True
        self.epoch = 0
        """Changes when the window shrinks: refusals of requests sent before that say nothing new."""
        self.places = anyio.CapacityLimiter(int(self._size))

    def answered(self) -> None:
        """A request was answered; a whole window of answers widens the window by one, or at first doubles it."""
        self._resize(self._size + (1.0 if self._doubling else 1.0 / self._size))

    def refused(self, epoch: int) -> None:
        """A request that was sent in `epoch` was refused."""
        if epoch == self.epoch:
            self.epoch, self._doubling = self.epoch + 1, False
            self._resize(self._size / 2)

    def _resize(self, size: float) -> None:
        self._size = max(1.0, min(size, float(self._most)))
        self.places.total_tokens = int(self._size)


async def classify_all(
    client: AsyncClient,
    sources: Sequence[Source],
    wishes: Wishes,
    *,
    most: int,
    report: Callable[[Outcome], None],
    clock: Callable[[], float] = anyio.current_time,
    sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
) -> None:
    """Classify all `sources`, at most `most` at once, and `report` each as it is done.

    `client` must not retry by itself. Raises StrideViTError for what concerns all images: no service, a wrong key, an
    unknown model, or a service that refuses an image for half a minute; it names the image. Raises OSError if this
    process has no files or memory left, and what `report` raises.
    """
    window = Window(most)

    async def one(source: Source) -> None:
        try:
            report(await _classified(client, source, wishes, window, clock, sleep))
        except StrideViTError as error:
            detail = f"{source.name}: {error.detail}"
            raise type(error)(error.problem.model_copy(update={"detail": detail})) from error
        finally:
            window.places.release_on_behalf_of(source)

    try:
        async with anyio.create_task_group() as group:
            for source in sources:
                await window.places.acquire_on_behalf_of(source)
                group.start_soon(one, source)
    except* (StrideViTError, OSError) as errors:
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


async def _classified(
    client: AsyncClient,
    source: Source,
    wishes: Wishes,
    window: Window,
    clock: Callable[[], float],
    sleep: Callable[[float], Awaitable[None]],
) -> Outcome:
    if isinstance(source.content, OSError):
        return _unreadable(source, source.content)
    whole_ms = wishes.deadline_ms if wishes.whole else None
    ends = clock() + (_PATIENCE_SECONDS if whole_ms is None else whole_ms / 1000)
    while True:
        epoch = window.epoch
        try:
            answer = await client.classify(
                source.content,
                model=wishes.model,
                deadline_ms=wishes.deadline_ms if whole_ms is None else round(1000 * (ends - clock()), 1),
                top_k=wishes.top_k,
                priority=wishes.priority,
            )
        except OSError as error:
            if error.errno in _OF_THIS_PROCESS:
                raise
            return _unreadable(source, error)
        except Busy as error:
            window.refused(epoch)
            seconds = pause_as_told(_PAUSE_MS if error.retry_after_ms is None else error.retry_after_ms)
            if clock() + seconds >= ends:
                if whole_ms is None:
                    raise
                return Outcome(source, problem=error.problem)
            await sleep(seconds)
        except DeadlineExceeded as error:
            window.refused(epoch)
            return Outcome(source, problem=error.problem)
        except StrideViTError as error:
            if error.code not in OF_THE_IMAGE:
                raise
            window.answered()
            return Outcome(source, problem=error.problem)
        else:
            window.answered()
            return Outcome(source, answer=answer)


def _unreadable(source: Source, error: OSError) -> Outcome:
    return Outcome(source, problem=Problem(detail=f"{error.strerror or error}", code="unreadable"))
