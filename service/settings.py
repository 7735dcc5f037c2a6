"""Settings of the service: flags override STRIDEVIT_<NAME> in the environment, which overrides a TOML file.

The docstring under a setting is its only documentation: --help and docs/settings.md are generated from it.
"""

import difflib
import ipaddress
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PlainValidator,
    PositiveInt,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from service.engine import Tuning
from service.errors import StartupError
from service.host import available_cores
from service.images import FORMATS, MAX_PIXELS, Format
from service.keys import key_hash
from service.models.proof import EngineOptions
from service.remote.address import Address, is_address, parse_address
from service.rollouts.split import Split, parse_splits

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
"""The first setting of each group, in the order of declaration: the sections of --help and docs/settings.md."""

_NEVER_ADMITTED = ": the largest request could never be admitted"
_BOUNDED: Final = (
    ("max_images_per_request", "max_pending_images", _NEVER_ADMITTED),
    ("max_body_bytes", "max_pending_bytes", _NEVER_ADMITTED),
    ("default_deadline_ms", "max_deadline_ms", ""),
    ("hang_min_seconds", "hang_max_seconds", ""),
    ("max_url_bytes", "max_head_bytes", ": a URL is a part of the head"),
)
"""Settings that may not exceed another one."""


def _split(value: object) -> object:
    """Lists are comma-separated text in the environment and in flags."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _empty_is_unset(value: object) -> object:
    """An empty flag resets a value of the environment or the file. As a path it would be the current folder."""
    return None if value == "" else value


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
        # Browsers send an origin in exactly this form, and it is compared as text.
        raise ValueError(f"{value!r} is not an origin: write https://example.com, without a path or a final slash")
    return value


def _repository(value: object) -> Path | Address:
    if isinstance(value, Path | Address):
        return value
    if not isinstance(value, str):
        raise ValueError("a repository is the path of a folder, or an address such as s3://bucket/models")
    return parse_address(value) if is_address(value) else Path(value)


def _workers(value: str) -> str:
    if value != "auto" and not (value.isascii() and value.isdecimal() and len(value) < 4):
        raise ValueError(f"{value!r} is neither a number of processes nor auto")
    return value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


_T = TypeVar("_T")
_List = Annotated[tuple[_T, ...], NoDecode, BeforeValidator(_split)]
_Optional = Annotated[_T | None, BeforeValidator(_empty_is_unset)]
_Hash = Annotated[str, AfterValidator(key_hash)]
_Address = Annotated[str, AfterValidator(_address)]
_Origin = Annotated[str, AfterValidator(_origin)]
_Format = Annotated[Format, BeforeValidator(_upper)]
_Url = Annotated[str, Field(pattern="^https?://")]
_Fraction = Annotated[float, Field(gt=0, le=1)]
_Repository = Annotated[
    Path | Address, PlainValidator(_repository), WithJsonSchema({"type": "string", "format": "path or URL"})
]


class Settings(BaseSettings):
    """All settings of the service, validated and frozen."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        # Compose files and charts pass unset variables as empty ones.
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        # An invalid value may be a misplaced secret.
        hide_input_in_errors=True,
    )

    repository: _Repository = Path("models")
    """Folder of bundles, as `<name>/<version>/`; or `s3://BUCKET/FOLDER`, `gs://BUCKET/FOLDER` or `https://HOST/FOLDER`
    (see `repositories.md`)."""
    repository_cache: _Optional[Path] = None
    """Folder for the copy of a repository that is not a folder; unset: `stridevit` in the user's cache folder, or
    `stridevit-UID` in the folder for temporary files if that cannot be written to."""
    repository_cache_bytes: PositiveInt = 16 * 1024**3
    """Largest size of that copy, in bytes: a version that does not fit is not fetched."""
    repository_timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that a repository which is not a folder may take for its listing, and for each 4 MiB of a file."""
    models: _List[str] = ()
    """Names of the models to serve; empty: all models in the repository."""
    default_model: _Optional[str] = None
    """Model for requests that name none; unset: the one with the highest top-1."""
    alias: _Optional[str] = None
    """An additional name of the model for requests that name none, unless a model or a family has that name: KServe
    requests a model by the name of the InferenceService, whatever the bundle is called."""
    versions_to_serve: PositiveInt = 1
    """Number of versions of each model to serve, the newest first."""
    canary: _List[str] = ()
    """Shares of traffic that a candidate answers instead of its primary, as `[PRIMARY:]CANDIDATE[@VERSION]=SHARE`, such
    as `cifar100-csra-r2@6=5%` or `cifar100:cifar100-csra-r4=0.1`. PRIMARY is a model or a family; without it, the
    primary is the candidate's other version or its family. If a candidate cannot answer, the primary does."""
    shadow: _List[str] = ()
    """The same for a candidate that computes the images too, after the primary has answered them and only while no
    answer waits: its answers are only compared, and never sent to clients."""
    shadow_pending_bytes: PositiveInt = 16 * 1024 * 1024
    """Largest size of the images that wait to be compared, for `shadow` and `canary`, in bytes; beyond it, or beyond
    `max_pending_images`, further ones are not compared."""
    poll_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Interval in seconds at which the repository is scanned for new and removed versions; 0: no polling, only
    requests to `/v2/repository` load and unload models."""
    memory_bytes: NonNegativeInt = 0
    """Memory that the service may take in total, in bytes: a model that needs more than is left of it is refused; 0:
    what the container's limit and the machine leave. It does not limit requests."""
    load_timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """Seconds that the proof of a version, in a process of its own, may take before the version is given up: that of a
    large model takes about ten on idle cores and ten times that under full traffic; TensorRT may take more."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all IPv4 addresses."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port to listen on; 0: any free port."""
    trusted_proxies: _List[_Address] = ()
    """Addresses or networks of reverse proxies whose `X-Forwarded-For` and `X-Forwarded-Proto` are trusted; empty:
    none; `*`: all, for a service that only the proxy can reach."""
    cors_origins: _List[_Origin] = ()
    """Origins whose pages may call the service from a browser, such as `https://example.com`; empty: CORS is off; `*`:
    all, which is safe with API keys too, because a browser sends a key, unlike a cookie, only if the page does."""

    max_connections: NonNegativeInt = 0
    """Largest number of open connections; one more replaces the oldest unused one, or gets 503 if all are in use.
    0: as many as the limit of open files allows, up to 10,000. Startup fails if they do not fit into that limit."""
    max_head_bytes: Annotated[int, Field(ge=1024)] = 32 * 1024
    """Largest head of a request, in bytes; beyond it requests get 431. Ten times what browsers and proxies send."""
    max_url_bytes: Annotated[int, Field(ge=256)] = 8 * 1024
    """Largest URL, in bytes; beyond it requests get 414. Nothing here needs a long one: images are in the body."""
    max_headers: Annotated[int, Field(ge=16)] = 100
    """Largest number of headers; beyond it requests get 431. Each costs far more memory than its bytes."""
    head_timeout_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Seconds that a request's head may take from its first byte before it gets 408; until then it holds a
    connection."""
    keep_alive_seconds: Annotated[float, Field(gt=0)] = 75.0
    """Seconds after which an idle connection is closed. More than the 60 s after which nginx and many load balancers
    close theirs: the side that sends the next request should be the one that closes."""
    write_timeout_seconds: Annotated[float, Field(gt=0)] = 20.0
    """Seconds that a client may leave an answer unread in full buffers, before its connection is closed."""

    api_key_hashes: _List[_Hash] = Field(default=(), repr=False)
    """SHA-256 in hexadecimal of each accepted API key, with the scopes `classify` and `read`; empty, and without a
    `keys_file`: no key is needed. `stridevit key` generates a key and its hash."""
    admin_key_hash: _Optional[_Hash] = Field(default=None, repr=False)
    """SHA-256 in hexadecimal of the key that may load and unload models, and do everything else; unset, and without an
    admin key in `keys_file`: nobody may load and unload."""
    keys_file: _Optional[Path] = None
    """TOML file of API keys with names, scopes and limits, whose entries `stridevit key --name` writes; read again on
    SIGHUP and when it changes; unset: only the keys above."""
    keys_poll_seconds: Annotated[float, Field(ge=0)] = 5.0
    """Interval in seconds at which `keys_file` is checked for changes; 0: it is read again only on SIGHUP."""
    guarded_pages: _List[Literal["metrics", "docs"]] = ()
    """Pages that need a key with the scope `read`: `metrics`, `docs` (`/docs` and `/openapi.json`) or both; empty: they
    are open to all who can reach the port."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N` or `tensorrt`. Startup fails if it is unavailable: no silent fallback."""
    gpu_memory_bytes: NonNegativeInt = 0
    """Limit of the engine's GPU memory, in bytes; 0: no limit."""
    tf32: bool = False
    """Multiply float32 matrices in TF32 on the GPU: faster, with a mantissa of 10 bits instead of 23."""
    cuda_graphs: bool = False
    """Record one CUDA graph for each warmed-up batch size, which saves kernel launches."""
    tensorrt_cache: _Optional[Path] = None
    """Folder for the engines that TensorRT builds, so that only the first start is slow; unset: no cache."""
    threads: NonNegativeInt = 0
    """Number of cores to use; 0: all that affinity and the container's CPU quota allow."""
    intra_op_threads: NonNegativeInt = 0
    """Threads that compute one batch on the CPU; 0: measured for each model, all for a single image and as few as give
    the best throughput under load."""
    engine_lanes: NonNegativeInt = 0
    """Largest number of batches that are computed at once; 0: on the CPU as measured for each model, one on a GPU."""
    decode_threads: NonNegativeInt = 0
    """Threads that decode and resize images; 0: as many as `threads`."""
    allow_spinning: bool = True
    """Let threads that shared a batch spin for some milliseconds after it: single images in succession are up to a
    tenth faster; off: the threads take no CPU time between batches. Under full load a batch usually has one thread."""
    max_batch: PositiveInt = 16
    """Largest batch of the engine, in images; up to it, warm-up chooses the best size for each model."""
    hang_factor: Annotated[float, Field(gt=1)] = 20.0
    """A batch counts as hung after this many times its predicted duration, within `hang_min_seconds` and
    `hang_max_seconds`: other processes may take the cores for a while, but hardly 19 twentieths of them."""
    hang_min_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Seconds before which no batch counts as hung, so that a short stall of the machine stops nothing."""
    hang_max_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Seconds after which any run of the engine counts as hung, including the proof and the warm-up of a model, for
    which there is no prediction. It must exceed the slowest run: raise it if TensorRT builds engines while serving."""
    hang_exit_seconds: Annotated[float, Field(ge=0)] = 30.0
    """Seconds that a hung engine gets to recover before the process exits with status 70, to be restarted: native code
    cannot be interrupted."""
    max_consecutive_faults: NonNegativeInt = 20
    """Number of images in a row that a model fails to answer, without one success, after which it is taken out of
    service until it is loaded again; more than a few odd images of one client; 0: never."""
    trim_memory_bytes: NonNegativeInt = 256 * 1024 * 1024
    """Growth of resident memory, in bytes, after which the engines' arenas are trimmed, because a run may need far more
    memory than the runs of warm-up, and the arena would keep it; more than bodies and decoders take and free by turns;
    0: never."""

    max_pending_images: PositiveInt = 256
    """Largest number of images accepted and not yet answered; beyond it requests get 429."""
    reserved_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.25
    """Fraction of `max_pending_images` that is kept for each priority class, so that neither `interactive` nor `batch`
    work can fill the queue and leave the other with 429."""
    batch_share: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    """Fraction of the engine's batches and of the decoders' images that `batch` work gets while `interactive` work
    waits, so that it makes progress under any load."""
    max_pending_bytes: PositiveInt = 256 * 1024 * 1024
    """Largest size of all bodies accepted and not yet answered, in bytes; beyond it requests get 429."""
    large_body_bytes: PositiveInt = 1024 * 1024
    """Size in bytes above which a body is large."""
    large_bodies_fraction: _Fraction = 0.75
    """Fraction of `max_pending_bytes` that large bodies may take together, so that a few large uploads, especially slow
    ones, leave room for ordinary ones."""
    max_body_bytes: PositiveInt = 32 * 1024 * 1024
    """Largest request body, in bytes; beyond it requests get 413."""
    max_images_per_request: PositiveInt = 32
    """Largest number of images in one request."""
    max_pixels: Annotated[int, Field(ge=1, le=MAX_PIXELS)] = 50_000_000
    """Largest image, in pixels, checked before decoding. Pillow itself refuses more than 178,956,970."""
    max_decode_bytes: Annotated[int, Field(ge=64 * 1024 * 1024)] = 1024 * 1024 * 1024
    """Memory that all large images together may take while they are decoded, in bytes, as predicted from their headers:
    further ones wait, and an image that would take more by itself gets 422. The default allows a single image of 40
    megapixels in any format."""
    image_formats: Annotated[_List[_Format], Field(min_length=1)] = FORMATS
    """Image formats that are accepted: fewer formats mean fewer decoders that a hostile file can reach."""
    exact_preprocessing: bool = False
    """Give the model torchvision's pixels (for very long images, within 2 levels). If off, preprocessing takes less
    time: a JPEG that is much larger than the model's input is decoded at 1/2, 1/4 or 1/8 of its size, which changes
    pixels slightly; and only what the crop keeps is resized, which changes one value in thousands by one or two
    levels."""
    body_timeout_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Seconds that a client may take to send its body, before it gets 408."""
    min_upload_rate: NonNegativeInt = 4096
    """Bytes per second below which a client that is sending its body gets 408, measured over `upload_window_seconds`: a
    stalled upload holds its memory no longer than that. Slow mobile networks reach ten times this rate."""
    upload_window_seconds: Annotated[float, Field(gt=0)] = 5.0
    """Seconds over which `min_upload_rate` is measured, so that a short pause is no reason for 408."""

    default_deadline_ms: PositiveInt = 30_000
    """Deadline in milliseconds of requests that set none."""
    max_deadline_ms: PositiveInt = 120_000
    """Longest deadline that a request may set, in milliseconds; longer ones are reduced to it."""
    deadline_margin: _Fraction = 0.8
    """Fraction of its deadline within which a request must be predicted to finish; otherwise it is refused at once."""
    step_up_headroom: _Fraction = 0.5
    """A family steps back up to a more accurate model only if the predicted wait for it is within this fraction of the
    time that the deadline leaves besides that model's own work; below 1, so that the choice does not oscillate. For ten
    seconds after a refusal, this fraction applies to the most accurate model in any case, and larger ones to the
    others, up to 1 for the fastest."""

    config: _Optional[Path] = None
    """TOML file of settings, one `name = value` per line, without tables; relative paths in it are relative to the
    current folder."""
    workers: Annotated[str, AfterValidator(_workers)] = "1"
    """Processes that serve behind one port: a number, or `auto` for one per GPU or, on the CPU, one for every four
    cores. For more than one, see `docs/workers.md`."""
    shutdown_delay_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Seconds of further serving after SIGTERM while `/readyz` answers 503, so that load balancers stop sending
    requests."""
    graceful_timeout_seconds: PositiveInt = 30
    """Seconds that accepted requests may take to finish, after SIGTERM and `shutdown_delay_seconds`."""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = "info"
    """Lowest level of events to log."""
    log_requests: Literal["none", "errors", "all"] = "errors"
    """Requests to log, one line each: `errors` (answered with 4xx or 5xx), `all` or `none`."""
    log_buffer_bytes: PositiveInt = 1024 * 1024
    """Largest size of the log lines that wait to be written, in bytes; beyond it lines are dropped and counted, because
    a reader that is slow or gone must not hold up the service."""
    log_flush_seconds: Annotated[float, Field(ge=0)] = 2.0
    """Seconds that log lines may take to be written at exit, so that a reader that is gone cannot keep the process from
    ending."""
    otlp_endpoint: _Optional[_Url] = None
    """URL of a collector of OpenTelemetry traces (OTLP over HTTP), such as `http://collector:4318/v1/traces`; unset:
    that of `OTEL_EXPORTER_OTLP_ENDPOINT`, else no traces."""

    @field_validator("canary", "shadow")
    @classmethod
    def _are_splits(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        parse_splits("canary" if info.field_name == "canary" else "shadow", value)
        return value

    @model_validator(mode="after")
    def _limits_fit_each_other(self) -> Self:
        for name, bound, consequence in _BOUNDED:
            value, limit = getattr(self, name), getattr(self, bound)
            if value > limit:
                raise ValueError(f"{name} ({value}) exceeds {bound} ({limit}){consequence}")
        of_class = self.max_pending_images - int(self.max_pending_images * self.reserved_fraction)
        if self.max_images_per_request > of_class:
            raise ValueError(
                f"max_images_per_request ({self.max_images_per_request}) exceeds the {of_class} of max_pending_images "
                f"that reserved_fraction ({self.reserved_fraction:g}) leaves to one priority class{_NEVER_ADMITTED}"
            )
        large = int(self.max_pending_bytes * self.large_bodies_fraction)
        if self.max_body_bytes > max(large, self.large_body_bytes):
            raise ValueError(
                f"max_body_bytes ({self.max_body_bytes}) exceeds the {large} of max_pending_bytes that "
                f"large_bodies_fraction ({self.large_bodies_fraction:g}) leaves to large bodies{_NEVER_ADMITTED}"
            )
        if self.workers not in ("0", "1") and self.port == 0:
            raise ValueError("workers need a fixed port, which all of them serve: set port, such as --port 8000")
        if self.guarded_pages and not (self.api_key_hashes or self.admin_key_hash or self.keys_file):
            raise ValueError("guarded_pages needs keys: set api_key_hashes, admin_key_hash or keys_file")
        return self

    @property
    def folder(self) -> Path:
        """The repository, which is a folder. Raises StartupError if it is not."""
        if isinstance(self.repository, Address):
            raise StartupError(f"{self.repository} is not a folder: copy it first")
        return self.repository

    def splits(self) -> tuple[Split, ...]:
        """The splits that `canary` and `shadow` describe."""
        return *parse_splits("canary", self.canary), *parse_splits("shadow", self.shadow)

    def engine_options(self) -> EngineOptions:
        """How engines are run. Raises EngineError if the device is unavailable."""
        return EngineOptions.of(
            self.device,
            threads=self.threads or available_cores(),
            intra_op_threads=self.intra_op_threads,
            max_lanes=self.engine_lanes,
            max_batch=self.max_batch,
            tuning=Tuning(**{field.name: getattr(self, field.name) for field in fields(Tuning)}),
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
        """The sources, by descending priority."""
        config = {**env_settings(), **init_settings()}.get("config")
        in_file = InitSettingsSource(settings_cls, read_file(Path(config)) if config else {})
        return init_settings, env_settings, in_file


def read_file(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, before validation. Raises SettingsError, a ValueError."""
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
            raise SettingsError(f"{path}: unknown table [{key}]: settings are top-level keys")
        raise SettingsError(f"{path}: unknown setting {key!r}: did you mean {near!r}?")
    return values
