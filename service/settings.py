"""Settings of the service: flags, over STRIDEVIT_<NAME> in the environment, over a TOML file, over the defaults.

The docstring under a setting is its only documentation: the flags' help and docs/settings.md are made from it.
"""

import difflib
import ipaddress
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from service.engine import Tuning

ENV_PREFIX: Final = "STRIDEVIT_"

GROUPS: Final = {
    "repository": "Models",
    "host": "Network",
    "api_key_hashes": "Security",
    "device": "Engine",
    "max_pending_images": "Limits",
    "default_deadline_ms": "Deadlines",
    "config": "Operation",
}
"""The first setting of each group, in the order of declaration: parts the flags' help and docs/settings.md."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


def _split(value: object) -> object:
    """Lists come as text from the environment and from flags."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _empty_is_unset(value: object) -> object:
    """An empty flag takes back what the environment or the file says; an empty path would be the current folder."""
    return None if value == "" else value


def _key_hash(value: str) -> str:
    digest = value.strip().lower()
    if not _SHA256.fullmatch(digest):
        # The value stays out of the message: it may well be the key itself.
        raise ValueError("must be 64 hexadecimal digits, the SHA-256 of a key: `python -m service key` makes both")
    return digest


def _address(value: str) -> str:
    if value != "*":
        try:
            ipaddress.ip_network(value)
        except ValueError:
            raise ValueError(f"{value!r} is neither an IP address, nor a network such as 10.0.0.0/8, nor *") from None
    return value


def _origin(value: str) -> str:
    parts = urlsplit(value)
    if value != "*" and (parts.scheme not in {"http", "https"} or value != f"{parts.scheme}://{parts.netloc}"):
        # Browsers send an origin in exactly this form, and it is compared letter by letter.
        raise ValueError(f"{value!r} is not an origin: write https://example.com, without a path or a final slash")
    return value


def _http_url(value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise ValueError("must begin with http:// or https://")
    return value


def _log_level(value: object) -> object:
    level = value.lower() if isinstance(value, str) else value
    if level not in {"debug", "info", "warning", "error"}:
        raise ValueError(f"unknown log level {value!r}: use debug, info, warning or error")
    return level


_T = TypeVar("_T")
_List = Annotated[tuple[_T, ...], NoDecode, BeforeValidator(_split)]
_Optional = Annotated[_T | None, BeforeValidator(_empty_is_unset)]
_Hash = Annotated[str, AfterValidator(_key_hash)]
_Address = Annotated[str, AfterValidator(_address)]
_Origin = Annotated[str, AfterValidator(_origin)]
_Url = Annotated[str, AfterValidator(_http_url)]
_Margin = Annotated[float, Field(gt=0, le=1)]


class Settings(BaseSettings):
    """What the service is asked to be."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        # Compose files and charts pass on variables that are not set as empty ones.
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        # A wrong value may be a secret that was put into the wrong place.
        hide_input_in_errors=True,
    )

    repository: Path = Path("models")
    """Folder of bundles: `<name>/<version>/`."""
    models: _List[str] = ()
    """Names of the models to serve; empty: all in the repository."""
    default_model: _Optional[str] = None
    """What answers a request that names no model; unset: the one with the highest top-1."""
    versions_to_serve: PositiveInt = 1
    """How many versions of each model to serve, the newest first."""
    poll_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Seconds between two looks for new and removed versions; 0: only when asked through `/v2/repository`."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of IPv4."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port to listen on; 0 for any free one."""
    trusted_proxies: _List[_Address] = ()
    """Addresses or networks of the reverse proxies whose `X-Forwarded-For` and `X-Forwarded-Proto` are believed; empty:
    nobody's; `*`: everybody's, only where none but the proxy can reach the service."""
    cors_origins: _List[_Origin] = ()
    """Origins whose web pages may call the service from a browser, such as `https://example.com`; empty: CORS is off.
    `*` stands for all, also where keys are needed: a browser never adds a key by itself, as it would a cookie."""

    api_key_hashes: _List[_Hash] = Field(default=(), repr=False)
    """SHA-256 in hexadecimal of each API key that is accepted; empty: no key is needed. `python -m service key` makes
    one."""
    admin_key_hash: _Optional[_Hash] = Field(default=None, repr=False)
    """SHA-256 in hexadecimal of the key that may load and unload models; unset: nobody may."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N` or `tensorrt`. One that cannot be had is an error, never a silent fall back."""
    gpu_memory_bytes: NonNegativeInt = 0
    """Limit of the memory that the engine takes on the GPU, in bytes; 0: none."""
    tf32: bool = False
    """Multiply float32 matrices on the GPU's TF32 units: faster, with 10 bits of mantissa instead of 23."""
    cuda_graphs: bool = False
    """Record one CUDA graph for each warmed-up batch size, which spares the launch of each kernel."""
    tensorrt_cache: _Optional[Path] = None
    """Folder where TensorRT keeps the engines that it builds, so that only the first start is slow; unset: none."""
    threads: NonNegativeInt = 0
    """Cores to use in all; 0: those granted by affinity and the container's CPU quota."""
    intra_op_threads: NonNegativeInt = 0
    """Threads that compute one batch on the CPU; 0: all of `threads`."""
    decode_threads: NonNegativeInt = 0
    """Threads that decode and resize images; 0: all of `threads`."""
    allow_spinning: bool = False
    """Engine threads spin while they wait: a little faster, and all their cores are busy for it."""
    max_batch: PositiveInt = 16
    """Images that the engine takes at once, at most: within it, warm-up chooses for each model the size that pays."""

    max_pending_images: PositiveInt = 256
    """Images accepted and not yet answered, at most; beyond it requests get 429."""
    max_pending_bytes: PositiveInt = 256 * 1024 * 1024
    """Bodies accepted and not yet answered, together, in bytes; beyond it requests get 429."""
    max_body_bytes: PositiveInt = 32 * 1024 * 1024
    """Largest request body, in bytes; beyond it requests get 413."""
    max_images_per_request: PositiveInt = 32
    """Images in one request, at most."""
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 50_000_000
    """Largest image, in pixels, checked before decoding. Pillow itself refuses more than 178,956,970 pixels."""
    body_timeout_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Seconds that a client may take to send its body, before it gets 408."""

    default_deadline_ms: PositiveInt = 30_000
    """Milliseconds in which a request wants its answer if it does not say."""
    max_deadline_ms: PositiveInt = 120_000
    """Longest deadline that a request may ask for, in milliseconds; longer wishes are cut to it."""
    deadline_margin: _Margin = 0.8
    """Part of its deadline within which a request's predicted finish must lie, or it is turned away at once."""
    step_up_headroom: _Margin = 0.5
    """Part of what the deadline leaves beside a model's own work that waiting may take before a family returns to that
    more accurate model: below 1, so that the choice does not swing."""

    config: _Optional[Path] = None
    """TOML file of settings, one `name = value` each, without tables; relative paths in it are relative to the current
    folder."""
    shutdown_delay_seconds: Annotated[float, Field(ge=0)] = 0.0
    """After SIGTERM, seconds to serve on while `/readyz` says 503, so that load balancers can turn away first."""
    graceful_timeout_seconds: PositiveInt = 30
    """After SIGTERM and the grace period, seconds that accepted requests may take to finish."""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_log_level)] = "info"
    """Least severe events to log."""
    log_requests: Literal["none", "errors", "all"] = "errors"
    """Requests to log, one line each: those answered with 4xx or 5xx, all, or none."""
    otlp_endpoint: _Optional[_Url] = None
    """URL that takes OpenTelemetry traces by OTLP over HTTP, such as `http://collector:4318/v1/traces`; unset: none are
    made."""

    @model_validator(mode="after")
    def _limits_fit_each_other(self) -> Self:
        if self.max_images_per_request > self.max_pending_images:
            raise ValueError(
                f"max_images_per_request ({self.max_images_per_request}) exceeds max_pending_images "
                f"({self.max_pending_images}): the largest request could never be admitted"
            )
        if self.max_body_bytes > self.max_pending_bytes:
            raise ValueError(
                f"max_body_bytes ({self.max_body_bytes}) exceeds max_pending_bytes ({self.max_pending_bytes}): "
                "the largest request could never be admitted"
            )
        if self.default_deadline_ms > self.max_deadline_ms:
            raise ValueError(
                f"default_deadline_ms ({self.default_deadline_ms}) exceeds max_deadline_ms ({self.max_deadline_ms})"
            )
        return self

    def tuning(self) -> Tuning:
        """The settings of the engine beside its device and threads."""
        return Tuning(
            allow_spinning=self.allow_spinning,
            gpu_memory_bytes=self.gpu_memory_bytes,
            tf32=self.tf32,
            cuda_graphs=self.cuda_graphs,
            tensorrt_cache=self.tensorrt_cache,
        )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The sources, the strongest first."""
        return init_settings, env_settings, _File(settings_cls)


class _File(PydanticBaseSettingsSource):
    """The file that `config` names, be it an argument or in the environment."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Not used: the file is read as a whole."""
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        path = self.current_state.get("config")
        return read_file(Path(path)) if path else {}


def read_file(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, not yet validated. Raises SettingsError, a ValueError."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read the settings file {path}: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"{path} is not TOML: {error}") from error
    names = [name for name in Settings.model_fields if name != "config"]
    for key, value in values.items():
        if key in names:
            continue
        near = difflib.get_close_matches(key.lower().replace("-", "_"), names, n=1, cutoff=0)[0]
        if isinstance(value, dict):
            raise SettingsError(f"{path}: unknown table [{key}]: settings stand in no table")
        raise SettingsError(f"{path}: unknown setting {key!r}: did you mean {near!r}?")
    return values
