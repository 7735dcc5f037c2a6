"""`index.json` of a repository on a web server, which cannot list what it holds.

    {"schema_version": 1, "models": {"<name>": {"<version>": "<SHA-256 of its SHA256SUMS>"}}}

Through the digests, one small file vouches for every file of the repository: whoever protects it protects all.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.bundle import content_digest, list_repository, parse_key
from service.remote.store import Key

INDEX_FILE: Final = "index.json"
MAX_INDEX_BYTES: Final = 8 * 1024 * 1024
"""About 80,000 versions."""

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Index(BaseModel):
    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    schema_version: Literal[1]
    models: dict[str, dict[str, _Digest]]


def parse_index(text: bytes) -> dict[Key, str]:
    """The digest of each version. Raises ValueError for anything but an index."""
    try:
        index = _Index.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{INDEX_FILE}: {where}: {first['msg']}: write it with `stridevit export index`") from None
    digests: dict[Key, str] = {}
    for name, versions in index.models.items():
        for version, digest in versions.items():
            key = parse_key(f"{name}/{version}")
            if key is None:
                raise ValueError(f"{INDEX_FILE}: {name!r}, version {version!r}, is not the name of a bundle")
            digests[key] = digest
    return digests


def write_index(repository: Path) -> int:
    """Write the index of a repository into its folder, by rename, and return how many versions it lists.

    Raises BundleError if the repository, or a `SHA256SUMS` in it, cannot be read, and OSError.
    """
    models = {
        name: {str(version): content_digest(repository / name / str(version)) for version in versions}
        for name, versions in list_repository(repository).versions.items()
    }
    text = json.dumps({"schema_version": 1, "models": models}, indent=1) + "\n"
    descriptor, path = tempfile.mkstemp(prefix=".index-", dir=repository)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as stream:
            stream.write(text)
        Path(path).chmod(0o644)
        Path(path).replace(repository / INDEX_FILE)
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise
    return sum(map(len, models.values()))
