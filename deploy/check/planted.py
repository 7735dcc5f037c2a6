"""One error for each check, and more where a check has several ways to fail: each must be found.

An error is a change to something that passes, and the words that must be in the finding.
"""

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from deploy.check import compose, crds, house, kubernetes
from deploy.check.fault import Document, Fault
from deploy.check.helm import CHART, VALUES, lint, template
from deploy.monitoring.__main__ import stale, written

_WRONG_VALUES = {
    "replicas=two": "at '/replicas': got string, want integer",
    "replicas=-1": "at '/replicas': minimum: got -1, want 0",
    "gpu.enabled=yes": "at '/gpu/enabled': got string, want boolean",
    "image.tagg=cpu": "at '/image': additional properties 'tagg' not allowed",
    "models.source=s3": "at '/models/source': value must be one of 'image', 'pvc', 'remote'",
    "models.source=pvc": "models.pvc.claimName is needed with models.source=pvc",
    "models.source=remote": "models.remote.url is needed with models.source=remote",
    "service.port=99999": "at '/service/port': maximum: got 99,999, want 65,535",
    "settings.port=9000": "invalid propertyName 'port'",
    "autoscaling.kind=vpa": "at '/autoscaling/kind': value must be one of 'none', 'hpa', 'keda'",
    "shutdown.delaySeconds=5s": "at '/shutdown/delaySeconds': got string, want integer",
}
"""Wrong values for the chart, and what helm must say about each in one line."""

_Change = Callable[[dict[str, Document]], None]
_Check = Callable[[Sequence[Document]], Iterator[str]]


def _set(kind: str, path: str, value: Any) -> _Change:
    """Change a field of the manifest of a kind; `...` removes it."""

    def change(manifests: dict[str, Document]) -> None:
        *parents, last = path.split("/")
        place: Any = manifests[kind]
        for part in parents:
            place = place[int(part)] if part.isdecimal() else place[part]
        if value is ...:
            del place[last]
        else:
            place[last] = value

    return change


_POD = "spec/template/spec"
_CONTAINER = f"{_POD}/containers/0"
_IN_KUBERNETES: tuple[tuple[_Change, str], ...] = (
    (_set("Deployment", "spec/progressDeadline", 60), "'progressDeadline' was unexpected"),
    (_set("Deployment", f"{_POD}/enableServiceLinks", "false"), "'false' is not of type"),
    (_set("PodDisruptionBudget", "spec/selectors", {}), "'selectors' was unexpected"),
    (_set("NetworkPolicy", "spec/egress", "none"), "'none' is not of type"),
)
_IN_CRDS: tuple[tuple[_Change, str], ...] = (
    (_set("ServiceMonitor", "spec/endpoints/0/intervall", "15s"), "'intervall' was unexpected"),
    (_set("PrometheusRule", "spec/groups/1/rules/0/expr", ...), "'expr' is a required property"),
    (_set("ScaledObject", "spec/triggers/0/metadata/threshold", 0.2), "0.2 is not of type 'string'"),
    (_set("ServingRuntime", "spec/containers", ...), "'containers' is a required property"),
    (_set("InferenceService", "spec/predictor/model/storageURI", "pvc://a"), "'storageURI' was unexpected"),
    (_set("InferenceService", "apiVersion", "serving.kserve.io/v1"), "there is no schema"),
)
_IN_THE_HOUSE: tuple[tuple[_Change, str], ...] = (
    (_set("Deployment", f"{_POD}/enableServiceLinks", True), "enableServiceLinks is True"),
    (_set("Deployment", f"{_CONTAINER}/securityContext/readOnlyRootFilesystem", ...), "readOnlyRootFilesystem is None"),
    (_set("Deployment", f"{_POD}/terminationGracePeriodSeconds", 30), "the service may take 50 s"),
    (_set("Deployment", f"{_CONTAINER}/livenessProbe/httpGet/port", "web"), "no port of the container is called web"),
    (_set("Deployment", f"{_CONTAINER}/volumeMounts", []), "the volume keys is not there, or not mounted"),
    (_set("Deployment", "spec/replicas", 3), "would undo"),
    (_set("Service", "spec/selector", {"app": "stridevit"}), "does not match the pod's labels"),
    (_set("ScaledObject", "spec/scaleTargetRef/name", "other"), "scales other"),
    (_set("ServiceMonitor", "spec/endpoints/0/port", "web"), "no port of the Service is called web"),
)
_IN_COMPOSE: tuple[tuple[str, str, str], ...] = (
    ("pids_limit: 512", "pids_limits: 512", "pids_limits"),
    ("mem_limit: 1g", "mem_limit: [1g]", "mem_limit"),
    ("./monitoring/rules.yaml:", "./monitoring/rule.yaml:", "rule.yaml: a volume"),
)
_IN_TEMPLATES = ("{{ .Values.replicas }}", "{{ .Values.replicas.minimum }}", ".Values.replicas.minimum>")


def missed(manifests: Sequence[Document]) -> Iterator[str]:
    """Plant every error, the first ones in manifests that pass; yields those that are not found."""
    by_kind = {document["kind"]: document for document in manifests}
    for version in kubernetes.VERSIONS:
        yield from _missed(by_kind, _IN_KUBERNETES, partial(kubernetes.findings, version=version))
    yield from _missed(by_kind, _IN_CRDS, crds.findings)
    yield from _missed(by_kind, _IN_THE_HOUSE, house.findings)
    for pair, words in _WRONG_VALUES.items():
        yield from _unraised(partial(template, None, "--set", pair), words)
    with tempfile.TemporaryDirectory() as folder:
        yield from _missed_in_files(Path(folder))


def count() -> int:
    """How many errors `missed` plants."""
    in_kubernetes = len(_IN_KUBERNETES) * len(kubernetes.VERSIONS)
    return in_kubernetes + len(_IN_CRDS) + len(_IN_THE_HOUSE) + len(_WRONG_VALUES) + len(_IN_COMPOSE) + 2


def _missed(by_kind: dict[str, Document], errors: Iterable[tuple[_Change, str]], check: _Check) -> Iterator[str]:
    for change, words in errors:
        changed = copy.deepcopy(by_kind)
        change(changed)
        if not any(words in line for line in check(list(changed.values()))):
            yield f"not found: {words}"


def _unraised(check: Callable[[], object], words: str) -> Iterator[str]:
    """What is missed by a check that must raise Fault with `words` in exactly one line."""
    try:
        check()
    except Fault as fault:
        if len([line for line in str(fault).splitlines() if words in line]) != 1:
            yield f"found, but not said in one line ({words}): {fault}"
    else:
        yield f"not found: {words}"


def _missed_in_files(folder: Path) -> Iterator[str]:
    before, after, words = _IN_TEMPLATES
    chart = Path(shutil.copytree(CHART, folder / "chart"))
    _replace(chart / "templates" / "deployment.yaml", before, after)
    yield from _unraised(lambda: lint(VALUES / "small.yaml", chart=chart), words)
    for before, after, words in _IN_COMPOSE:
        file = Path(shutil.copy(compose.FILE, folder))
        _replace(file, before, after)
        yield from _unraised(partial(compose.check, file), words)
    rules = next(file for file in written() if file.name == "rules.yaml")
    if stale({rules: rules.read_text(encoding="utf-8").replace("0.144", "0.2")}) != [rules]:
        yield "not found: another limit in rules.yaml"


def _replace(file: Path, before: str, after: str) -> None:
    text = file.read_text(encoding="utf-8")
    if before not in text:
        raise Fault(f"{file.name} has no {before!r} any more: change deploy/check/planted.py")
    file.write_text(text.replace(before, after), encoding="utf-8")
