"""What must hold on two Ray nodes, run for real inside the namespaces of `enclosure.run`.

    python -m tests.cluster.ray.scenarios NAME... --out FILE --folder DIR --repository DIR --model NAME

Writes what each counted to FILE, as JSON. The interpreter needs `stridevit[cpu,ray]`.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.cluster.ray.load import Load, Tally, pictures
from tests.cluster.ray.nodes import Cluster, cpu_seconds, wait_for

DRAINING_SECONDS = 10.0
"""A third of Ray's default: here only HAProxy on the same machine has to notice that a replica goes."""
REQUESTS, KILLS = 2000, 3
_CONNECTIONS = 16
_TIMED_REQUESTS = 600

Counts = dict[str, Any]


class Rows(list[Counts]):
    """Counts, each printed as soon as it is there."""

    def add(self, row: Counts) -> None:
        """Add and print a row."""
        print(json.dumps(row), flush=True)
        self.append(row)


def config(repository: Path, model: str, *, args: Mapping[str, Any] | None = None, **deployment: Any) -> Counts:
    """deploy/ray.yaml for two nodes on one machine."""
    ray_yaml = Path(__file__).parents[3] / "deploy" / "ray.yaml"
    made: Counts = read_yaml(ray_yaml)
    # Two HAProxies on one machine would want the same port.
    made["proxy_location"], made["http_options"]["host"] = "HeadOnly", "127.0.0.1"
    (app,) = made["applications"]
    app["args"] = {"repository": str(repository), "models": model, **(args or {})}
    (mine,) = app["deployments"]
    if "num_replicas" in deployment:
        del mine["autoscaling_config"]
    for name, value in deployment.items():
        mine[name] = {**mine.get(name, {}), **value} if isinstance(value, dict) else value
    return made


def read_yaml(file: Path) -> Any:
    """A YAML file, by the parser that Ray brings."""
    import yaml

    return yaml.safe_load(file.read_text(encoding="utf-8"))


async def kill(cluster: Cluster, made: Callable[..., Counts], model: str) -> list[Counts]:
    """Kill the worker node under load, three times."""
    await asyncio.to_thread(cluster.deploy, made(num_replicas=2))
    counts = Rows()
    for _ in range(KILLS):
        replicas = await asyncio.to_thread(cluster.wait_for_replicas, 2)
        assert len({one.node for one in replicas}) == 2, "both replicas are on one node"
        load = Load(model, pictures())
        await load.run(_CONNECTIONS, load.reaches(REQUESTS // 3))
        running = asyncio.create_task(load.run(_CONNECTIONS, load.reaches(REQUESTS)))
        await asyncio.sleep(1)  # requests are in flight, and further ones follow
        counts.add({"processes_killed": cluster.kill_worker(), **(await running).as_dict()})
        await asyncio.to_thread(cluster.start_worker)
    return counts


async def scale(cluster: Cluster, made: Callable[..., Counts], model: str) -> list[Counts]:
    """Little load, much, and little again: one replica, two, and one."""
    policy = {"policy_function": "service.ray_app:ByDrain", "policy_kwargs": {"drain_seconds": 0.2, "busy": 0.8}}
    scaling = {"max_replicas": 2, "look_back_period_s": 12, "upscale_delay_s": 1, "downscale_delay_s": 5}
    await asyncio.to_thread(cluster.deploy, made(autoscaling_config={**scaling, "policy": policy}))
    load, counts = Load(model, pictures()), Rows()
    for connections, pause, wanted in ((1, 0.5, 1), (64, 0.0, 2), (1, 0.5, 1)):
        began = time.monotonic()
        reached = asyncio.create_task(asyncio.to_thread(cluster.wait_for_replicas, wanted))
        await load.run(connections, reached.done, pause_seconds=pause)
        # More requests, to the replicas that there are now.
        tally = await load.run(connections, load.reaches(load.sent + 20 * connections), pause_seconds=pause)
        row = {"connections": connections, "replicas": len(await reached), **tally.as_dict()}
        counts.add({**row, "seconds": round(time.monotonic() - began, 1)})
    return counts


async def redeploy(cluster: Cluster, made: Callable[..., Counts], model: str) -> list[Counts]:
    """Deploy a changed configuration under load: every replica is replaced."""
    await asyncio.to_thread(cluster.deploy, made(num_replicas=2))
    old = {one.pid for one in await asyncio.to_thread(cluster.wait_for_replicas, 2)}
    load = Load(model, pictures())

    def replaced() -> bool:
        cluster.deploy(made(num_replicas=2, args={"max_batch": 4}))
        return bool(wait_for(lambda: len(new := cluster.replicas()) == 2 and not old & {one.pid for one in new}, "new"))

    done = asyncio.create_task(asyncio.to_thread(replaced))
    tally = await load.run(_CONNECTIONS, lambda: done.done() and load.sent >= REQUESTS)
    counts = Rows()
    counts.add({"replaced": await done, **tally.as_dict()})
    return counts


async def throughput(cluster: Cluster, made: Callable[..., Counts], model: str) -> list[Counts]:
    """One replica against two, in the order 1 2 2 1, with what CPU each part took."""
    counts = Rows()
    for wanted in (1, 2, 2, 1):
        await asyncio.to_thread(cluster.deploy, made(num_replicas=wanted))
        before = await asyncio.to_thread(cluster.wait_for_replicas, wanted)
        load, everything = Load(model, pictures()[:1]), cpu_seconds()
        front, own = cpu_seconds("haproxy"), time.process_time()
        tally: Tally = await load.run(_CONNECTIONS, load.reaches(_TIMED_REQUESTS))
        own, front, everything = time.process_time() - own, cpu_seconds("haproxy") - front, cpu_seconds() - everything
        used = sum(one.cpu_seconds for one in cluster.replicas()) - sum(one.cpu_seconds for one in before)
        per_request = {"replica": used, "front": front, "generator": own, "ray": everything - used - front - own}
        cpu_ms = {name: round(1000 * value / tally.answered, 2) for name, value in per_request.items()}
        counts.add({"replicas": wanted, **tally.as_dict(), "cpu_ms": cpu_ms})
    return counts


SCENARIOS = {"kill": kill, "scale": scale, "redeploy": redeploy, "throughput": throughput}


def main() -> None:
    """Run scenarios, one after the other on one new cluster."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="+", choices=SCENARIOS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="empty folder with a short path, for Ray")
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--model", required=True)
    asked = parser.parse_args()

    def made(**options: Any) -> Counts:
        return config(asked.repository, asked.model, **options)

    cluster = Cluster(asked.folder, draining_seconds=DRAINING_SECONDS)
    cluster.start_head()
    cluster.start_worker()
    cluster.connect()
    counts = {name: asyncio.run(SCENARIOS[name](cluster, made, asked.model)) for name in asked.names}
    asked.out.write_text(json.dumps(counts), encoding="utf-8")


if __name__ == "__main__":
    main()
