"""What a rate of requests and a p99 need: workers, cores, memory, network, machines and balancers.

A worker is an M/D/c queue: c is its number of cores, and a request takes the measured CPU time on one of them. Requests
are assumed to be assigned to workers at random. That is the worst case for several machines behind an ordinary
balancer; with a front that picks the least busy worker, requests wait less. So, by this model, the tail is not longer
than stated. The model leaves out differences between requests, batches, and whatever else the system does.
"""

import math
from dataclasses import dataclass, field
from functools import cache

from loadtests.capacity.queueing import DeterministicQueue
from loadtests.errors import LoadTestError

BALANCER_LOAD = 0.5
"""Share of a balancer's cores that may be in use, so that one of two may fail."""
NETWORK_LOAD = 0.7
"""Share of a machine's network that may be in use."""
LOOP_LOAD = 0.7
"""Share of the one thread of a worker's event loop that may be in use."""
_STEPS = 200
"""Steps into which the loads of a worker are divided."""


class SizingError(LoadTestError):
    """The target cannot be reached; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of a model behind a front, measured by `loadtest fronts`."""

    worker_cpu_ms: float
    """CPU time of a worker for a request."""
    front_cpu_ms: float
    """The same for the front."""
    loop_cpu_ms: float
    """The part of `worker_cpu_ms` in the thread of the event loop. It is one thread, however many cores there are."""
    alone_ms: float
    """Median latency of a request to an idle service."""
    worker_bytes: float
    front_bytes: float
    request_bytes: float
    response_bytes: float


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one machine has."""

    cores: int = 32
    memory_bytes: float = 128e9
    network_gbits: float = 25.0
    """In each direction."""
    cores_per_worker: int = 4
    cores_per_balancer: int = 4


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is asked for."""

    rate: float
    """Requests per second."""
    p99_ms: float
    highest_load: float = 0.8
    """Share of the workers' cores that may be in use, whatever the p99."""
    spare: int = 1
    """Number of machines that may fail."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a target needs."""

    rate: float
    load: float
    """Utilisation of the workers' cores, without the spare machines."""
    p99_ms: float
    """Predicted by the model at that load."""
    workers: int
    """Without those of spare machines."""
    worker_cores: int
    front_cores: float
    """Cores that the fronts use, part of those of the machines."""
    machines: int
    """With the spare ones."""
    memory_bytes: float
    """Of all machines' workers and fronts, without the models' share of the page cache."""
    network_gbits: float
    """Into the service, all machines together."""
    answers_gbits: float
    balancers: int
    """Processes of Envoy or HAProxy in front of the machines; none for one machine."""
    limits: tuple[str, ...] = field(default=())
    """What is limiting: the p99, the load or the event loop; then cores, memory or network of a machine."""


def needs(figures: Figures, machine: Machine, target: Target) -> Needs:
    """What a target needs. Raises SizingError."""
    _check(figures, machine, target)
    per_worker, limit = _rate_per_worker(figures, machine.cores_per_worker, target.p99_ms, target.highest_load)
    workers = math.ceil(target.rate / per_worker)
    on_machine, scarce = _workers_on_machine(figures, machine, per_worker)
    used = math.ceil(workers / on_machine)
    machines = used + target.spare
    rate_of_worker = target.rate / workers
    queue = _queue(figures, machine.cores_per_worker, rate_of_worker)
    front_cores = target.rate * figures.front_cpu_ms / 1000
    return Needs(
        rate=target.rate,
        load=queue.load,
        p99_ms=figures.alone_ms + queue.wait_seconds(99) * 1000,
        workers=workers,
        worker_cores=workers * machine.cores_per_worker,
        front_cores=front_cores,
        machines=machines,
        memory_bytes=machines * (min(on_machine, workers) * figures.worker_bytes + figures.front_bytes),
        network_gbits=target.rate * figures.request_bytes * 8 / 1e9,
        answers_gbits=target.rate * figures.response_bytes * 8 / 1e9,
        balancers=max(2, math.ceil(front_cores / (BALANCER_LOAD * machine.cores_per_balancer))) if machines > 1 else 0,
        limits=(limit, scarce),
    )


def _check(figures: Figures, machine: Machine, target: Target) -> None:
    if target.rate <= 0:
        raise SizingError(f"a rate of {target.rate:g} requests/s needs nothing: give a positive one")
    if target.p99_ms <= figures.alone_ms:
        raise SizingError(
            f"a p99 of {target.p99_ms:g} ms cannot be reached: a request takes {figures.alone_ms:.3g} ms on an idle "
            "service; allow more, or measure a faster model"
        )
    if machine.cores < machine.cores_per_worker:
        raise SizingError(
            f"a machine of {machine.cores} cores has no room for a worker of {machine.cores_per_worker}: "
            "give larger machines or smaller workers"
        )


@cache
def _rate_per_worker(figures: Figures, cores: int, p99_ms: float, highest_load: float) -> tuple[float, str]:
    """The largest rate at which a worker meets the p99, and what limits it."""
    capacity = cores * 1000 / figures.worker_cpu_ms
    most = min(highest_load, LOOP_LOAD * 1000 / figures.loop_cpu_ms / capacity) if figures.loop_cpu_ms else highest_load
    reason = "load" if most == highest_load else "event loop"
    # Bisection over steps: the wait grows with the load. At the first step less than 1 % wait at all.
    low, high = 1, _STEPS

    def kept(step: int) -> bool:
        wait = _queue(figures, cores, most * step / _STEPS * capacity).wait_seconds(99)
        return figures.alone_ms + wait * 1000 <= p99_ms

    if kept(high):
        return most * capacity, reason
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if kept(middle) else (low, middle)
    return most * low / _STEPS * capacity, "p99"


def _queue(figures: Figures, cores: int, rate: float) -> DeterministicQueue:
    return DeterministicQueue(cores, figures.worker_cpu_ms / 1000, rate)


def _workers_on_machine(figures: Figures, machine: Machine, per_worker: float) -> tuple[int, str]:
    """How many workers a machine has room for, and what runs out first. Raises SizingError."""
    front_cores = per_worker * figures.front_cpu_ms / 1000
    gbits = per_worker * max(figures.request_bytes, figures.response_bytes) * 8 / 1e9
    room = {
        "cores": machine.cores / (machine.cores_per_worker + front_cores),
        "memory": (machine.memory_bytes - figures.front_bytes) / figures.worker_bytes,
        "network": NETWORK_LOAD * machine.network_gbits / gbits,
    }
    # A single worker on a machine needs no front.
    room["cores"] = max(1.0, room["cores"])
    scarce = min(room, key=lambda name: room[name])
    if room[scarce] < 1:
        raise SizingError(f"a machine has not enough {scarce} for one worker: give larger machines or smaller workers")
    return int(room[scarce]), scarce
