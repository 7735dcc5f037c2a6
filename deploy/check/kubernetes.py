"""Checks manifests against the schemas of several versions of Kubernetes, strictly: no unknown fields."""

from collections.abc import Iterable, Iterator

import kubernetes_validate

from deploy.check.crds import is_custom
from deploy.check.fault import Document, title

VERSIONS = ("1.29", "1.31", "1.33", "1.35", "1.37")


def findings(manifests: Iterable[Document], version: str) -> Iterator[str]:
    """What is wrong with manifests of Kubernetes' own kinds; custom resources are left to `deploy.check.crds`."""
    for document in manifests:
        if is_custom(document):
            continue
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            place = ".".join(map(str, error.path))
            yield f"{title(document)}, Kubernetes {version}: {place}: {error.message[:200]}"
