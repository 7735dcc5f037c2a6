"""`make deploy-check`: drift, Helm, Kubernetes, custom resources, Compose; then errors that must be found."""

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

from deploy.check import compose, crds, house, kubernetes, planted
from deploy.check.fault import Document, Fault, documents
from deploy.check.helm import ROOT, VALUES, lint, template
from deploy.monitoring.__main__ import stale, written

_SETS = sorted(VALUES.glob("*.yaml"))
_EXAMPLES = {name: sorted((ROOT / "deploy" / name).glob("*.yaml")) for name in ("kserve", "kuberay")}


def drift() -> str:
    """Whether the generated files are what the code makes."""
    files = written()
    Fault.of(f"{file.relative_to(ROOT)} differs from the code: make monitoring" for file in stale(files))
    return f"{len(files)} files are as deploy/monitoring makes them"


def charts() -> dict[str, list[Document]]:
    """The chart, linted and rendered with each set of values."""
    for values in _SETS:
        lint(values)
    return {values.stem: list(documents(template(values))) for values in _SETS}


def of_kubernetes(rendered: dict[str, list[Document]]) -> str:
    """All manifests against each version."""
    for version in kubernetes.VERSIONS:
        Fault.of(_in_each(rendered, partial(kubernetes.findings, version=version)))
    return f"{len(rendered)} sets are valid for Kubernetes {', '.join(kubernetes.VERSIONS)}"


def of_crds(rendered: dict[str, list[Document]]) -> str:
    """All custom resources against their definitions."""
    Fault.of(_in_each(rendered, crds.findings))
    kinds = sorted({one["kind"] for manifests in rendered.values() for one in filter(crds.is_custom, manifests)})
    return f"custom resources are valid: {', '.join(kinds)}"


def of_the_house(rendered: dict[str, list[Document]]) -> str:
    """Whether the parts fit each other."""
    Fault.of(_in_each(rendered, house.findings))
    return "the pods are hardened, and selectors, ports, volumes and times fit"


def _in_each(rendered: dict[str, list[Document]], check: Callable[[list[Document]], Iterator[str]]) -> Iterator[str]:
    return (f"{name}: {line}" for name, manifests in rendered.items() for line in check(manifests))


def of_compose() -> str:
    """Whether Compose accepts the file."""
    compose.check()
    return f"compose.yaml is valid, also with the profiles {' and '.join(compose.PROFILES)}"


def errors(rendered: dict[str, list[Document]], examples: dict[str, list[Document]]) -> str:
    """Whether planted errors are found."""
    Fault.of(planted.missed([*rendered["production"], *examples["kserve"]]))
    return f"{planted.count()} planted errors are found"


def main() -> None:
    """Run every check; ends with 1 at the first that finds something."""
    started = time.monotonic()

    def said(line: str) -> None:
        print(f"{time.monotonic() - started:5.1f} s  {line}", flush=True)

    try:
        said(drift())
        rendered = charts()
        said(f"helm lint and template: {', '.join(rendered)}")
        examples = {
            name: [document for file in files for document in documents(file.read_text(encoding="utf-8"))]
            for name, files in _EXAMPLES.items()
        }
        said(of_the_house(rendered))
        said(of_kubernetes(rendered))
        said(of_crds({**rendered, **examples}))
        said(of_compose())
        said(errors(rendered, examples))
    except Fault as fault:
        sys.exit(f"deploy-check: {fault}")


if __name__ == "__main__":
    main()
