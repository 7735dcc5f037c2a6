"""A made-up comparison that looks like a real one: drift, a failed block, requests never answered, an A/A arm."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtests.experiment.json_files import to_json
from loadtests.experiment.model import HIGH, MODERATE, SATURATED, Arm, Block, CapacitySearch, Comparison, ComparisonPlan
from loadtests.generator.load_result import LoadResult

BASELINE, LSRA, CSRA, REPEATED = "cifar100-mha", "cifar100-lsra-r2", "cifar100-csra-r2", "cifar100-mha (again)"
ARMS = (
    Arm(label=BASELINE, model=BASELINE),
    Arm(label=LSRA, model=LSRA),
    Arm(label=CSRA, model=CSRA, settings=(("STRIDEVIT_MAX_BATCH", "8"),)),
    Arm(label=REPEATED, model=BASELINE, repeat_of=BASELINE),
)
RATES = {MODERATE: 170.0, HIGH: 289.0}
_SPEED = {BASELINE: 345.0, LSRA: 352.0, CSRA: 378.0, REPEATED: 345.0}
_PEAK = {BASELINE: 171e6, LSRA: 163e6, CSRA: 158e6, REPEATED: 171e6}
_TOP1 = {BASELINE: 0.5371, LSRA: 0.5391, CSRA: 0.5366, REPEATED: 0.5371}
_KV = {BASELINE: 64, LSRA: 32, CSRA: 16, REPEATED: 64}


def plan(**changes: Any) -> ComparisonPlan:
    values: dict[str, Any] = {
        "repository": Path("models"),
        "arms": ARMS,
        "data": Path("photos"),
        "protocol": "v1",
        "connections": 16,
        "seconds": 8.0,
        "warmup_seconds": 2.0,
        "rounds": 10,
        "default_rounds": 10,
        "load_fractions": (0.5, 0.85),
        "objective_ms": 50.0,
        "objective_percentile": 99.0,
        "capacity_searches": 3,
        "budget_minutes": 30.0,
        "service_arguments": ("--intra-op-threads", "2"),
        "seed": 7,
    }
    return ComparisonPlan(**(values | changes))


def read_back(document: dict[str, Any]) -> dict[str, Any]:
    """A document as it stands in results.json."""
    return dict(json.loads(to_json(document)))


def load(latencies_ms: npt.NDArray[np.float64], **changes: Any) -> LoadResult:
    values: dict[str, Any] = {
        "mode": "closed" if changes.get("connections") else "open",
        "connections": None,
        "offered_rate": 170.0,
        "throughput": 170.0,
        "latencies_ms": latencies_ms,
        "errors": 0,
        "peak_bytes": 160_000_000,
        "server_cores": 1.1,
        "generator_cores": 0.2,
    }
    return LoadResult(**(values | changes))


def comparison(*, trained: bool = True, rounds: int = 10, seed: int = 3) -> Comparison:
    """With `trained` false no model has an accuracy."""
    generator = np.random.default_rng(seed)
    blocks = []
    for number in range(rounds):
        drift = 1 - 0.006 * number + generator.normal(0, 0.01)
        for arm in ARMS if number % 2 == 0 else ARMS[::-1]:
            blocks.append(_block(generator, arm, number, drift, trained=trained))
    return Comparison(
        plan=plan(rounds=rounds),
        command="python -m loadtests compare --repository models --models "
        f"{BASELINE},{LSRA},{CSRA} --data photos --out results/compare",
        environment={
            "cpu": "AMD EPYC 7763 64-Core Processor",
            "cores": "2",
            "memory": "8 GB",
            "system": "Linux-6.1.0-x86_64-with-glibc2.36",
            "python": "3.11.9",
            "onnxruntime": "1.24.0",
            "locust": "2.42.0",
            "stridevit": "0.1.0",
            "commit": "0f10cd6 (with changes)",
        },
        payloads="400 JPEGs, 12–148 kB, median 61 kB",
        rates=dict(RATES),
        blocks=blocks,
        capacity_searches=[
            *(
                CapacitySearch(arm=arm, round=number, rate=rate + 6 * number, probes=((200.0, 18.2), (400.0, None)))
                for number in range(3)
                for arm, rate in ((BASELINE, 262.0), (LSRA, 271.0))
            ),
            CapacitySearch(arm=CSRA, round=0, rate=None, probes=(), reason="the generator could not send 500/s"),
        ],
        finished=datetime(2026, 11, 23, 4, 5, tzinfo=UTC),
    )


def _block(generator: np.random.Generator, arm: Arm, number: int, drift: float, *, trained: bool) -> Block:
    name = arm.label
    accuracy = {"dataset": "cifar100", "split": "test", "n": 10000, "top1": _TOP1[name], "top5": 0.82}
    info = {
        "name": arm.model,
        "tokens": 64,
        "kv_tokens": _KV[name],
        "params": 814_308 if _KV[name] == 64 else 693_924,
        "macs": 57_029_120 if _KV[name] == 64 else 42_114_560,
        "precision": "fp32",
        "img_size": 32,
        "accuracy": accuracy if trained else None,
        "labels": ["apple", "bear"],
        "source": {"checkpoint_sha256": f"{name.encode().hex():0<64}"[:64], "git_commit": "0f10cd6"},
    }
    if (arm.label, number) == (LSRA, 4):
        return Block(arm=name, round=number, info=info, failure="the service died under load; see server-4-lsra.log")
    speed = _SPEED[name] * drift * generator.normal(1, 0.008)
    peak = int(_PEAK[name] + generator.normal(0, 1e6))
    loads = {SATURATED: _load(generator, 16 / speed * 1000, 12, round(speed * 8), speed, connections=16, peak=peak)}
    for kind, mean, shape in ((MODERATE, 1000 / speed * 2.2, 8.0), (HIGH, 1000 / speed * 4.5, 2.2)):
        count = int(generator.poisson(RATES[kind] * 8))
        # The heaviest load loses a few requests of the slow ones.
        lost = int(count * 0.003) if kind == HIGH and name in {BASELINE, REPEATED} and number % 4 == 1 else 0
        loads[kind] = _load(generator, mean, shape, count, RATES[kind], offered_rate=RATES[kind], peak=peak, lost=lost)
    return Block(
        arm=name, round=number, idle_bytes=118_000_000, after_bytes=peak - 6_000_000, loads=loads, info=info
    )  # fmt: skip


def _load(
    generator: np.random.Generator,
    mean_ms: float,
    shape: float,
    count: int,
    throughput: float,
    *,
    connections: int | None = None,
    offered_rate: float | None = None,
    peak: int,
    lost: int = 0,
) -> LoadResult:
    latencies = generator.gamma(shape, mean_ms / shape, size=count)
    latencies[:lost] = np.inf
    return load(
        generator.permutation(latencies),
        connections=connections,
        offered_rate=offered_rate,
        throughput=throughput,
        errors=lost // 2,
        unsent_arrivals=lost - lost // 2,
        late_arrivals=count // 400 if offered_rate else 0,
        arrivals=int(count * 1.25) if offered_rate else 0,
        peak_bytes=peak,
        server_cores=1.5 if connections else 0.9,
        generator_cores=0.31,
        stages_ms={
            "read": 0.1,
            "decode": 1.1,
            "queue": mean_ms * 0.45,
            "inference": 2.1,
            "total": mean_ms * 0.45 + 3.9,
        },
        labelled=count,
        correct=int(count * 0.53),
    )
