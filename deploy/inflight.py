"""Stop a service with requests in flight, and count what became of them. Standard library only.

    python3 deploy/inflight.py URL PHOTO COMMAND...

Clients send the photo over and over, each time on a new connection, until one is refused; after the first answers,
COMMAND is run, which must stop the service. Ends with 1 if a request that was sent got no complete answer, or if the
command failed.
"""

import http.client
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

_CLIENTS = 8
_LONGEST_SECONDS = 300.0
_CONNECT_SECONDS, _ANSWER_SECONDS = 10.0, 60.0
_FIRST_ANSWERS = 16


def _send(address: str, body: bytes, counts: Counter[str], ends_at: float) -> None:
    """Ask until the service is gone."""
    while time.monotonic() < ends_at:
        connection = http.client.HTTPConnection(address, timeout=_CONNECT_SECONDS)
        try:
            connection.connect()
            connection.sock.settimeout(_ANSWER_SECONDS)
        except OSError:
            counts["not connected"] += 1
            return
        try:
            connection.request("POST", "/v1/classify", body, {"Connection": "close"})
            answer = connection.getresponse()
            answer.read()
            counts[str(answer.status)] += 1
        except (OSError, http.client.HTTPException) as error:
            counts[f"lost: {type(error).__name__}"] += 1
        finally:
            connection.close()


def main(url: str, photo: Path, command: list[str]) -> None:
    """Print the counts; end with 1 if anything was lost."""
    counts: Counter[str] = Counter()
    ends_at = time.monotonic() + _LONGEST_SECONDS
    address, body = urlsplit(url).netloc, photo.read_bytes()
    clients = [
        threading.Thread(target=_send, args=(address, body, counts, ends_at), daemon=True) for _ in range(_CLIENTS)
    ]
    for client in clients:
        client.start()
    while counts.total() < _FIRST_ANSWERS:
        if time.monotonic() > ends_at:
            sys.exit(f"no answers within {_LONGEST_SECONDS:g} s: {dict(counts)}")
        time.sleep(0.05)
    before = counts["200"]
    ended = subprocess.run(command, check=False)  # noqa: S603 (the command that was given)
    for client in clients:
        client.join(60)
    lost = {name: count for name, count in counts.items() if name.startswith("lost")}
    print(f"stopped after {before} answers; {counts['200'] - before} more came, {sum(lost.values())} were lost")
    if lost or ended.returncode or counts["200"] == before or set(counts) - {"200", "429", "503", "not connected"}:
        sys.exit(f"requests in flight: {dict(counts)}, the command ended with {ended.returncode}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
