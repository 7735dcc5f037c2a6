"""API keys: what each may do, how much of it, and until when. Independent of HTTP.

The service knows only hashes of the keys, so that neither its settings nor its memory give a key away.
"""

import hashlib
import hmac
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Final, Literal, Self, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, PositiveInt, model_validator

from service.errors import KeyLimited

Scope = Literal["classify", "read", "admin"]
"""`classify`: images; `read`: metrics and /docs; `admin`: loading and unloading; any of them: models' metadata."""
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)

_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}$"
_UNKNOWN_SECONDS = 1.0
"""Assumed duration of a key's requests until one of them has ended."""


def key_hash(value: str) -> str:
    """`value` if it is a SHA-256 in hexadecimal, in lower case. Raises ValueError."""
    digest = value.strip().lower()
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        # Without the value: it may be the key itself.
        raise ValueError("must be 64 hexadecimal digits, the SHA-256 of a key: `stridevit key` generates both")
    return digest


class KeyEntry(BaseModel):
    """One key, as an entry of the file of keys describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: Annotated[str, Field(pattern=_NAME)]
    sha256: Annotated[str, AfterValidator(key_hash), Field(repr=False)]
    scopes: Annotated[frozenset[Scope], Field(min_length=1)]
    requests_per_second: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Long-term rate of requests; unset: no limit."""
    burst: PositiveInt | None = None
    """Largest burst of requests within that rate; unset: those of one second, at least one."""
    max_concurrent: PositiveInt | None = None
    """Requests in progress at once; unset: no limit."""
    expires: AwareDatetime | None = None
    """From then on the key is refused."""

    @model_validator(mode="after")
    def _burst_belongs_to_a_rate(self) -> Self:
        if self.burst is not None and self.requests_per_second is None:
            raise ValueError("burst needs requests_per_second")
        return self

    def as_toml(self) -> str:
        """The entry as it stands in the file of keys."""
        values: dict[str, str] = {"name": f'"{self.name}"', "sha256": f'"{self.sha256}"'}
        values["scopes"] = "[" + ", ".join(f'"{scope}"' for scope in SCOPES if scope in self.scopes) + "]"
        for name in ("requests_per_second", "burst", "max_concurrent"):
            if (value := getattr(self, name)) is not None:
                values[name] = f"{value:g}" if isinstance(value, float) else str(value)
        if self.expires:
            values["expires"] = self.expires.isoformat()
        return "\n[[keys]]\n" + "".join(f"{name} = {value}\n" for name, value in values.items())


class Usage:
    """How the key of one name was used. It outlives the entry, so that a reload resets no limit."""

    elsewhere = 0
    """Requests in progress in other processes that share the limit."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.in_work = 0
        self.statuses: Counter[int] = Counter()
        """Answers by status."""
        self._clock = clock
        self._tokens, self._refilled_at = 0.0, -1e9
        self._mean_seconds: float | None = None

    def begin(self, entry: KeyEntry) -> float:
        """Count one more request in progress; `end` takes the result. Raises KeyLimited: then do not call `end`."""
        started = self._clock()
        if entry.max_concurrent is not None and self.in_work + self.elsewhere >= entry.max_concurrent:
            mean = _UNKNOWN_SECONDS if self._mean_seconds is None else self._mean_seconds
            raise KeyLimited(
                f"key {entry.name} may have {entry.max_concurrent} requests in progress at once: retry when one ends",
                reason="key-concurrency",
                # One of them ends in each such interval, on average.
                retry_after_s=mean / entry.max_concurrent,
            )
        if entry.requests_per_second is not None:
            self._take_token(entry, entry.requests_per_second, started)
        self.in_work += 1
        return started

    def end(self, started: float) -> None:
        """Count a request as ended."""
        self.in_work -= 1
        seconds = self._clock() - started
        mean = seconds if self._mean_seconds is None else self._mean_seconds
        self._mean_seconds = mean + 0.1 * (seconds - mean)

    def _take_token(self, entry: KeyEntry, rate: float, now: float) -> None:
        burst = entry.burst or max(1.0, rate)
        self._tokens = min(burst, self._tokens + max(0.0, now - self._refilled_at) * rate)
        self._refilled_at = now
        if self._tokens < 1:
            raise beyond_rate(entry, (1 - self._tokens) / rate)
        self._tokens -= 1


def beyond_rate(entry: KeyEntry, retry_after_s: float) -> KeyLimited:
    """The error of a request beyond its key's rate."""
    return KeyLimited(
        f"key {entry.name} may send {entry.requests_per_second:g} requests per second: retry later",
        reason="key-rate",
        retry_after_s=retry_after_s,
    )


class Key:
    """A key that is accepted, as long as it has not expired."""

    __slots__ = ("_expires", "digest", "entry", "name", "scopes", "usage")

    def __init__(self, entry: KeyEntry, usage: Usage) -> None:
        self.entry, self.name, self.scopes, self.usage = entry, entry.name, entry.scopes, usage
        self.digest = bytes.fromhex(entry.sha256)
        self._expires = entry.expires.timestamp() if entry.expires else None

    def expired(self, now: float) -> bool:
        """Whether it has expired by `now`, in seconds since the epoch."""
        return self._expires is not None and now >= self._expires

    def __repr__(self) -> str:
        return f"Key({self.name!r})"


class KeyRing(Collector):
    """The keys that are accepted. It is replaced as a whole by another thread, and read by the event loop.

    As a collector it gives the metrics of each key by name; there are as many series as keys in use.
    """

    def __init__(
        self,
        entries: Iterable[KeyEntry] = (),
        *,
        clock: Callable[[], float] = time.perf_counter,
        usage: Callable[[str], Usage] | None = None,
    ) -> None:
        """`usage` creates the Usage for the key of a name. Raises ValueError if two entries have the same name or the
        same hash."""
        self._usage = usage or (lambda _: Usage(clock))
        self._by_digest: dict[bytes, Key] = {}
        self.replace(entries)

    def replace(self, entries: Iterable[KeyEntry]) -> None:
        """Accept these keys and no others from here on. Raises ValueError, and then the old ones stay."""
        usages = {key.name: key.usage for key in self.keys}
        found: dict[bytes, Key] = {}
        names: set[str] = set()
        for entry in entries:
            key = Key(entry, usages.get(entry.name) or self._usage(entry.name))
            if key.name in names:
                raise ValueError(f"two keys have the name {key.name!r}")
            if key.digest in found:
                raise ValueError(f"{found[key.digest].name!r} and {key.name!r} are the same key")
            names.add(key.name)
            found[key.digest] = key
        self._by_digest = found

    @property
    def keys(self) -> Sequence[Key]:
        """All of them."""
        return tuple(self._by_digest.values())

    def find(self, offered: str) -> Key | None:
        """The key that was offered, found in a time that reveals nothing about the others.

        The place in the table depends on a hash of the SHA-256, keyed with a secret of this process, and whoever offers
        a key cannot choose its SHA-256: so only the final comparison could reveal how close an offered key came.
        """
        digest = digest_of(offered)
        key = self._by_digest.get(digest)
        return key if key is not None and hmac.compare_digest(digest, key.digest) else None

    def collect(self) -> Iterator[Metric]:
        """The metrics of each key."""
        answered = CounterMetricFamily(
            "stridevit_key_requests", "Requests answered, by name of the key and status.", labels=["key", "status"]
        )
        in_work = GaugeMetricFamily(
            "stridevit_key_requests_in_work", "Requests in progress, by name of the key.", labels=["key"]
        )
        for key in self.keys:
            in_work.add_metric([key.name], key.usage.in_work)
            for status, count in tuple(key.usage.statuses.items()):
                answered.add_metric([key.name, str(status)], count)
        yield from (answered, in_work)


def new_key() -> tuple[str, str]:
    """A random key of 256 bits, and the hash by which the service knows it."""
    key = secrets.token_urlsafe(32)
    return key, digest_of(key).hex()


def digest_of(key: str) -> bytes:
    """SHA-256 of a key."""
    # Neither salt nor a slow hash: a key is random, not chosen, so there is no dictionary to try.
    # "surrogatepass", since a header may hold anything and must be refused without an exception.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
