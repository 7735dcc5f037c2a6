"""The chart's pod for `podman play kube`: `python -m deploy.check.pod IMAGE:TAG PORT` prints it.

It is what Helm renders with deploy/helm/values/small.yaml, for one image, two of its models and a port of this machine.
"""

import sys

import yaml

from deploy.check.fault import documents
from deploy.check.helm import VALUES, template

_MODELS = 'settings.models=["cifar100-csra-r2", "cifar100-csra-r4"]'
"""Proving all of them takes minutes on a busy machine."""


def pod(image: str, port: int) -> str:
    """The Deployment and its ConfigMap as YAML; the container's port is published on 127.0.0.1."""
    repository, _, tag = image.rpartition(":")
    chosen = f"image.repository={repository},image.tag={tag},image.pullPolicy=Never"
    found = [
        document
        for document in documents(template(VALUES / "small.yaml", "--set", chosen, "--set-json", _MODELS))
        if document["kind"] in {"Deployment", "ConfigMap"}
    ]
    (deployment,) = (document for document in found if document["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    container["ports"][0].update(hostPort=port, hostIP="127.0.0.1")
    return str(yaml.safe_dump_all(found, sort_keys=False))


if __name__ == "__main__":
    print(pod(sys.argv[1], int(sys.argv[2])))
