"""A closed loop of requests at little cost: so many connections, each sends its next request once the last is answered.

A request fails if it gets no complete answer, or another status than 200.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Outcome:
    """What became of the requests."""

    statuses: Counter[str] = field(default_factory=Counter)
    """By status, or by what went wrong."""
    seconds: list[float] = field(default_factory=list)

    @property
    def sent(self) -> int:
        """All requests."""
        return sum(self.statuses.values())

    @property
    def failed(self) -> int:
        """Those without an answer of 200."""
        return self.sent - self.statuses["200"]


def encoded(body: bytes, *, path: str = "/v1/classify", headers: Sequence[str] = ()) -> bytes:
    """A POST as it is sent."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


class ClosedLoop:
    """Sends `requests` in turn from so many connections, until told to stop or `most` were sent."""

    def __init__(self, port: int, requests: Sequence[bytes], *, connections: int, most: int, host: str = "127.0.0.1"):
        self._host, self._port, self._connections = host, port, connections
        self._requests: Iterator[bytes] = itertools.islice(itertools.cycle(requests), most)
        self._stopped = False
        self.outcome = Outcome()

    def stop(self) -> None:
        """Send no more."""
        self._stopped = True

    async def run(self) -> Outcome:
        """Send, and wait for all answers."""
        await asyncio.gather(*(self._one() for _ in range(self._connections)))
        return self.outcome

    async def _one(self) -> None:
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        loop = asyncio.get_running_loop()
        while not self._stopped and (request := next(self._requests, None)) is not None:
            if streams and streams[0].at_eof():
                streams[1].close()
                streams = None
            began = loop.time()
            try:
                streams = streams or await asyncio.open_connection(self._host, self._port)
                status, keeps = await _exchange(*streams, request)
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                status, keeps = f"{type(error).__name__}", False
            self.outcome.statuses[status] += 1
            self.outcome.seconds.append(loop.time() - began)
            if not keeps and streams:
                streams[1].close()
                streams = None
        if streams:
            streams[1].close()


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[str, bool]:
    """The status of the answer, and whether the connection stays open."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
    await reader.readexactly(int(length))
    return head.split(b" ", 2)[1].decode(), b"\r\nconnection: close" not in head
