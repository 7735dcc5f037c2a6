"""The supervisor: starts the workers and the front, keeps them running, and ends them. It does no inference.

start     the first worker alone: if the service does not start, its log says why; what it takes is measured
          -> memory for the others? -> the others -> the front listens
running   a worker that ends leaves the front's list at once, and is started again after a pause that doubles
SIGHUP    one worker after the other finishes and is replaced
SIGTERM   not ready -> `shutdown_delay_seconds` -> no new connections -> all answered -> workers end -> front ends
"""

import asyncio
import contextlib
import secrets
import signal
import time
from pathlib import Path
from typing import Final

import httpx
import structlog

from service.app import key_file_of
from service.errors import NotReady, StartupError
from service.host import memory_left_bytes
from service.http.server.listening import connections_within_file_limit
from service.http.server.server import EXIT_ABORTED
from service.key_file import entries_of_settings
from service.keys import KeyRing
from service.logs import Logs, leave_at_once
from service.metrics import Metrics
from service.models.packed import clear
from service.settings import Settings
from service.workers.answers import Answers
from service.workers.control import ControlServer, control_app
from service.workers.front import Front
from service.workers.member import Household, Member
from service.workers.memory import described, require_room, taken_by
from service.workers.merge import Totals
from service.workers.pause import Pause
from service.workers.placement import Place
from service.workers.repository import Repository
from service.workers.sums import SharedUsage, Sums

log = structlog.get_logger()

_END_SECONDS: Final = 12.0
"""Time that a worker's threads may take to end, beyond `graceful_timeout_seconds`."""
_TRIES: Final = 2
"""Failed starts of a worker after which a rolling restart goes no further."""
_NOTICE_SECONDS: Final = 0.2
"""Time until the front has read that a worker takes no more traffic: it sees the file change at once."""


class Supervisor:
    """All workers, and what is in front of them."""

    def __init__(self, settings: Settings, logs: Logs, found: list[Place], folder: Path, program: Path | None) -> None:
        self._settings = settings
        token = secrets.token_urlsafe(32)
        house = Household(folder=folder, token=token, settings=settings, workers=len(found), reuse_port=program is None)
        house.make()
        self._house = house
        self.members = [Member(place, house) for place in found]
        self._sums = Sums(house.sums, rows=len(found) + 1, row=len(found))
        self._front = (
            Front(
                program,
                settings,
                folder,
                workers=len(found),
                cores=sum(place.threads for place in found),
                token=token,
                connections=connections_within_file_limit(settings.max_connections),
            )
            if program
            else None
        )
        if self._front:
            self._front.check()
        self._totals = Totals()
        self.repository = Repository(
            lambda: [member for member in self.members if member.ready],
            polls=settings.poll_seconds > 0,
            changed=self._clear_packed,
        )
        self._metrics = Metrics()
        self._metrics.registry.register(logs)
        fixed = entries_of_settings(settings.api_key_hashes, settings.admin_key_hash)
        self._ring = KeyRing(fixed, usage=lambda name: SharedUsage(self._sums, name))
        self._metrics.registry.register(self._ring)
        self._key_file = key_file_of(settings, self._ring, fixed)
        self.answers = Answers(self.members, self._totals, self._front, settings)
        self._serving = self.draining = self._faulty = False
        self._stop: asyncio.Event
        self._rolling: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Serve until a signal; returns the exit status."""
        loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_end, number)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        control = ControlServer(control_app(self, self._settings, ring=self._ring, metrics=self._metrics))
        tasks = [asyncio.create_task(control.answer_at(self._house.folder / "supervisor.sock"))]
        try:
            if status := await self._start():
                return status
            tasks += [asyncio.create_task(self._keep(member)) for member in self.members]
            if self._front:
                tasks.append(asyncio.create_task(self._keep_front(self._front)))
            if self._settings.poll_seconds:
                tasks.append(asyncio.create_task(self._poll()))
            for task in tasks:
                task.add_done_callback(self._on_fault)
            if self._key_file:
                self._key_file.start()
            await self._stop.wait()
            status = await self._end()
            return 1 if self._faulty else status
        finally:
            for task in tasks[1:]:
                task.cancel()
            self._kill()
            if self._front:
                await self._front.stop()
            await asyncio.gather(*(member.ended() for member in self.members))
            control.should_exit = True
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._key_file:
                self._key_file.close()
            self._sums.close()

    async def _start(self) -> int:
        """Start everything; returns the exit status if that failed. Raises StartupError."""
        first, *others = self.members
        if status := await self._bring_up(first):
            log.error("the first worker did not start: what it says is above", exit_status=status)
            return status
        if taken := taken_by(first.pid):
            log.info("memory", **described(len(self.members), taken))
            require_room(len(self.members), taken, memory_left_bytes())
        await asyncio.gather(*(self._bring_up(member) for member in others))
        if self._front:
            self._publish()
            await self._front.start()
        self._serving = True
        log.info(
            "serving",
            host=self._settings.host,
            port=self._settings.port,
            workers={str(member.number): str(member.place) for member in self.members},
            front="envoy" if self._front else "none (SO_REUSEPORT)",
            **self._memory(),
        )
        return 0

    def _memory(self) -> dict[str, int]:
        found = [taken for member in self.members if (taken := taken_by(member.pid))]
        return {
            "resident_mib": sum(taken.resident for taken in found) >> 20,
            "proportional_mib": sum(taken.proportional for taken in found) >> 20,
        }

    async def _bring_up(self, member: Member) -> int:
        """Start a worker's process, and let it take traffic once ready; returns the exit status if it ended before."""
        await member.start()
        if not await member.until_ready():
            return await self._after(member) or 1
        while not member.ready:
            if not member.alive:
                return await self._after(member) or 1
            # On a busy machine, a single answer may come too late.
            with contextlib.suppress(httpx.TransportError):
                async with self.repository.changing:
                    await self.repository.adopt(member)
                    member.begin()
        self._publish()
        log.info("worker ready", worker=member.number, pid=member.pid, place=str(member.place))
        return 0

    async def _keep(self, member: Member) -> None:
        """Replace a worker's process whenever it ends."""
        pause = Pause()
        while True:
            if member.alive:
                status = await self._after(member)
                if self.draining:
                    return
                if member.expected:
                    log.info("worker ended", worker=member.number, exit_status=status)
                else:
                    seconds = pause.after(time.monotonic() - member.ready_since if member.ready_since else 0.0)
                    log.error(
                        "worker died: it is started again",
                        worker=member.number,
                        exit_status=status,
                        seconds=seconds,
                    )
                    await asyncio.sleep(seconds)
            elif self.draining:
                return
            else:
                await asyncio.sleep(pause.after(0.0))
            member.ready_since = 0.0
            if status := await self._bring_up(member):
                log.error("worker did not start", worker=member.number, exit_status=status)

    async def _after(self, member: Member) -> int:
        """Wait for the end of a worker's process, and settle its accounts; returns the exit status."""
        pid = member.pid
        status = await member.ended()
        member.ready = False
        self._publish()
        if not member.expected:
            member.deaths += 1
        self._sums.clear(member.number)
        self._totals.keep(member.settle(), self._house.counts, pid, str(member.number))
        for file in self._house.counts.glob(f"*_{pid}.db"):
            file.unlink(missing_ok=True)
        return status

    def _clear_packed(self) -> None:
        """Remove weights that no worker maps any longer, unless one is being started: it may be about to map them."""
        if all(member.ready for member in self.members):
            clear(self._house.packed, [member.pid for member in self.members])

    def _publish(self) -> None:
        if self._front:
            self._front.publish([member.socket for member in self.members if member.ready])

    async def _keep_front(self, front: Front) -> None:
        """Start the front again whenever it ends."""
        pause = Pause()
        while True:
            began = time.monotonic()
            status = await front.ended()
            if self.draining:
                return
            seconds = pause.after(time.monotonic() - began)
            log.error("the front ended: it is started again", exit_status=status, seconds=seconds)
            await asyncio.sleep(seconds)
            try:
                await front.start()
            except StartupError as error:
                log.error(str(error))

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._settings.poll_seconds)
            try:
                await self.repository.refresh()
            except Exception:  # the service goes on, and the next scan may succeed
                log.exception("scanning the repository failed")

    def _on_fault(self, task: asyncio.Task[None]) -> None:
        """A fault in one of its own tasks: better a new supervisor than one that does not look after everything."""
        if not task.cancelled() and (error := task.exception()):
            log.critical("a fault ends the service", exc_info=error)
            self._faulty = self.draining = True
            self._stop.set()

    def _on_hangup(self) -> None:
        if self._key_file:
            self._key_file.reload()
        for member in self.members:
            if self._settings.keys_file and member.ready:
                member.signal(signal.SIGHUP)
        if self._serving and not self.draining and (self._rolling is None or self._rolling.done()):
            self._rolling = asyncio.create_task(self._roll())

    async def _roll(self) -> None:
        """Replace one worker after the other, each while all others take traffic."""
        log.info("rolling restart", workers=len(self.members))
        before = [member.starts for member in self.members]
        for member, starts in zip(self.members, before, strict=True):
            if not await self._all_ready():
                return
            if member.starts == starts:
                await self._let_go(member)
        if await self._all_ready():
            log.info("rolling restart done")

    async def _all_ready(self) -> bool:
        """Wait until all workers take traffic; returns False if one does not come back, or the service ends."""
        failures = [member.deaths for member in self.members]
        while not await self._all_serve():
            await asyncio.sleep(0.05)
            lost = [m for m, deaths in zip(self.members, failures, strict=True) if m.deaths > deaths + _TRIES]
            if lost:
                log.error("rolling restart given up: a worker does not come back", worker=lost[0].number)
            if lost or self.draining:
                return False
        return True

    async def _all_serve(self) -> bool:
        """Whether all workers take traffic, and the front confirms it."""
        if not all(member.ready for member in self.members):
            return False
        return self._front is None or {member.socket for member in self.members} <= await self._front.healthy()

    async def _let_go(self, member: Member) -> None:
        """Take a worker out of traffic, and let its process end."""
        async with self.repository.changing:
            member.ready = False
        self._publish()
        await asyncio.sleep(_NOTICE_SECONDS)
        await member.read_metrics()
        starts = member.starts
        member.terminate()
        deadline = time.monotonic() + self._settings.graceful_timeout_seconds + _END_SECONDS
        while member.alive and member.starts == starts:
            if time.monotonic() > deadline:
                log.error("worker did not end: killed", worker=member.number)
                member.signal(signal.SIGKILL)
            await asyncio.sleep(0.05)

    def _on_end(self, number: signal.Signals) -> None:
        """The first signal ends the service, the second one the processes."""
        if self._serving and not self.draining:
            self.draining = True
            self._stop.set()
            return
        if self.draining:
            log.error("second signal: ended at once", signal=signal.Signals(number).name)
        self._kill()
        if self._front:
            self._front.kill()
        leave_at_once(128 + number)

    async def _end(self) -> int:
        """Answer what was accepted, then end everything; returns the exit status."""
        settings = self._settings
        log.info("draining", seconds=settings.shutdown_delay_seconds)
        finished = True
        if self._front:
            await self._front.say_goodbye()
            await asyncio.sleep(settings.shutdown_delay_seconds)
            finished = await self._front.finish(settings.graceful_timeout_seconds)
            if not finished:
                log.error(
                    "requests did not finish within graceful_timeout_seconds: aborted",
                    seconds=settings.graceful_timeout_seconds,
                )
        else:
            await asyncio.sleep(settings.shutdown_delay_seconds)
        for member in self.members:
            member.terminate()
        ends = [asyncio.ensure_future(member.ended()) for member in self.members]
        seconds = _END_SECONDS + (0 if not finished else settings.graceful_timeout_seconds)
        _, late = await asyncio.wait(ends, timeout=seconds)
        self._kill()
        statuses = await asyncio.gather(*ends)
        return EXIT_ABORTED if late or not finished else max(statuses)

    def _kill(self) -> None:
        for member in self.members:
            member.expected = True
            member.signal(signal.SIGKILL)

    # What the control application asks.

    def require_alive(self) -> None:
        """Never raises: the supervisor starts again what does not work."""

    def require_ready(self) -> None:
        """Raise NotReady unless a worker takes traffic."""
        if self.draining or not self._serving or not any(member.ready for member in self.members):
            raise NotReady("the service is starting or draining, or no worker is ready: retry")
