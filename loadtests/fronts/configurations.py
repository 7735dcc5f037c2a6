"""Configurations of nginx and HAProxy that do what the front of `--workers` does.

Both run on one thread, and send a request to the worker with the fewest in progress. A request that found no
connection, got no answer, or was answered with 503, is sent once more, to another worker; bodies of up to 1 MiB are
buffered for that.
"""

from collections.abc import Sequence
from pathlib import Path

_BODY = "1m"


def nginx(port: int, backends: Sequence[str], folder: Path) -> str:
    """nginx.conf; `backends` are written HOST:PORT. All its files lie in `folder`."""
    servers = "\n".join(f"        server {one} max_fails=0;" for one in backends)
    paths = "\n".join(
        f"    {kind}_temp_path {folder / kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return f"""daemon off;
worker_processes 1;
pid {folder / "nginx.pid"};
error_log {folder / "error.log"} warn;
events {{ worker_connections 4096; }}
http {{
    access_log off;
{paths}
    client_body_buffer_size {_BODY};
    client_max_body_size 0;
    keepalive_requests 1000000;
    upstream workers {{
        least_conn;
{servers}
        keepalive 64;
        keepalive_requests 1000000;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://workers;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_max_temp_file_size 0;
            proxy_next_upstream error timeout http_503 non_idempotent;
            proxy_next_upstream_tries 2;
        }}
    }}
}}
"""


def haproxy(port: int, backends: Sequence[str]) -> str:
    """haproxy.cfg; `backends` are written HOST:PORT."""
    servers = "\n".join(f"    server worker{number} {one} check" for number, one in enumerate(backends))
    return f"""global
    nbthread 1
    maxconn 4096
    tune.bufsize 1048576
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 120s
    timeout http-keep-alive 75s
    option http-buffer-request
    option redispatch 1
    retries 1
    retry-on conn-failure empty-response 503
    http-reuse always
frontend front
    bind 127.0.0.1:{port}
    default_backend workers
backend workers
    balance leastconn
    option httpchk GET /readyz
    default-server inter 1s
{servers}
"""
