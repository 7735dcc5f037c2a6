"""Settings of the service. Each can be set as STRIDEVIT_<NAME> in the environment; the common ones are flags too."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, PositiveInt, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    """What the service is asked to be."""

    model_config = SettingsConfigDict(env_prefix="STRIDEVIT_", frozen=True)

    repository: Path = Path("models")
    """Folder of bundles: <name>/<version>/."""
    models: Annotated[tuple[str, ...], NoDecode] = ()
    """Names of the models to serve, separated by commas; empty for all in the repository."""
    default_model: str | None = None
    """What answers a request that names no model; unset: the one with the highest top-1."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 for any free one."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or tensorrt. One that cannot be had is an error, never a silent fall back."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Threads of the engine and of the decode pool, each; 0 for the cores that this process may use."""
    max_batch: PositiveInt = 16
    """Images that the engine takes at once, at most."""
    max_pending: PositiveInt = 256
    """Images accepted and not yet answered, at most; beyond it requests get 429."""
    max_body_bytes: PositiveInt = 32 * 1024 * 1024
    """Largest request body."""
    max_images: PositiveInt = 32
    """Images in one multipart request, at most."""
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 50_000_000
    """Largest image, checked before decoding. Pillow itself refuses more than 178,956,970 pixels."""
    read_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How long a client may take to send its body, before it gets 408."""
    grace_seconds: Annotated[float, Field(ge=0)] = 0.0
    """After SIGTERM, how long to serve on while /readyz says 503, so that load balancers can turn away first."""
    drain_seconds: PositiveInt = 30
    """After SIGTERM, how long accepted requests may take to finish."""
    log_level: str = "info"
    """debug, info, warning or error."""

    @field_validator("models", mode="before")
    @classmethod
    def _split_names(cls, names: object) -> object:
        return [name.strip() for name in names.split(",") if name.strip()] if isinstance(names, str) else names

    @model_validator(mode="after")
    def _largest_request_fits(self) -> Self:
        if self.max_images > self.max_pending:
            raise ValueError(
                f"max_images ({self.max_images}) exceeds max_pending ({self.max_pending}): "
                "the largest request could never be admitted"
            )
        return self
