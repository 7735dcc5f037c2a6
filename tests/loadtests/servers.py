"""A server whose answers and whose timing are known."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Fake:
    """A server that answers, and remembers what it received."""

    url: str = ""
    bodies: list[bytes] = field(default_factory=list)
    """The first 64 bytes of each."""
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    in_flight: int = 0
    max_in_flight: int = 0


@contextmanager
def fake_server(
    seconds: Callable[[int], float],
    *,
    serial: bool = False,
    status: Callable[[int], int] = lambda _: 200,
    model: Callable[[int], str] = lambda _: "",
) -> Iterator[Fake]:
    """Request number n (from 0) takes `seconds(n)` (which may block), and is answered with `status(n)` by `model(n)`.

    One at a time if `serial`. Status 0 closes the connection without an answer.
    """
    fake = Fake()
    turn = threading.Lock()
    counting = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Else the body of an answer waits for the client to acknowledge its head.
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._answer(200 if self.path == "/readyz" else 404, "")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with counting:
                number = len(fake.bodies)
                # Enough to tell large ones apart.
                fake.bodies.append(body[:64])
                fake.paths.append(self.path)
                fake.headers.append({name.lower(): value for name, value in self.headers.items()})
                fake.in_flight += 1
                fake.max_in_flight = max(fake.max_in_flight, fake.in_flight)
            if serial:
                with turn:
                    time.sleep(seconds(number))
            else:
                time.sleep(seconds(number))
            with counting:
                fake.in_flight -= 1
            self._answer(status(number), model(number))

        def _answer(self, code: int, model: str) -> None:
            if code == 0:
                self.close_connection = True
                return
            content = json.dumps({"results": [{"predictions": [{"index": 3, "label": "three"}]}]}).encode()
            self.send_response(code)
            self.send_header("X-StrideViT-Model", model)
            self.send_header("Content-Length", str(len(content)))
            # A client that was ended does not wait for its answer.
            with suppress(BrokenPipeError, ConnectionResetError):
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the parent's name)
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 256
        daemon_threads = True
        # Else closing waits for the clients' idle connections.
        block_on_close = False

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        fake.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()
