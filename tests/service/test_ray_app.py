"""The one file that sees Ray, and the files that configure it. What happens on real nodes is in tests/cluster/ray."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings
from tests.cluster.ray.enclosure import variables
from tests.processes import PATIENCE_SECONDS, ROOT

RAY_YAML = ROOT / "deploy" / "ray.yaml"
RAY_SERVICE = ROOT / "deploy" / "kuberay" / "rayservice.yaml"

IN_RAY = """
import json, sys
from types import SimpleNamespace as Space
from service import ray_app
from service.ray_app import ByDrain, Replica, build
from ray import cloudpickle
from ray.serve.schema import ServeDeploySchema

def context(target=1, **metrics):
    named = {name: dict(enumerate(values)) for name, values in metrics.items()}
    return Space(aggregated_metrics=named or None, target_num_replicas=target)

results = []
for line in json.load(sys.stdin):
    try:
        results.append(eval(line))
    except Exception as error:
        results.append(f"{type(error).__name__}: {error}")
print(json.dumps(results))
"""


def in_ray(*lines: str, **environment: str) -> list[Any]:
    """What each expression gives, or its error, in a process that has Ray."""
    python = os.environ.get("STRIDEVIT_RAY_PYTHON")
    if not python:
        pytest.skip("needs Ray: set STRIDEVIT_RAY_PYTHON to a Python with stridevit[cpu,ray]")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "STRIDEVIT_"))}
    done = subprocess.run(
        [python, "-c", IN_RAY],
        input=json.dumps(lines),
        cwd=ROOT,
        env={**clean, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=PATIENCE_SECONDS,
    )
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def read(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "service.ray_app", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'stridevit\[ray\]'"):
        importlib.import_module("service.ray_app")


def test_the_file_stays_small() -> None:
    assert len((ROOT / "service" / "ray_app.py").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_settings_in_the_configuration_exist() -> None:
    (application,) = read(RAY_YAML)["applications"]
    assert application["import_path"] == "service.ray_app:build"
    assert set(application["args"]) <= set(Settings.model_fields)
    for name in application["runtime_env"]["env_vars"]:
        assert name.removeprefix("STRIDEVIT_").lower() in Settings.model_fields


def test_the_rayservice_has_the_same_configuration() -> None:
    service, plain = read(RAY_SERVICE)["spec"], read(RAY_YAML)
    own = yaml.safe_load(service["serveConfigV2"])
    for made in (own, plain):
        (application,) = made["applications"]
        del application["args"]["repository"]
        (deployment,) = application["deployments"]
        # What depends on the size of the cluster.
        del deployment["ray_actor_options"]
        for name in ("min_replicas", "max_replicas"):
            del deployment["autoscaling_config"][name]
    assert own == plain
    cluster = service["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert {one["name"]: one["value"] for one in container["env"]} == variables()


def test_ray_takes_the_configuration() -> None:
    config = read(RAY_YAML)
    policy = config["applications"][0]["deployments"][0]["autoscaling_config"]["policy"]
    assert policy["policy_function"] == "service.ray_app:ByDrain"
    found = in_ray(
        f"len(ServeDeploySchema.model_validate({config!r}).applications)",
        f"ByDrain(**{policy['policy_kwargs']!r}).limits",
        f"build({config['applications'][0]['args']!r})._bound_deployment.name",
        **variables(),
    )
    assert found == [1, policy["policy_kwargs"], config["applications"][0]["deployments"][0]["name"]]


def test_bad_arguments_are_refused_before_any_replica_starts() -> None:
    unknown, wrong, rays = in_ray(
        "build({'repositry': 'models'})", "build({'max_batch': 0})", "build({'port': 80})", **variables()
    )
    assert unknown.startswith("ValueError: args: repositry")
    assert wrong.startswith("ValueError: args: max_batch: ")
    assert rays == "ValueError: args: port: connections are Ray's; see docs/ray.md, Settings"


def test_nodes_without_haproxy_are_refused() -> None:
    (found,) = in_ray("build({})")
    assert "RAY_SERVE_ENABLE_HA_PROXY is not 1" in found
    assert "deploy/ray.env" in found


def test_ray_pickles_a_reference_to_the_class() -> None:
    size, kept = in_ray("len(cloudpickle.dumps(Replica))", "cloudpickle.loads(cloudpickle.dumps(Replica)) is Replica")
    assert size < 100
    assert kept is True


def test_replicas_follow_the_drain_time_and_the_use_of_the_device() -> None:
    policy = "ByDrain(drain_seconds=0.5, busy=0.7)"
    cases = {
        "context(drain_seconds=[0.1], busy=[0.2])": 1,
        "context(drain_seconds=[1.2], busy=[0.2])": 3,
        # Two replicas that are busy stay, although each is done at once.
        "context(drain_seconds=[0.01, 0.01], busy=[0.6, 0.7])": 2,
        "context(drain_seconds=[0.01, 0.01], busy=[0.7, 0.7])": 2,
        "context(drain_seconds=[0.0], busy=[0.0])": 1,
        # Replicas that have not reported yet are no reason to stop others.
        "context(target=3)": 3,
    }
    found = in_ray(*(f"{policy}({case})" for case in cases))
    assert [wanted for wanted, _ in found] == list(cases.values())


def test_wrong_limits_of_the_policy_are_refused() -> None:
    for error in in_ray("ByDrain(drain_seconds=0)", "ByDrain(busy=1.5)"):
        assert error.startswith("ValueError: policy_kwargs: ")
