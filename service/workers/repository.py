"""The models of all workers: loaded, unloaded and polled in all of them, or in none."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx
import structlog

from service.errors import BadRequest, NotReady, RequestError
from service.workers.inside import Restore
from service.workers.member import Index, Member, ready_versions

log = structlog.get_logger()

_Change = Callable[[Member], Awaitable[Index]]


class Repository:
    """The models of all workers. One change at a time."""

    def __init__(
        self, members: Callable[[], Sequence[Member]], *, polls: bool, changed: Callable[[], None] = lambda: None
    ) -> None:
        """`members`: those that take traffic. `polls`: whether the repository is scanned from time to time. `changed`
        is called after each change."""
        self._members, self._polls, self._changed = members, polls, changed
        self._wanted: dict[str, list[int]] = {}
        """The versions that serve, by model, since the last change."""
        self._unloaded: set[str] = set()
        self.changing = asyncio.Lock()
        """Must be held to let a worker begin."""

    async def load(self, name: str) -> None:
        """Load a model's newest version in all workers. Raises RequestError; then each serves what it served."""
        async with self.changing:
            await self._all_or_none(name, lambda member: member.load(name))
            self._unloaded.discard(name)
            self._changed()

    async def unload(self, name: str) -> None:
        """Take a model out of service in all workers. Raises RequestError; then each serves what it served."""
        async with self.changing:
            await self._all_or_none(name, lambda member: member.unload(name))
            self._unloaded.add(name)
            self._changed()

    async def refresh(self) -> None:
        """Scan the repository in all workers at the same time, so that they differ no longer than a load takes."""
        async with self.changing:
            members = self._members()
            found = await asyncio.gather(*(member.refresh() for member in members), return_exceptions=True)
            for member, outcome in zip(members, found, strict=True):
                if isinstance(outcome, BaseException):
                    log.error("scanning the repository failed", worker=member.number, reason=str(outcome))
            indexes = [outcome for outcome in found if not isinstance(outcome, BaseException)]
            if indexes:
                self._wanted = ready_versions(indexes[0])
            self._changed()

    async def index(self) -> list[dict[str, Any]]:
        """Every version, in the state that it has in all workers; if they differ, the reason gives each one's state.

        Raises NotReady if no worker answers.
        """
        members = self._members()
        found = await asyncio.gather(*(member.index() for member in members), return_exceptions=True)
        indexes = {
            member.number: index
            for member, index in zip(members, found, strict=True)
            if not isinstance(index, BaseException)
        }
        if not indexes:
            raise NotReady("no worker answers: retry")
        return _merged(indexes)

    async def adopt(self, member: Member) -> None:
        """Let a worker that has just started serve what the others serve. To be called with `changing` held."""
        index = await member.index()
        if not self._wanted:
            self._wanted = ready_versions(index)
            return
        serves = ready_versions(index)
        wanted: dict[str, list[int]] = {name: [] for name in self._unloaded}
        if not self._polls:
            # Otherwise the others may not have seen yet what it has loaded.
            wanted = {**{name: [] for name in serves}, **self._wanted}
        wishes = [
            Restore(name=name, versions=list(versions))
            for name, versions in wanted.items()
            if sorted(serves.get(name, [])) != sorted(versions)
        ]
        if wishes:
            try:
                await member.restore(wishes)
            except RequestError as error:
                log.error("a worker serves other versions than the others", worker=member.number, reason=str(error))

    async def _all_or_none(self, name: str, change: _Change) -> None:
        members = self._members()
        if not members:
            raise NotReady("no worker is ready: retry")
        first, *others = members
        try:
            before = {member: ready_versions(await member.index()).get(name, []) for member in members}
            # A broken bundle fails here, and no other worker has to go back.
            index = await change(first)
        except httpx.TransportError as error:
            raise NotReady("a worker ended, or did not answer in time: nothing has changed, retry") from error
        outcomes = await asyncio.gather(*(change(member) for member in others), return_exceptions=True)
        failed = [
            (member, outcome)
            for member, outcome in zip(others, outcomes, strict=True)
            # A worker that died meanwhile starts again with what the others serve.
            if isinstance(outcome, BaseException)
            and not (isinstance(outcome, httpx.TransportError) and not member.alive)
        ]
        if failed:
            changed = [member for member in members if member not in {failing for failing, _ in failed}]
            await self._go_back(name, changed, before)
            cause = failed[0][1]
            where = ", ".join(f"worker {failing.number}" for failing, _ in failed)
            reason = str(cause) or type(cause).__name__
            text = f"{where}: {reason}; the other workers serve what they served before"
            raise (type(cause)(text) if isinstance(cause, (NotReady, BadRequest)) else BadRequest(text))
        self._wanted = ready_versions(index)

    async def _go_back(self, name: str, members: Sequence[Member], before: dict[Member, list[int]]) -> None:
        restored = await asyncio.gather(
            *(member.restore([Restore(name=name, versions=before[member], withdraw=True)]) for member in members),
            return_exceptions=True,
        )
        for member, outcome in zip(members, restored, strict=True):
            if isinstance(outcome, BaseException):
                log.error("going back failed", worker=member.number, model=name, reason=str(outcome))


def _merged(indexes: dict[int, Index]) -> list[dict[str, Any]]:
    found: dict[tuple[str, int | None], dict[int, dict[str, Any]]] = {}
    for number, index in indexes.items():
        for entry in index:
            found.setdefault((entry["name"], entry["version"]), {})[number] = entry
    merged = []
    for (name, version), entries in sorted(found.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        states = {entry["state"] for entry in entries.values()}
        if len(states) == 1 and len(entries) == len(indexes):
            state, reason = states.pop(), next((e["reason"] for e in entries.values() if e["reason"]), "")
        else:
            state = next((s for s in ("loading", "unloading", "unavailable") if s in states), "loading")
            reason = "; ".join(
                f"worker {number}: {entries[number]['state']}"
                + (f" ({entries[number]['reason']})" if entries[number]["reason"] else "")
                if number in entries
                else f"worker {number}: not there"
                for number in indexes
            )
        merged.append({"name": name, "version": version, "state": state, "reason": reason})
    return merged
