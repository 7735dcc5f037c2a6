"""The steady load: numbered requests in every form, on kept and on new connections."""

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

from loadtests.faults.client import Client, Outcome, Unanswered, judge
from loadtests.faults.numbers import FORMS, GUILTY, LIMIT, Form, make_request
from loadtests.generator.rates import poisson_arrivals

IN_FLIGHT = 2000
"""While this many requests are in flight, an arrival of an open loop waits, which counts as part of its latency."""


class Sample(NamedTuple):
    """The outcome of one request. Times are of `time.monotonic`."""

    due_s: float
    latency_ms: float
    """From `due_s` to the end of the answer, or of the attempt."""
    behind_ms: float
    """From `due_s` to the attempt."""
    outcome: Outcome
    status: int
    """0 without an answer."""
    form: Form
    kept: bool
    """Whether it could use a kept connection."""


class Load:
    """Sends requests for one model, and gives a sample of each to `keep`."""

    def __init__(self, client: Client, model: str, *, deadline_ms: float, keep: Callable[[Sample], None]) -> None:
        self._keep = keep
        self._client, self._model, self._deadline_ms = client, model, deadline_ms
        self._numbers = itertools.count(1)
        self._guilty = itertools.count(GUILTY)

    async def open_loop(self, rate: float, until: asyncio.Event, *, seed: str) -> None:
        """Poisson arrivals until the event is set; returns when the last one has ended."""
        begin, room = time.monotonic(), asyncio.Semaphore(IN_FLIGHT)
        running: set[asyncio.Task[None]] = set()

        async def send(due: float) -> None:
            async with room:
                await self.send(due)

        try:
            for after in poisson_arrivals(rate, seed=seed):
                due = begin + after
                try:
                    await asyncio.wait_for(until.wait(), max(0.0, due - time.monotonic()))
                    break
                except TimeoutError:
                    running.add(task := asyncio.create_task(send(due)))
                    task.add_done_callback(running.discard)
            await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def closed_loop(self, connections: int, until: Callable[[], bool]) -> None:
        """On each connection the next request follows the last answer, until `until()` is true."""

        async def work() -> None:
            while not until():
                await self.send(time.monotonic())

        async with asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(work())

    async def send(self, due: float) -> Sample:
        """Send the next request, and see what becomes of it."""
        number = next(self._numbers)
        # Each form is sent on each kind of connection.
        form, kept = FORMS[number % len(FORMS)], number // len(FORMS) % 2 == 0
        request = make_request(form, number % LIMIT, model=self._model, deadline_ms=self._deadline_ms)
        began, status = time.monotonic(), 0
        try:
            reply = await self._client.ask(request.encoded(close=not kept), keep=kept)
            outcome, status = judge(request, reply), reply.status
        except Unanswered as error:
            outcome = error.outcome
        times = (time.monotonic() - due) * 1000, (began - due) * 1000
        sample = Sample(due, *times, outcome, status, form, kept)
        self._keep(sample)
        return sample

    async def send_guilty(self) -> int:
        """Send an image that makes a faulty model fail, unsampled; returns the status of its answer, 0 without one."""
        number = next(self._guilty)
        form = FORMS[number % len(FORMS)]
        request = make_request(form, number, model=self._model, deadline_ms=self._deadline_ms)
        try:
            return (await self._client.ask(request.encoded(close=True), keep=False)).status
        except Unanswered:
            return 0
