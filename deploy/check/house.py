"""What no schema can see: that the parts of a rendered chart fit each other, and that the pod is hardened."""

from collections.abc import Iterator, Sequence
from typing import Any

from deploy.check.fault import Document, title

_THREADS_END_SECONDS = 10
"""Time that the service's threads may take to end, after its delay and its timeout (docs/service.md, The end)."""


def findings(manifests: Sequence[Document]) -> Iterator[str]:
    """What does not fit."""
    (deployment,) = (one for one in manifests if one["kind"] == "Deployment")
    (service,) = (one for one in manifests if one["kind"] == "Service")
    pod = deployment["spec"]["template"]
    yield from _hardening(pod["spec"])
    yield from _ending(pod["spec"])
    yield from _ports(pod["spec"], service)
    labels = pod["metadata"]["labels"]
    for document in manifests:
        if document["kind"] != "ServiceMonitor":
            yield from _selecting(document, labels)
        if document["kind"] in {"HorizontalPodAutoscaler", "ScaledObject"}:
            target = document["spec"]["scaleTargetRef"]["name"]
            if target != deployment["metadata"]["name"]:
                yield f"{title(document)}: scales {target}, which is not the Deployment"
            if "replicas" in deployment["spec"]:
                yield f"{title(deployment)}: spec.replicas would undo what {title(document)} does"
        if document["kind"] == "ServiceMonitor":
            yield from _monitoring(document, service)


def _hardening(spec: Document) -> Iterator[str]:
    (container,) = spec["containers"]
    wanted: dict[str, tuple[Any, Any]] = {
        "enableServiceLinks": (spec.get("enableServiceLinks"), False),
        "automountServiceAccountToken": (spec.get("automountServiceAccountToken"), False),
        "runAsNonRoot": (spec["securityContext"].get("runAsNonRoot"), True),
        "runAsUser": (spec["securityContext"].get("runAsUser"), 10001),
        "seccompProfile": (spec["securityContext"].get("seccompProfile"), {"type": "RuntimeDefault"}),
        "allowPrivilegeEscalation": (container["securityContext"].get("allowPrivilegeEscalation"), False),
        "readOnlyRootFilesystem": (container["securityContext"].get("readOnlyRootFilesystem"), True),
        "capabilities": (container["securityContext"].get("capabilities"), {"drop": ["ALL"]}),
    }
    yield from (
        f"the pod's {name} is {found!r}, not {want!r}" for name, (found, want) in wanted.items() if found != want
    )
    if "memory" not in container["resources"].get("limits", {}):
        yield "the container has no limit of memory"


def _ending(spec: Document) -> Iterator[str]:
    environment = {one["name"]: one["value"] for one in spec["containers"][0]["env"]}
    needs = _THREADS_END_SECONDS + sum(
        int(environment[f"STRIDEVIT_{name}_SECONDS"]) for name in ("SHUTDOWN_DELAY", "GRACEFUL_TIMEOUT")
    )
    if spec["terminationGracePeriodSeconds"] < needs:
        yield f"{spec['terminationGracePeriodSeconds']} s for termination: the service may take {needs} s"


def _ports(spec: Document, service: Document) -> Iterator[str]:
    (container,) = spec["containers"]
    names = {port["name"] for port in container["ports"]}
    used = {port["targetPort"] for port in service["spec"]["ports"]}
    used |= {container[probe]["httpGet"]["port"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    yield from (f"no port of the container is called {name}" for name in sorted(used - names))
    volumes = {volume["name"] for volume in spec["volumes"]}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    yield from (f"the volume {name} is not there, or not mounted" for name in sorted(volumes ^ mounted))


def _selecting(document: Document, labels: dict[str, str]) -> Iterator[str]:
    spec = document.get("spec", {})
    selector = spec.get("podSelector", spec.get("selector", {}))
    chosen = selector.get("matchLabels", {} if "matchLabels" in selector else selector)
    if not chosen.items() <= labels.items():
        yield f"{title(document)}: its selector {chosen} does not match the pod's labels"


def _monitoring(monitor: Document, service: Document) -> Iterator[str]:
    chosen = monitor["spec"]["selector"]["matchLabels"]
    if not chosen.items() <= service["metadata"]["labels"].items():
        yield f"{title(monitor)}: its selector {chosen} does not match the Service's labels"
    names = {port["name"] for port in service["spec"]["ports"]}
    asked = {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]}
    yield from (f"{title(monitor)}: no port of the Service is called {name}" for name in sorted(asked - names))
