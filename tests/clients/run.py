"""Serve the models and run every client against them: what `make test-clients` does.

python -m tests.clients.run --service .venv-serve/bin/python --clients .venv-clients
"""

import argparse
import hashlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tests.clients.checks import fail, get

ROOT = Path(__file__).parents[2]
START_SECONDS = 120
CLIENT_SECONDS = 600


def main() -> None:
    """Run each client's script in its own environment; the first failure ends the run."""
    parser = argparse.ArgumentParser(description="Third-party clients against the service.")
    parser.add_argument("--service", required=True, help="Python of the service's environment")
    parser.add_argument("--clients", required=True, type=Path, help="folder of the clients' environments")
    parser.add_argument("--repository", default="models")
    parser.add_argument("--model", default="cifar100-csra-r2", help="the model that is queried, unloaded and loaded")
    parser.add_argument("--other", default="cifar100-mha", help="a model that keeps serving meanwhile")
    asked = parser.parse_args()
    clients = asked.clients.resolve()
    scripts = {
        "triton_client": clients / "triton" / "bin" / "python",
        "kserve_client": clients / "kserve" / "bin" / "python",
        "hf_client": clients / "hf" / "bin" / "python",
        "perf_client": Path(sys.executable),
    }
    key = secrets.token_urlsafe(32)
    # Requests to the service on this machine must not go through the environment's proxies.
    environment = {**os.environ, "no_proxy": "*", "NO_PROXY": "*", "STRIDEVIT_PERF": str(clients / "perf")}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        models = f"{asked.model},{asked.other}"
        with _serving(asked.service, asked.repository, models=models, key=key, log=log) as url:
            for script, python in scripts.items():
                print(f"== {script}", flush=True)
                words = [python, "-m", f"tests.clients.{script}", "--url", url, "--model", asked.model]
                if script == "triton_client":
                    words.append(f"--admin-key={key}")  # a key may begin with a hyphen
                done = subprocess.run(words, cwd=ROOT, env=environment, timeout=CLIENT_SECONDS, check=False)
                if done.returncode != 0:
                    _fail_with_log(f"{script} ended with {done.returncode}", log)
    print("all clients agree", flush=True)


@contextmanager
def _serving(python: str, repository: str, *, models: str, key: str, log: IO[str]) -> Iterator[str]:
    """Run a service with an admin key until the block ends; yields its base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("STRIDEVIT_")},
        "STRIDEVIT_ADMIN_KEY_HASH": hashlib.sha256(key.encode()).hexdigest(),
        "STRIDEVIT_MODELS": models,
    }
    words = [python, "-m", "service", "--repository", repository, "--port", str(port)]
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while get(url + "/readyz") is None:
            if process.poll() is not None:
                _fail_with_log(f"the service ended with {process.returncode}", log)
            if time.monotonic() > deadline:
                _fail_with_log(f"the service was not ready within {START_SECONDS} s", log)
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()


def _fail_with_log(message: str, log: IO[str]) -> None:
    log.seek(0)
    print("end of the service's log:", *log.read().splitlines()[-20:], sep="\n  ", file=sys.stderr)
    fail(message)


if __name__ == "__main__":
    main()
