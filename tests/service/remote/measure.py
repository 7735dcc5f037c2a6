"""Time and CPU of fetching `models/` from moto's S3 server, of a poll, and of a start from the cache.

python -m tests.service.remote.measure
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from service.bundle import list_repository
from service.remote.address import parse_address
from service.remote.opening import open_mirror
from tests.processes import ROOT
from tests.service.remote.conftest import FaultyServer, aws_environment

_ROUNDS = 5


def main() -> None:
    """Print the medians of some rounds. The server is a process of its own, whose CPU does not count."""
    if sys.argv[1:] == ["server"]:
        server = FaultyServer()
        bucket = server.bucket()
        bucket.upload(ROOT / "models")
        print(server.url, bucket.url, flush=True)
        sys.stdin.read()
        return
    command = [sys.executable, "-m", "tests.service.remote.measure", "server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        endpoint, url = process.stdout.readline().decode().split()
        server = type("Server", (), {"url": endpoint})()
        os.environ |= aws_environment(server)
        _measure(url)
        process.communicate()


def _measure(url: str) -> None:
    taken: dict[str, list[tuple[float, float]]] = {}

    def timed(what: str, call: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        taken.setdefault(what, []).append((time.perf_counter() - wall, time.process_time() - cpu))
        return result

    def opened(cache: Path) -> Any:
        options = {"cache_bytes": 10**10, "timeout_seconds": 60.0, "names": (), "versions_to_serve": 1}
        return open_mirror(parse_address(url), cache=cache, **options)  # type: ignore[arg-type]

    cache = Path(tempfile.mkdtemp())
    timed("import of fsspec and s3fs", lambda: opened(cache).close())
    for number in range(_ROUNDS):
        first = opened(cache / str(number))
        timed("everything fetched", first.update)
        timed("a poll without news", first.update)
        first.close()
        again = opened(cache / str(number))
        timed("a start from the cache", again.update)
        folder = again.folder
        again.close()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{len(list_repository(folder).versions)} bundles, {size / 1e6:.1f} MB, {_ROUNDS} rounds, medians")
    for what, pairs in taken.items():
        wall, cpu = (median(column) for column in zip(*pairs, strict=True))
        print(f"{what}: {wall:.2f} s, {cpu:.2f} s of CPU")
    shutil.rmtree(cache)


if __name__ == "__main__":
    main()
