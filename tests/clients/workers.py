"""Figures of several workers behind the front: what it costs, how even it is, and what is lost when workers die.

python -m tests.clients.workers --repository models --model cifar100-csra-r2

Starts two workers on 127.0.0.1 and sends JPEGs from 16 connections, each its next one once the last is answered. Prints
a line for each part, and ends with 1 if a request was lost or the counts of /metrics differ from those of the clients.
"""

import argparse
import asyncio
import io
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from PIL import Image

from tests.clients.closed_loop import ClosedLoop, Outcome, encoded
from tests.processes import ROOT, wait_until
from tests.service.workers.served import WORKERS, Served, workers_serving

_NAMES = [str(number) for number in range(WORKERS)]


def main() -> None:
    """Measure and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", default=str(ROOT / "models"))
    parser.add_argument("--model", default="cifar100-csra-r2")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--body", type=int, default=20_000, help="bytes of a body, a JPEG of some 20 kB and zeros")
    parser.add_argument("--kills", type=int, default=3)
    asked = parser.parse_args()
    environment = {"STRIDEVIT_DEFAULT_DEADLINE_MS": "120000", "STRIDEVIT_LOG_LEVEL": "info"}
    good = True
    with (
        tempfile.TemporaryDirectory() as folder,
        workers_serving(
            Path(asked.repository), Path(folder), "--models", asked.model, environment=environment
        ) as served,
    ):
        good &= _measure(served, asked, "undisturbed", lambda _: None)
        for number in range(asked.kills):
            good &= _measure(
                served, asked, f"kill -9 of worker {number % WORKERS}", _kill(served, number, asked.requests)
            )
            served.until_all_ready()
        if asked.kills:
            good &= _measure(served, asked, "rolling restart", _restart(served), endless=True)
    sys.exit(0 if good else 1)


def _kill(served: Served, number: int, requests: int) -> Callable[[ClosedLoop], None]:
    victim = served.workers()[number % WORKERS]

    def kill(loop: ClosedLoop) -> None:
        _until_sent(loop, requests // 3)
        victim.kill()

    return kill


def _restart(served: Served) -> Callable[[ClosedLoop], None]:
    def restart(loop: ClosedLoop) -> None:
        _until_sent(loop, 50)
        served.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "rolling restart done" in served.log.read_text(), served.process)
        loop.stop()

    return restart


def _until_sent(loop: ClosedLoop, count: int) -> None:
    while loop.outcome.sent < count:
        time.sleep(0.005)


def _measure(
    served: Served,
    asked: argparse.Namespace,
    name: str,
    meanwhile: Callable[[ClosedLoop], None],
    *,
    endless: bool = False,
) -> bool:
    loop = ClosedLoop(
        served.port,
        [encoded(_jpeg(asked.body))],
        connections=asked.connections,
        most=1_000_000 if endless else asked.requests,
    )

    async def both() -> Outcome:
        outcome, _ = await asyncio.gather(loop.run(), asyncio.to_thread(meanwhile, loop))
        return outcome

    answered, retried = _answered(served), served.metric("stridevit_front_retries_total", outcome="sent")
    front = psutil.Process(served.front()[0].pid)
    shares = [served.metric("stridevit_worker_requests_total", worker=worker) for worker in _NAMES]
    processes = {worker.pid: worker for worker in served.workers()}
    before, loops = _cpu(front), {pid: _main_thread(pid) for pid in processes}
    cpu = {pid: _cpu(process) for pid, process in processes.items()}
    began = time.monotonic()
    outcome = asyncio.run(both())
    seconds = time.monotonic() - began
    line: dict[str, object] = {
        "part": name,
        "statuses": dict(outcome.statuses),
        "requests_per_s": round(outcome.sent / seconds, 1),
        "front_cpu_ms": round((_cpu(front) - before) / outcome.sent * 1000, 3),
    }
    if name == "undisturbed":
        parts = [
            served.metric("stridevit_worker_requests_total", worker=worker) - share
            for worker, share in zip(_NAMES, shares, strict=True)
        ]
        mean = sum(parts) / len(parts)
        line["requests_of_workers"] = parts
        line["unevenness"] = round(max(abs(part - mean) for part in parts) / mean, 3)
        line["worker_cpu_ms"] = round(sum(_cpu(p) - cpu[pid] for pid, p in processes.items()) / outcome.sent * 1000, 3)
        line["of_it_event_loop_ms"] = round(
            sum(_main_thread(pid) - loops[pid] for pid in processes) / outcome.sent * 1000, 3
        )
    served.until_all_ready()
    line["retried"] = served.metric("stridevit_front_retries_total", outcome="sent") - retried
    line["counted"] = counted = _answered(served) - answered
    print(json.dumps(line), flush=True)
    # An answer may have been sent, and not yet counted, by a worker that was killed.
    return outcome.failed == 0 and abs(counted - outcome.sent) <= (asked.connections if "kill" in name else 0)


def _answered(served: Served) -> float:
    return served.metric("stridevit_requests_total", route="/v1/classify", status="200")


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _main_thread(pid: int) -> float:
    """CPU seconds of the thread of the event loop."""
    return next(float(t.user_time + t.system_time) for t in psutil.Process(pid).threads() if t.id == pid)


def _jpeg(size: int) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((200, 160), 40).convert("RGB").save(buffer, "JPEG", quality=85)
    return buffer.getvalue() + bytes(max(0, size - buffer.tell()))


if __name__ == "__main__":
    main()
