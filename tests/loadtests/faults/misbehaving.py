"""A server that answers numbered requests, wrongly where it is told to."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import httptools
import numpy as np

from loadtests.faults.models import expected_outputs
from loadtests.faults.numbers import LABELS


class Question:
    """What httptools found in a request."""

    def __init__(self) -> None:
        self.url, self.headers, self.body, self.whole = b"", dict[str, str](), b"", False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.whole = True


def answer(question: Question, *, shift: int = 0, id_shift: int = 0) -> bytes:
    """The right answer, or that to a number `shift` away, or with the id of a request `id_shift` away."""
    number = int(question.headers["x-request-id"]) + shift
    id_ = str(int(question.headers["x-request-id"]) + id_shift)
    headers = {"X-Request-ID": id_}
    if question.url.startswith(b"/v1"):
        _, probabilities = expected_outputs(np.array([number]))
        classes = [{"index": index, "probability": float(p)} for index, p in enumerate(probabilities[0])]
        body = json.dumps({"results": [{"predictions": classes[::-1]}]}).encode()
    elif "inference-header-content-length" in question.headers:
        logits, _ = expected_outputs(np.array([number, number | 0x400000]))
        head = json.dumps({"id": id_}).encode()
        headers["Inference-Header-Content-Length"] = str(len(head))
        body = head + logits.tobytes()
    else:
        logits, _ = expected_outputs(np.array([number]))
        outputs = [{"name": "logits", "shape": [1, len(LABELS)], "data": logits.ravel().tolist()}]
        body = json.dumps({"id": id_, "outputs": outputs}).encode()
    return encoded(200, headers, body)


def encoded(status: int, headers: dict[str, str], body: bytes = b"") -> bytes:
    """An HTTP answer."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{lines}\r\n".encode() + body


@asynccontextmanager
async def listening(
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """A server of one coroutine per connection; gives its port, and closes all connections at the end."""
    tasks: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        tasks[task] = writer
        with suppress(ConnectionError):
            await handle(reader, writer)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
    for task, writer in tasks.items():
        task.cancel()
        writer.transport.abort()
    await asyncio.gather(*tasks, return_exceptions=True)
    # The client's connections, too, are closed in the loop's next rounds.
    await asyncio.sleep(0.01)


@asynccontextmanager
async def misbehaving(
    behave: Callable[[asyncio.StreamWriter, Question], bytes | None],
) -> AsyncIterator[tuple[int, list[int]]]:
    """A server; `behave` gives what is written, None closes the connection.

    Gives its port, and the number of requests on each of its connections.
    """
    connections: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        place = len(connections)
        connections.append(0)
        while question := await _read(reader):
            connections[place] += 1
            said = behave(writer, question)
            if said is None:
                break
            writer.write(said)
            await writer.drain()
        writer.close()

    async with listening(serve) as port:
        yield port, connections


async def _read(reader: asyncio.StreamReader) -> Question | None:
    """The next request of a connection; None if the client has closed it."""
    question = Question()
    parser = httptools.HttpRequestParser(question)
    while not question.whole:
        if not (data := await reader.read(65_536)):
            return None
        parser.feed_data(data)
    return question
