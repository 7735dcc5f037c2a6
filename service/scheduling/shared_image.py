"""An encoded image for several models that take the same pixels: it is decoded once, for all of them."""

import asyncio

from service.errors import RequestError
from service.manifest import Preprocessing
from service.scheduling.decode_pool import DecodePool
from service.scheduling.outputs import Pixels
from service.scheduling.queue import Entry, Queue
from service.scheduling.request import RequestState


class SharedImage:
    """On the event loop. `close` it once nobody waits for it any more."""

    def __init__(self, decoders: DecodePool, data: bytes, preprocessing: Preprocessing, state: RequestState) -> None:
        """`state`: that of the request as a whole, which ends the decoding once it is over."""
        self.preprocessing = preprocessing
        self._decoders, self._data, self._state = decoders, data, state
        self._work = decoders.work_of([data], preprocessing)
        self._seconds = 0.0
        self._begun: asyncio.Task[None] | None = None
        self.outcome: asyncio.Future[Pixels | RequestError] = asyncio.get_running_loop().create_future()
        """The pixels, or why there are none; never done if no model is accepted."""

    @property
    def decoding(self) -> list[int]:
        """The work of decoding it, for admission: the first model that is accepted accounts for it."""
        return [] if self._begun else self._work

    async def pixels(self, queue: Queue, entry: Entry, work: int) -> Pixels:
        """The pixels for the model of `queue`. `work`: what was accepted for this model as `decoding`, or 0.

        Raises ImageError, or the request's error.
        """
        if self._begun is None:
            self._begun = asyncio.get_running_loop().create_task(self._decode())
        try:
            outcome = await asyncio.shield(self.outcome)
        finally:
            if work:
                queue.backlog.decoded(entry.state, work)
        if isinstance(outcome, RequestError):
            raise outcome
        entry.decode_seconds = self._seconds
        return outcome

    def close(self) -> None:
        """Stop decoding it."""
        if self._begun:
            self._begun.cancel()
        if not self.outcome.cancel() and not self.outcome.cancelled():
            # Nobody else may have retrieved it.
            self.outcome.exception()

    async def _decode(self) -> None:
        try:
            pixels, self._seconds = await self._decoders.pixels(
                self._data, self.preprocessing, self._state, self._work[0]
            )
            self._settle(pixels)
        except RequestError as error:
            # Several tasks raise it: its traceback would collect the frames of all, and keep the image alive.
            self._settle(error.with_traceback(None))
        except Exception as error:  # noqa: BLE001 (it is raised in those who wait)
            if not self.outcome.done():
                self.outcome.set_exception(error)
        finally:
            self._data = b""

    def _settle(self, outcome: Pixels | RequestError) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)
