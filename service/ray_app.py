"""The service on Ray Serve: Ray places the replicas, scales them and sends them requests; each is the same application.

`serve run deploy/ray.yaml` builds it with `build`; docs/ray.md explains the file. No other module depends on Ray.
"""

import asyncio
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final, Protocol

import structlog
from fastapi import FastAPI
from pydantic import ValidationError

from service.app import create_app
from service.gauges import predicted_drain_seconds
from service.host import available_cores
from service.http.server.connections import ConnectionLimits
from service.settings import Settings

try:
    import ray
    from ray import serve
except ImportError as error:
    raise ImportError("service.ray_app needs Ray Serve: pip install 'stridevit[ray]'") from error

_SERVER: Final = {field.name for field in fields(ConnectionLimits)} | {
    "host", "port", "trusted_proxies", "shutdown_delay_seconds", "graceful_timeout_seconds"
}  # fmt: skip
"""Settings of our own server: Ray's HAProxy and the servers of its replicas take the connections in its place."""

_PROXY: Final = "RAY_SERVE_ENABLE_HA_PROXY"
_MOST_SECONDS: Final = 3600.0
"""Replaces an infinite time, so that averages over replicas stay finite."""


def build(args: dict[str, Any]) -> serve.Application:
    """The application, for `import_path`; `args` are settings of the service. Raises ValueError."""
    if os.environ.get(_PROXY) != "1":
        raise ValueError(f"{_PROXY} is not 1 on this node: start Ray with the variables of deploy/ray.env")
    if rays := sorted(_SERVER & args.keys()):
        raise ValueError(f"args: {', '.join(rays)}: connections are Ray's; see docs/ray.md, Settings")
    _settings(args)
    # What the service needs of Ray; deploy/ray.yaml may override it.
    deployment = serve.deployment(Replica).options(
        name="StrideViT",
        # Far above the service's own bound: else requests would wait in front of admission, which could not refuse any.
        max_ongoing_requests=10_000,
        health_check_period_s=5,
        health_check_timeout_s=15,
        graceful_shutdown_timeout_s=75,
    )
    return deployment.bind(args)


def _settings(args: Mapping[str, Any], **defaults: Any) -> Settings:
    """Settings from `args`, which override the environment, which overrides `defaults`. Raises ValueError."""
    try:
        settings = Settings(**args)
        return Settings(**{**{n: v for n, v in defaults.items() if n not in settings.model_fields_set}, **args})
    except ValidationError as error:
        items = error.errors(include_input=False, include_url=False)
        # Not the error itself: it cannot be pickled, and Ray would report that instead.
        text = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'settings'}: {item['msg']}" for item in items)
        raise ValueError(f"args: {text}") from None


@serve.ingress()
class Replica:
    """One copy of the service, in an actor of its own. Ray pickles a reference to this class and `args`, no more."""

    def __init__(self, args: dict[str, Any]) -> None:
        cores = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0))
        # Of the node's cores only those that Ray reserved: it may place another replica on the others.
        self._settings = _settings(args, threads=min(cores, available_cores()))
        self._app: FastAPI
        self._looked_at, self._cpu_seconds = time.monotonic(), time.process_time()

    async def __serve_build_asgi_app__(self) -> FastAPI:
        _log_to_ray(self._settings.log_level)
        # In a thread: models take seconds to load, and Ray asks the loop whether the actor lives.
        self._app = await asyncio.to_thread(create_app, self._settings)
        return self._app

    async def check_health(self) -> None:
        """Called by Ray; raises NotReady if the engine hangs or no model is left: only a restart may help.

        As a coroutine it waits for its turn on the loop: if that does not come in time, the loop is stuck.
        """
        self._app.state.pipeline.require_ready()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray for `ByDrain`: seconds until the accepted work is done, and the share of the device in use."""
        pipeline, now, cpu_seconds = self._app.state.pipeline, time.monotonic(), time.process_time()
        cores = self._settings.threads or available_cores()
        cpu = (cpu_seconds - self._cpu_seconds) / max(1e-3, now - self._looked_at) / cores
        self._looked_at, self._cpu_seconds = now, cpu_seconds
        # CPU time covers decoding too; the arrivals cover a GPU.
        busy = max(min(1.0, cpu), pipeline.load.arrivals.value)
        return {"drain_seconds": min(predicted_drain_seconds(pipeline), _MOST_SECONDS), "busy": busy}


class Context(Protocol):
    """What `ByDrain` reads from Ray's AutoscalingContext."""

    aggregated_metrics: Mapping[str, Mapping[Any, float]] | None
    target_num_replicas: int


class ByDrain:
    """Ray's autoscaling policy for the service: enough replicas that the accepted work of each is done in time.

    Ray pickles it by value, so it uses nothing of this module.
    """

    def __init__(self, drain_seconds: float = 0.5, busy: float = 0.7) -> None:
        """`drain_seconds`: that time for each replica; `busy`: the share of each that may be in use, which also keeps
        replicas that the load needs from being stopped. Raises ValueError."""
        if not (drain_seconds > 0 and 0 < busy <= 1):
            raise ValueError("policy_kwargs: drain_seconds must be above 0, and busy above 0 and at most 1")
        self.limits = {"drain_seconds": drain_seconds, "busy": busy}

    def __call__(self, context: Context) -> tuple[int, dict[str, Any]]:
        """The number of replicas wanted, to which Ray applies its bounds and delays, and an empty state."""
        found = context.aggregated_metrics or {}
        if not any(found.get(name) for name in self.limits):
            return context.target_num_replicas, {}
        parts = (sum(found.get(name, {}).values()) / limit for name, limit in self.limits.items())
        # Rounded: 1.4 / 0.7 must not be above 2.
        return max(1, math.ceil(round(max(parts), 6))), {}


def _log_to_ray(level: str) -> None:
    """Our events as JSON in the log of the replica, which Ray rotates and shows."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=lambda *_: logging.getLogger("ray.serve"),
    )
