"""Detect another project's package under the name of one of ours: PyPI has a `service`, and such names are common.

The packages lie side by side, installed or in a checkout, so each has exactly one right place.
"""

import base64
import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Final

DISTRIBUTION: Final = "stridevit"
PACKAGES: Final = ("training", "export", "service", "loadtests")
_REMEDY: Final = "install StrideViT into a separate environment"


def collision() -> str | None:
    """The error if Python would import another project's package instead of one of ours; None if it would not."""
    for package in PACKAGES:
        found, ours = _found(package), Path(__file__).parents[1] / package
        if found is not None and found.resolve() != ours.resolve():
            return (
                f"Python finds another project's package '{package}' in {found}: "
                f"remove it from PYTHONPATH and the current folder, or {_REMEDY}"
            )
        if changed := _changed_file(package):
            others = sorted({*importlib.metadata.packages_distributions().get(package, [])} - {DISTRIBUTION})
            by = f" by the distribution '{', '.join(others)}', which has a package '{package}' too" if others else ""
            return f"{changed} was overwritten{by}: {_REMEDY}"
    return None


def _found(package: str) -> Path | None:
    """The folder from which Python imports `package`, or the file of a module of that name; None if there is none."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin or package)


def _changed_file(package: str) -> Path | None:
    """A file of the package that differs from what was installed. An editable installation records none."""
    try:
        files = importlib.metadata.distribution(DISTRIBUTION).files or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return None
    for file in files:
        path = Path(str(file.locate()))
        if file.parts[0] == package and file.hash is not None and path.is_file():
            digest = hashlib.new(file.hash.mode, path.read_bytes()).digest()
            if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
                return path
    return None
