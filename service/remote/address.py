"""The address of a repository that is not a folder. Its text never shows credentials."""

import hashlib
import ipaddress
import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote, urlsplit

SCHEMES: Final = ("s3", "gs", "https")
_PLACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:]+\]")
_PATH = re.compile(r"(?:/(?!\.\.?(?:/|$))[A-Za-z0-9._~!$'()+,;=@ -]+)*")


@dataclass(frozen=True, kw_only=True)
class Address:
    """`s3://bucket/folder`, `gs://bucket/folder` or `https://host/folder`."""

    scheme: str
    place: str
    """The bucket, or the host and its port."""
    path: str
    """Without a slash at either end; empty for the top."""
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)

    @property
    def url(self) -> str:
        """The address without credentials."""
        return f"{self.scheme}://{self.place}" + (f"/{self.path}" if self.path else "")

    def __str__(self) -> str:
        return self.url.replace("://", "://***@", 1) if self.user else self.url

    @property
    def folder_name(self) -> str:
        """A name for its folder in the cache, unique to this address."""
        readable = re.sub(r"[^A-Za-z0-9.-]", "-", self.place)[:60]
        return f"{self.scheme}-{readable}-{hashlib.sha256(self.url.encode()).hexdigest()[:16]}"


def is_address(text: str) -> bool:
    """Whether a text is meant as an address, and not as the path of a folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def parse_address(text: str) -> Address:
    """Parse an address. Raises ValueError, whose message repeats nothing that may be a secret."""
    parts = urlsplit(text)
    scheme = parts.scheme.lower()
    if scheme not in (*SCHEMES, "http"):
        raise ValueError(f"unknown kind of repository {scheme}://: use a folder, s3://, gs:// or https://")
    if parts.query or parts.fragment:
        raise ValueError("the address of a repository must not contain ? or #: name the folder above the models")
    credentials, _, place = parts.netloc.rpartition("@")
    if credentials and scheme in ("s3", "gs"):
        raise ValueError(f"{scheme}:// takes its credentials from the environment, not from the address")
    host, port = _host_and_port(place)
    if scheme == "http" and not _is_loopback(host):
        raise ValueError("http:// would let anybody on the way change the models: use https://")
    if port and scheme in ("s3", "gs"):
        raise ValueError(f"{scheme}://BUCKET/FOLDER takes no port: AWS_ENDPOINT_URL names another server for s3://")
    path = parts.path.rstrip("/")
    if not _PATH.fullmatch(path):
        raise ValueError("the folder in the address of a repository has an empty part, a dot or an odd character")
    user, _, password = credentials.partition(":")
    return Address(scheme=scheme, place=place, path=path.lstrip("/"), user=unquote(user), password=unquote(password))


def _host_and_port(place: str) -> tuple[str, str]:
    match = re.fullmatch(rf"(?P<host>{_PLACE.pattern})(?::(?P<port>[0-9]{{1,5}}))?", place)
    if match is None:
        raise ValueError("the address of a repository names no bucket or host: write it as s3://bucket/models")
    return match["host"], match["port"] or ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
