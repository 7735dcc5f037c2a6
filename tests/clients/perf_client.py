"""NVIDIA's perf_analyzer, unmodified, against /v2.

    python -m tests.clients.perf_client --url http://127.0.0.1:8000 --model cifar100-csra-r2

STRIDEVIT_PERF names the folder that `tests.clients.perf_install` filled; without it, .venv-clients/perf.
"""

import csv
import os
import subprocess
import tempfile
from pathlib import Path

from tests.clients.checks import check, metadata, read_target, same
from tests.clients.perf_install import command


def main() -> None:
    """Run all checks."""
    target = read_target("perf_analyzer's measurements against /v2.")
    perf = [
        *command(Path(os.environ.get("STRIDEVIT_PERF", ".venv-clients/perf"))),
        *("-m", target.model, "-u", target.authority, "-i", "http"),
    ]
    description = metadata(target)
    shape = ",".join(str(size) for size in description["inputs"][0]["shape"][1:])
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.csv"

        def measure(*options: str) -> list[dict[str, str]]:
            done = subprocess.run([*perf, *options, "-f", str(report)], capture_output=True, text=True, check=False)
            same(done.returncode, 0, f"exit code of perf_analyzer, which said {(done.stdout + done.stderr)[-2000:]}")
            with report.open(encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            for row in rows:
                same(float(row["Inferences/Second"]) > 0, True, f"throughput in {row}")
                # From /stats: without it the columns exist but are empty.
                same(float(row["Server Compute Infer"]) > 0, True, f"server's time in {row}")
                same(float(row["p99 latency"]) >= float(row["p50 latency"]) > 0, True, f"latencies in {row}")
            return rows

        with check("concurrency 1 and 2, windows of half a second"):
            # Three windows, however much they differ: the protocol is tested, not the machine.
            windows = ("--measurement-interval", "500", "--stability-percentage", "999")
            rows = measure("--shape", f"image:{shape}", "--concurrency-range", "1:2", *windows)
            # The rows come in the order of their latency.
            same(sorted(row["Concurrency"] for row in rows), ["1", "2"])
        with check("4 images per request, 4 concurrent requests, a version by number"):
            version = description["versions"][-1]
            measure("-b", "4", "-x", version, "--async", "--concurrency-range", "4", "--request-count", "40")
        with check("tensors in JSON"):
            measure("--input-tensor-format", "json", "--output-tensor-format", "json", "--request-count", "20")
        with check("an open loop of 40 requests per second"):
            measure("--request-rate-range", "40", "--request-distribution", "poisson", "--request-count", "40")
        with check("an unknown model is an error with its message"):
            words = [word if word != target.model else "none" for word in perf]
            done = subprocess.run([*words, "--request-count", "1"], capture_output=True, text=True, check=False)
            same(done.returncode != 0, True, "exit code")
            same("no model 'none'" in done.stdout + done.stderr, True, done.stdout + done.stderr)


if __name__ == "__main__":
    main()
