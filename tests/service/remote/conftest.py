"""moto's S3 server on a socket, with faults, and bundles to put into it."""

import hashlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from service.bundle import CONTENT_FILES, SUMS_FILE
from service.remote.address import parse_address
from service.remote.bucket import BucketStore
from service.remote.cache import Cache
from service.remote.mirror import Mirror
from service.remote.store import Key, Store
from tests.service.conftest import Clock

SECRET = "a-secret-that-no-log-may-have"  # noqa: S105

_numbers = itertools.count()


@dataclass
class Bucket:
    """One bucket of the server."""

    name: str
    client: Any
    faults: dict[str, Callable[[bytes], Iterable[bytes] | None]] = field(default_factory=dict)
    """By the end of a path: what a GET gives in place of the object; None for 403."""
    asked: list[str] = field(default_factory=list)
    """Paths of the objects that were read, and `list` for each listing."""

    @property
    def url(self) -> str:
        return f"s3://{self.name}/models"

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=f"models/{key}", Body=content)

    def upload(self, repository: Path) -> None:
        for path in sorted(repository.rglob("*")):
            if path.is_file():
                self.put(path.relative_to(repository).as_posix(), path.read_bytes())

    def delete(self, prefix: str) -> None:
        listed = self.client.list_objects_v2(Bucket=self.name, Prefix=f"models/{prefix}")
        for found in listed.get("Contents", ()):
            self.client.delete_object(Bucket=self.name, Key=found["Key"])


class FaultyServer:
    """moto's application with what `Bucket.faults` says in front of it."""

    def __init__(self) -> None:
        self._application: Callable[..., Iterable[bytes]] = DomainDispatcherApplication(create_backend_app)
        self._buckets: dict[str, Bucket] = {}
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.port}"
        self.down = False
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        options = {"aws_access_key_id": "key", "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
        self._client = boto3.client("s3", endpoint_url=self.url, **options)

    def close(self) -> None:
        self._client.close()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def bucket(self) -> Bucket:
        bucket = Bucket(f"bucket-{next(_numbers)}", self._client)
        self._client.create_bucket(Bucket=bucket.name)
        self._buckets[bucket.name] = bucket
        return bucket

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        name, _, path = environ["PATH_INFO"].lstrip("/").partition("/")
        bucket = self._buckets.get(name)
        if self.down:
            start_response("500 down", [("Content-Length", "0")])
            return []
        if bucket is None or environ["REQUEST_METHOD"] != "GET":
            return self._application(environ, start_response)
        bucket.asked.append(path.removeprefix("models/") if path else "list")
        fault = next((fault for end, fault in bucket.faults.items() if (path or "list").endswith(end)), None)
        if fault is None:
            return self._application(environ, start_response)
        headers: list[Any] = []
        content = b"".join(self._application(environ, lambda status, given, *_: headers.extend([status, given])))
        answer = fault(content)
        if answer is None:
            body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            start_response("403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        start_response(*headers)
        return answer


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyServer]:
    served = FaultyServer()
    yield served
    served.close()


@pytest.fixture
def bucket(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    for name, value in aws_environment(server).items():
        monkeypatch.setenv(name, value)
    server.down = False
    yield server.bucket()
    server.down = False


def aws_environment(server: FaultyServer) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.url,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "*",
    }


def bundle_files(content: bytes = b"graph") -> dict[str, bytes]:
    """Files with right digests, of which a mirror asks no more."""
    files = {file: f"{file} of ".encode() + content for file in CONTENT_FILES}
    return {**files, SUMS_FILE: sums_of(files)}


def sums_of(files: dict[str, bytes]) -> bytes:
    return "".join(f"{hashlib.sha256(files[file]).hexdigest()}  {file}\n" for file in CONTENT_FILES).encode()


def put_bundle(bucket: Bucket, folder: str, content: bytes = b"graph") -> None:
    for file, data in bundle_files(content).items():
        bucket.put(f"{folder}/{file}", data)


def contents(folder: Path) -> dict[str, dict[str, bytes]]:
    """All that a repository folder holds, hidden files included: the files of each version."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.setdefault(path.parent.relative_to(folder).as_posix(), {})[path.name] = path.read_bytes()
    return found


@dataclass
class World:
    """Makes mirrors of one address over one cache, and closes them."""

    folder: Path
    clock: Clock = field(default_factory=Clock)
    made: list[Mirror] = field(default_factory=list)

    def mirror(
        self,
        url: str,
        *,
        names: tuple[str, ...] = (),
        versions_to_serve: int = 1,
        on_trial: tuple[Key, ...] = (),
        timeout: float = 60.0,
        max_bytes: int = 10**9,
        store: Store | None = None,
    ) -> Mirror:
        address = parse_address(url)
        mirror = Mirror(
            store or BucketStore(address, timeout_seconds=timeout),
            Cache(self.folder / address.folder_name, max_bytes=max_bytes),
            names=names,
            versions_to_serve=versions_to_serve,
            on_trial=on_trial,
            clock=self.clock,
        )
        self.made.append(mirror)
        return mirror

    def leftovers(self) -> list[Path]:
        return [path for folder in self.folder.glob("*/partial") for path in folder.iterdir()]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "cache")
    yield made
    for mirror in made.made:
        mirror.close()
    assert made.leftovers() == [], "nothing half written is left"
