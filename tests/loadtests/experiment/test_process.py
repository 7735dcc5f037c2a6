"""Child processes that end with the measurement, even if it is killed."""

import subprocess
import sys
from contextlib import suppress

import psutil
import pytest

from loadtests.experiment.process import end, start
from service.host import process_tree, process_tree_bytes
from tests.processes import PATIENCE_SECONDS

WAIT = "import signal; print('ready', flush=True); signal.pause()"


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_a_server_is_killed_with_its_measurement() -> None:
    parent = f"""
import subprocess, sys
from loadtests.experiment.process import start
child = start([sys.executable, "-c", {WAIT!r}], stdout=subprocess.PIPE, stderr=None)
child.stdout.readline()
print(child.pid, flush=True)
input()
"""
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as measurement:
        assert measurement.stdout
        child = psutil.Process(int(measurement.stdout.readline()))
        measurement.kill()
        measurement.wait()
        # Gone, or a zombie until init collects it.
        with suppress(psutil.NoSuchProcess):
            assert psutil.wait_procs([child], timeout=PATIENCE_SECONDS)[0] or child.status() == psutil.STATUS_ZOMBIE


def test_end_stops_a_process_with_its_descendants() -> None:
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WAIT!r}])"
    with start([sys.executable, "-c", parent], stdout=subprocess.PIPE, stderr=None) as process:
        assert process.stdout
        process.stdout.readline()
        family = process_tree(process.pid)
        assert len(family) == 2
        end(process)
    assert not [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]


def test_memory_counts_the_whole_tree() -> None:
    code = "block = bytearray(80_000_000); print('ready', flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        assert process_tree_bytes(process.pid) > 80_000_000
        process.communicate(b"\n", timeout=PATIENCE_SECONDS)
    assert process_tree_bytes(process.pid) == 0
