"""One worker as the supervisor sees it: a place, and the process that runs there now."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from service.errors import BadRequest, NotReady, RequestError, UnknownModel
from service.settings import Settings
from service.workers.inside import Restore, client_of, dumps
from service.workers.placement import Place
from service.workers.worker import Orders

_POLL_SECONDS: Final = 0.1
_ASK_SECONDS: Final = 5.0
_KINDS: Final[dict[str, Callable[[str], RequestError]]] = {"UnknownModel": UnknownModel, "NotReady": NotReady}
Index = list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Household:
    """What all workers have in common."""

    folder: Path
    token: str
    settings: Settings
    workers: int
    reuse_port: bool

    @property
    def counts(self) -> Path:
        """Where workers keep their counts, in files that outlive them."""
        return self.folder / "counts"

    @property
    def sums(self) -> Path:
        """The file with what all workers hold."""
        return self.folder / "sums"

    @property
    def packed(self) -> Path:
        """Where workers share packed weights."""
        return self.folder / "packed"

    def make(self) -> None:
        """Make the folders."""
        self.counts.mkdir()
        self.packed.mkdir()


class Member:
    """A worker. Its process may be replaced many times."""

    def __init__(self, place: Place, household: Household) -> None:
        self.place, self._household = place, household
        self.number = place.number
        self.ready = False
        """Whether it takes traffic."""
        self.ready_since = 0.0
        self.expected = False
        """Whether it ends because it was asked to."""
        self.starts = 0
        self.deaths = 0
        """Times that it ended without being asked."""
        self.failures = 0
        """Such ends in a row."""
        self.metrics = ""
        """As its process last gave them; empty once they are settled."""
        self.settled = True
        """Whether the process has ended, and what it counted is kept elsewhere."""
        self._process: asyncio.subprocess.Process | None = None
        self._client: httpx.AsyncClient | None = None

    @property
    def pid(self) -> int:
        """The id of its process; 0 before the first."""
        return self._process.pid if self._process else 0

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process is not None and self._process.returncode is None

    @property
    def socket(self) -> Path:
        """Where its process listens. Each process has its own, so that none is mistaken for the one before."""
        return self._household.folder / f"w{self.number}-{self.starts}.sock"

    async def start(self) -> None:
        """Start a process."""
        self.starts += 1
        self.ready = self.expected = self.settled = False
        orders = self._orders()
        file = self._household.folder / f"w{self.number}.json"
        # The folder is private: the file holds the hashes of keys.
        file.write_text(orders.model_dump_json(), encoding="utf-8")
        # In a session of its own: Ctrl-C reaches only the supervisor.
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "service.workers.worker", str(file)),
            env={
                **os.environ,
                **self.place.environment,
                "PROMETHEUS_MULTIPROC_DIR": str(self._household.counts),
                # The package that runs here, wherever the service was started.
                "PYTHONPATH": os.pathsep.join(filter(None, (_HOME, os.environ.get("PYTHONPATH")))),
            },
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        self._client = client_of(self.socket, seconds=_ASK_SECONDS, token=self._household.token)

    def _orders(self) -> Orders:
        house, settings = self._household, self._household.settings
        values = json.loads(settings.model_dump_json(exclude={"config", "workers", "memory_bytes"}))
        values |= {
            "device": self.place.device,
            "threads": self.place.threads,
            "decode_threads": settings.decode_threads and max(1, settings.decode_threads // house.workers),
            "memory_bytes": settings.memory_bytes // house.workers,
            # The supervisor does both, for all workers at once.
            "poll_seconds": 0,
            "shutdown_delay_seconds": 0,
        }
        return Orders(
            number=self.number,
            workers=house.workers,
            supervisor=os.getpid(),
            socket=self.socket,
            supervisor_socket=house.folder / "supervisor.sock",
            sums=house.sums,
            packed=house.packed,
            token=house.token,
            cores=self.place.cores,
            reuse_port=house.reuse_port,
            settings=values,
        )

    async def until_ready(self) -> bool:
        """Wait until its models are loaded; returns False if it ended before."""
        while self.alive:
            with contextlib.suppress(httpx.TransportError):
                if (await self._ask("GET", "ready")).status_code == 200:
                    return True
            await asyncio.sleep(_POLL_SECONDS)
        return False

    async def ended(self) -> int:
        """Wait for the end of its process; returns the exit status, as a shell gives it."""
        if self._process is None:
            return 0
        status = await self._process.wait()
        if self._client:
            await self._client.aclose()
        with contextlib.suppress(OSError):
            self.socket.unlink()
        return 128 - status if status < 0 else status

    def begin(self) -> None:
        """It takes traffic from now on."""
        self.ready, self.ready_since = True, time.monotonic()

    def signal(self, number: signal.Signals) -> None:
        """Send its process a signal, if it runs."""
        if self._process and self.alive:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def terminate(self) -> None:
        """Let it finish what it accepted, then end."""
        self.expected = True
        self.signal(signal.SIGTERM)

    async def read_metrics(self) -> None:
        """Read its metrics; if it does not answer, the last ones stay."""
        starts = self.starts
        with contextlib.suppress(httpx.TransportError):
            answer = await self._ask("GET", "metrics")
            # What has been settled meanwhile must not count twice.
            if answer.status_code == 200 and starts == self.starts and not self.settled:
                self.metrics = answer.text

    def settle(self) -> str:
        """The last metrics of a process that has ended; they are cleared here."""
        last, self.metrics, self.settled = self.metrics, "", True
        return last

    async def status(self) -> str | None:
        """Its report as JSON; None if it does not answer."""
        with contextlib.suppress(httpx.TransportError):
            answer = await self._ask("GET", "status")
            if answer.status_code == 200:
                return answer.text
        return None

    async def index(self) -> Index:
        """Its index of models. Raises httpx.TransportError or RequestError, like the methods below."""
        return await self._change("index", method="GET", seconds=_ASK_SECONDS)

    async def load(self, name: str) -> Index:
        """Load a model there; returns the index afterwards."""
        return await self._change("load", name=name)

    async def unload(self, name: str) -> Index:
        """Take a model out of service there; returns the index afterwards."""
        return await self._change("unload", name=name)

    async def refresh(self) -> Index:
        """Scan the repository there; returns the index afterwards."""
        return await self._change("refresh")

    async def restore(self, wishes: list[Restore]) -> Index:
        """Serve these versions there; returns the index afterwards."""
        return await self._change("restore", content=dumps(wishes))

    async def _change(
        self, path: str, *, method: str = "POST", seconds: float | None = None, content: bytes = b"", **query: str
    ) -> Index:
        answer = await self._ask(method, path, seconds=seconds, content=content, query=query)
        found = answer.json()
        if answer.status_code == 200:
            index: Index = found
            return index
        raise _KINDS.get(found.get("kind", ""), BadRequest)(found.get("error", answer.text))

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        seconds: float | None = _ASK_SECONDS,
        content: bytes = b"",
        query: dict[str, str] | None = None,
    ) -> httpx.Response:
        if self._client is None or self._client.is_closed:
            raise httpx.ConnectError("it does not run")
        return await self._client.request(
            method, f"/internal/{path}", params=query, content=content, timeout=httpx.Timeout(seconds)
        )


_HOME: Final = str(Path(__file__).parents[2])


def ready_versions(index: Index) -> dict[str, list[int]]:
    """The versions that serve, by model."""
    found: dict[str, list[int]] = {}
    for entry in index:
        if entry["state"] == "ready":
            found.setdefault(entry["name"], []).append(entry["version"])
    return found
