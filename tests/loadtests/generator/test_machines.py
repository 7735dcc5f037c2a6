"""Locust on two machines: master and service on one, workers on the other, which they reach over the network only."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from loadtests.experiment.load_runner import LOCUSTFILE
from loadtests.generator.samples import read_samples
from tests.namespaces import Machine, two_machines
from tests.processes import PATIENCE_SECONDS, ROOT, interruptible, wait_until

PORT = 8000
MODEL = "cifar100-csra-r2"
GET = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=60).read().decode())"


@contextmanager
def serving_on(machine: Machine, repository: Path) -> Iterator[str]:
    """A service that listens on the machine's address: its base URL there."""
    service = [sys.executable, "-m", "service", "--host", machine.address, "--port", str(PORT)]
    url = f"http://{machine.address}:{PORT}"
    with interruptible(*machine.command(*service, "--repository", str(repository))) as process:

        def ready() -> bool:
            with suppress(subprocess.CalledProcessError):
                machine.run(sys.executable, "-c", GET, url + "/readyz")
                return True
            return False

        wait_until(ready, process)
        yield url


def counted(metrics: str, name: str, **labels: str) -> float:
    """The sum of the series of a counter that have these labels."""
    samples = [sample for family in text_string_to_metric_families(metrics) for sample in family.samples]
    return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())


@pytest.mark.long
def test_what_workers_on_another_machine_sent_is_what_the_service_counted(tmp_path: Path) -> None:
    pictures, samples, repository = tmp_path / "pictures", tmp_path / "samples.csv", tmp_path / "repository"
    shutil.copytree(ROOT / "models" / MODEL, repository / MODEL)
    pictures.mkdir()
    for number in range(5):
        Image.new("RGB", (32, 32), (number * 50, 0, 0)).save(pictures / f"{number}.png")
    with two_machines() as (first, second), serving_on(first, repository) as url:
        locust = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE)]
        load = ["--data", str(pictures), "--model", MODEL, "--users", "4", "--spawn-rate", "4"]
        load += ["--rate-per-user", "10", "--samples", str(samples), "--run-time", "6s", "--stop-timeout", "60"]
        ending = ["--autostart", "--autoquit", "6", "--web-host", first.address]
        bound = ["--master", "--master-bind-host", first.address, "--expect-workers", "2"]
        worker = second.command(*locust, "--worker", "--master-host", first.address)
        with (
            interruptible(*first.command(*locust, *bound, "--host", url, *load, *ending)) as master,
            interruptible(*worker) as one,
            interruptible(*worker) as other,
        ):
            _, said = master.communicate(timeout=PATIENCE_SECONDS)
            assert (master.returncode, one.wait(60), other.wait(60)) == (0, 0, 0), said
        metrics = first.run(sys.executable, "-c", GET, url + "/metrics")
    shares = [read_samples(tmp_path / f"samples-{number}.csv") for number in range(2)]
    assert all(map(len, shares))
    statuses = np.concatenate(shares)["status"]
    answered, sent = int((statuses == 200).sum()), int((statuses > 0).sum())
    assert answered
    found = re.search(r"(\d+) answered, (\d+) not", said)
    assert found, said
    assert tuple(map(int, found.groups())) == (answered, len(statuses) - answered)
    assert counted(metrics, "stridevit_images_total", model=MODEL, outcome="ok") == answered
    assert counted(metrics, "stridevit_requests_total", route="/v1/classify") == sent
