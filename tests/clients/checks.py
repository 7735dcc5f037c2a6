"""What the clients' scripts share: one line per check, and the first mismatch ends the run. Standard library only."""

import argparse
import json
import struct
import sys
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

# Requests to the service on this machine must not go through the environment's proxies.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, kw_only=True)
class Target:
    """The service and the model to test, from the command line."""

    url: str
    model: str
    admin_key: str | None

    @property
    def authority(self) -> str:
        """HOST:PORT."""
        return self.url.split("://", 1)[1].rstrip("/")


def read_target(description: str) -> Target:
    """Parse --url, --model and --admin-key."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--url", required=True, help="base URL of the service, http://HOST:PORT")
    parser.add_argument("--model", required=True, help="name of a model that it serves")
    parser.add_argument("--admin-key", help="key for loading and unloading; without it those checks are left out")
    asked = parser.parse_args()
    return Target(url=asked.url, model=asked.model, admin_key=asked.admin_key)


def fail(message: str) -> NoReturn:
    """End the run."""
    print(f"  FAILED: {message}", file=sys.stderr, flush=True)
    sys.exit(1)


@contextmanager
def check(name: str) -> Iterator[None]:
    """Print `name` when the block has passed; an exception ends the run."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (whatever a client raises is a failed check)
        fail(f"{name}: {type(error).__name__}: {error}")
    print(f"  ok: {name}", flush=True)


def same(got: object, wanted: object, what: str = "value") -> None:
    """Raise unless equal."""
    if got != wanted:
        raise AssertionError(f"{what}: wanted {wanted!r}, got {got!r}")


def refused(call: Callable[[], object], error: type[Exception]) -> Exception:
    """The exception that `call` raises, which must be an `error`."""
    try:
        answer = call()
    except error as raised:
        return raised
    raise AssertionError(f"wanted {error.__name__}, got {answer!r}")


def get(url: str) -> bytes | None:
    """The body of the response to a GET; None if there is none or it is an error."""
    try:
        with _OPENER.open(url, timeout=60) as answer:
            body: bytes = answer.read()
    except OSError:
        return None
    return body


def metadata(target: Target) -> dict[str, Any]:
    """The model's metadata in /v2."""
    described: dict[str, Any] = json.loads(get(f"{target.url}/v2/models/{target.model}") or b"{}")
    return described


def post(url: str, body: bytes, **headers: str) -> tuple[bytes, dict[str, str]]:
    """The body and the headers, in lower case, of the response to a POST without any client library."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, data=body, headers=names)  # noqa: S310 (our own service)
    with _OPENER.open(request, timeout=60) as answer:
        return answer.read(), {name.lower(): value for name, value in answer.headers.items()}


def classify(target: Target, image: bytes, top_k: int) -> list[dict[str, Any]]:
    """/v1's predictions for one encoded image, best first: the reference for every other request."""
    body, _ = post(f"{target.url}/v1/classify?model={target.model}&top_k={top_k}", image)
    predictions: list[dict[str, Any]] = json.loads(body)["results"][0]["predictions"]
    return predictions


def png(pixels: bytes, *, width: int, height: int) -> bytes:
    """A PNG file of 8-bit RGB pixels, so that no environment needs an imaging library."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = [b"\0" + pixels[start : start + width * 3] for start in range(0, height * width * 3, width * 3)]
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"".join(
        (b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(b"".join(rows))), chunk(b"IEND", b""))
    )
