"""All faults, in the order in which they are tried."""

from pathlib import Path

from loadtests.faults.client_faults import client_faults
from loadtests.faults.fault import Fault
from loadtests.faults.log_faults import log_faults
from loadtests.faults.model_faults import model_faults
from loadtests.faults.process_faults import process_faults


def all_faults(scratch: Path) -> dict[str, Fault]:
    """All faults by name; `scratch` is a folder for files that they need."""
    found = [*process_faults(scratch), *model_faults(), *log_faults(), *client_faults()]
    return {fault.name: fault for fault in found}
