"""Runs the scenarios and prints their counts as a table: `python -m tests.cluster.ray --python .venv-ray/bin/python`.

The throughput of two replicas on two nodes needs a model for which computing outweighs all else:

    stridevit export run --random-weights --preset vit-s16 --img-size 224 --variant mha --repository DIR
    python -m tests.cluster.ray --python .venv-ray/bin/python throughput --repository DIR --model vit-s16-224-random-mha
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.cluster.ray.enclosure import ROOT, run

_COLUMNS = ("scenario", "connections", "replicas", "answered", "failed", "per_second", "p50_ms", "p99_ms", "cpu_ms")


def main() -> int:
    """Run, and print; 1 if a request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", default=["kill", "scale", "redeploy"])
    parser.add_argument("--python", required=True, help="interpreter with stridevit[cpu,ray]")
    parser.add_argument("--repository", type=Path, default=ROOT / "models")
    parser.add_argument("--model", default="cifar100-csra-r2")
    parser.add_argument("--seconds", type=float, default=3000.0, help="longest time of all")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counts.json"
        where = {"repository": asked.repository, "model": asked.model}
        if status := run(asked.python, asked.scenarios, out, seconds=asked.seconds, **where):
            return status
        counts = json.loads(out.read_text(encoding="utf-8"))
    print(f"| {' | '.join(_COLUMNS)} |\n|{' --- |' * len(_COLUMNS)}")
    for name, rows in counts.items():
        for row in rows:
            print(f"| {' | '.join(str({'scenario': name, **row}.get(column, '')) for column in _COLUMNS)} |")
    if "throughput" in counts:
        print(compared(counts["throughput"]))
    return int(any(row["failed"] for rows in counts.values() for row in rows))


def compared(rows: list[dict[str, Any]]) -> str:
    """Two replicas against one: as measured, and if each had had a core to itself.

    On cores that others use too, the first tells how they were shared. The second takes the CPU time of a request as
    what a core is good for: two replicas serve twice as much, less what a request costs more than with one.
    """
    of = {count: [row for row in rows if row["replicas"] == count] for count in (1, 2)}
    rate = {count: statistics.mean(row["per_second"] for row in each) for count, each in of.items()}
    cpu = {count: statistics.mean(row["cpu_ms"]["replica"] for row in each) for count, each in of.items()}
    return f"\n2 replicas / 1: ×{rate[2] / rate[1]:.2f}; by CPU time: ×{2 * cpu[1] / cpu[2]:.2f}"


if __name__ == "__main__":
    sys.exit(main())
