"""`python -m loadtests.faults.attacks NAME PORT`: clients that behave badly, until the process is ended.

They run apart from the steady load, so that they do not disturb its timing. What is printed at the end becomes a note.
"""

import asyncio
import gzip
import io
import itertools
import signal
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
from PIL import Image

from loadtests.faults.client import Client, Unanswered
from loadtests.faults.hostile_images import hostile_images

HOST = "127.0.0.1"
_FOREVER = 3600.0
_PATIENCE_SECONDS = 60.0
_CHUNK = 1 << 16
_LARGE_BODY = 32 * 2**20
"""The service's default limit of a body; eight of them are its budget."""

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def idle(port: int) -> None:
    """400 connections that send nothing."""
    counts: Counter[str] = Counter()
    held: list[Streams] = []
    with _reported(counts):
        for _ in range(400):
            try:
                held.append(await asyncio.open_connection(HOST, port))
                counts["idle connections opened"] += 1
            except OSError:
                counts["refused"] += 1
        await asyncio.sleep(_FOREVER)


async def slow_heads(port: int) -> None:
    """300 heads, sent at a byte a second."""
    await _many(300, lambda: _drip(port, b"POST /v1/classify HTTP/1.1\r\nX-Slow: " + b"a" * 3600, begin=0))


async def slow_bodies(port: int) -> None:
    """Eight large bodies that stop before their end, and a hundred that come at a byte a second."""
    large = _head(_LARGE_BODY) + bytes(_LARGE_BODY - 1000)
    slow = _head(3600)
    await asyncio.gather(
        _many(8, lambda: _drip(port, large, begin=len(large))),
        _many(100, lambda: _drip(port, slow + bytes(3600), begin=len(slow))),
    )


async def never_reads(port: int) -> None:
    """200 clients that ask for /metrics and /openapi.json again and again, and read nothing."""
    question = b"".join(f"GET {path} HTTP/1.1\r\nHost: s\r\n\r\n".encode() for path in ("/openapi.json", "/metrics"))

    async def ask() -> None:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, (HOST, port))
            while True:
                await loop.sock_sendall(connection, question * 20)
                await asyncio.sleep(0.1)

    await _many(200, ask)


async def large_heads(port: int) -> None:
    """Four heads of 32 MiB: two in lines of 8 kB, two in one line."""
    lines = b"".join(b"X-%d: %s\r\n" % (number, b"a" * 8000) for number in range(4096))
    statuses: Counter[str] = Counter()

    async def send(rest: bytes) -> None:
        reader, writer = await asyncio.open_connection(HOST, port)
        try:
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: s\r\n")
            for start in range(0, len(rest), _CHUNK):
                writer.write(rest[start : start + _CHUNK])
                await writer.drain()
            writer.write(b"\r\n\r\n")
            await writer.drain()
        finally:
            with suppress(OSError, TimeoutError):
                line = await asyncio.wait_for(reader.readline(), 10)
                statuses[f"answered {line.decode('latin-1').strip()!r}"] += 1
            writer.close()

    with _reported(statuses):
        await _many(4, lambda: send(lines), lambda: send(b"X-Long: " + b"a" * (32 * 2**20)))


async def flood(port: int) -> None:
    """300 connections a second: a third stay idle, a third are reset at once, a third stop in the middle of a head."""
    counts: Counter[str] = Counter()
    held: list[asyncio.StreamWriter] = []
    begin = time.monotonic()
    with _reported(counts):
        for number in itertools.count():
            await asyncio.sleep(max(0.0, begin + number / 300 - time.monotonic()))
            try:
                async with asyncio.timeout(5):
                    _, writer = await asyncio.open_connection(HOST, port)
            except (OSError, TimeoutError):
                counts["connections refused"] += 1
                continue
            counts["connections opened"] += 1
            if number % 3 == 0:
                held.append(writer)
            elif number % 3 == 1:
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.close()
            else:
                writer.write(b"GET /healthz HTTP/1.1\r\nHos")
                writer.close()
            if len(held) > 500:
                held.pop(0).close()


async def hostile_images_sent(port: int) -> None:
    """20 hostile images a second, whether or not the last ones were answered."""
    await _post_all(port, [(name, _post(image)) for name, image in hostile_images().items()], every_s=0.05)


async def mixed(port: int) -> None:
    """20 requests a second of every kind that is expensive to read or to decode, in turn."""
    images = [(name, _post(image)) for name, image in hostile_images().items()]
    numbers = b'{"inputs":[{"name":"image","shape":[1,1000000],"datatype":"UINT8","data":[' + b"1," * 10**6 + b"1]}]}"
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\na\r\n'
    name = b'{"image":"' + b"A" * 100 + b'","' + b"n" * 10**6 + b'":1}'
    bombs = gzip.compress(bytes(64 * 2**20))
    json_type, v2 = "Content-Type: application/json", "/v2/models/numbered/infer"
    others = [
        ("a million numbers", _post(numbers, json_type, path=v2)),
        ("nested lists", _post(b"[" * 10**5, json_type, path=v2)),
        ("20,000 parts", _post(part * 20_000 + b"--x--", "Content-Type: multipart/form-data; boundary=x")),
        ("a name of 1 MB", _post(name, json_type)),
        ("64 MiB in a gzip of 64 kB", _post(bombs, "Content-Encoding: gzip")),
        ("500 query names", _post(b"", path="/v1/classify?" + "&".join(f"a{number}=1" for number in range(500)))),
    ]
    # As many of the other kinds as of images.
    pairs = zip(images, itertools.cycle(others), strict=False)
    await _post_all(port, [one for pair in pairs for one in pair], every_s=0.05)


async def large_images(port: int) -> None:
    """Ten PNGs of 25 megapixels a second."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((5000, 5000, 3), np.uint8)).save(buffer, "PNG")
    await _post_all(port, [("25 megapixels", _post(buffer.getvalue()))], every_s=0.1)


async def _post_all(port: int, requests: list[tuple[str, bytes]], *, every_s: float) -> None:
    client = Client(HOST, port, answer_seconds=_PATIENCE_SECONDS)
    counts: Counter[str] = Counter()

    async def post(name: str, request: bytes) -> None:
        try:
            status = str((await client.ask(request, keep=False)).status)
        except Unanswered as error:
            status = error.outcome
        counts[f"{name} → {status}"] += 1

    running: set[asyncio.Task[None]] = set()
    with _reported(counts):
        for name, request in itertools.cycle(requests):
            running.add(task := asyncio.create_task(post(name, request)))
            task.add_done_callback(running.discard)
            await asyncio.sleep(every_s)


ATTACKS: dict[str, Callable[[int], Awaitable[None]]] = {
    "idle": idle,
    "slow_heads": slow_heads,
    "slow_bodies": slow_bodies,
    "never_reads": never_reads,
    "large_heads": large_heads,
    "flood": flood,
    "hostile_images": hostile_images_sent,
    "mixed": mixed,
    "large_images": large_images,
}


def _head(length: int, *lines: str, path: str = "/v1/classify") -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: s", f"Content-Length: {length}", *lines, "", ""]).encode()


def _post(body: bytes, *lines: str, path: str = "/v1/classify") -> bytes:
    return _head(len(body), *lines, path=path) + body


async def _many(count: int, *clients: Callable[[], Awaitable[None]]) -> None:
    """`count` clients of the kinds in turn; each begins again when its connection ends, without end."""

    async def again(client: Callable[[], Awaitable[None]]) -> None:
        while True:
            with suppress(OSError):
                await client()
            await asyncio.sleep(0.5)

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(again(clients[number % len(clients)]))


async def _drip(port: int, data: bytes, *, begin: int) -> None:
    """Send `begin` bytes at once and the rest a byte a second, until the server closes the connection."""
    reader, writer = await asyncio.open_connection(HOST, port)
    closed = asyncio.create_task(reader.read())
    try:
        writer.write(data[:begin])
        for byte in data[begin:]:
            await asyncio.wait([closed], timeout=1)
            if closed.done():
                return
            writer.write(bytes([byte]))
            await writer.drain()
        await closed
    finally:
        closed.cancel()
        writer.close()


@contextmanager
def _reported(counts: Counter[str]) -> Iterator[None]:
    try:
        yield
    finally:
        if counts:
            print(", ".join(f"{count} × {what}" for what, count in sorted(counts.items())))


async def _until_terminated(attack: Awaitable[None]) -> None:
    task = asyncio.ensure_future(attack)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with suppress(asyncio.CancelledError):
        await task


if __name__ == "__main__":
    asyncio.run(_until_terminated(ATTACKS[sys.argv[1]](int(sys.argv[2]))))
