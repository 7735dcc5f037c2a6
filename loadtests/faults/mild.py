"""Faults that a service sees every day, for a long run: each leaves the process and its models as they were."""

from loadtests.faults.client_faults import client_faults
from loadtests.faults.fault import Fault
from loadtests.faults.model_faults import ADMIN_FLAGS, POLLING_FLAGS, model_faults
from loadtests.faults.service import Launch

MILD = ("load-unload", "repository-away", "slow-heads", "connection-flood", "never-reads")
MILD_LAUNCH = Launch(flags=(*POLLING_FLAGS, *ADMIN_FLAGS))
"""The launch with which all of them can be done."""


def mild_faults() -> list[Fault]:
    """All of them, in the order of `MILD`."""
    found = {fault.name: fault for fault in (*model_faults(), *client_faults())}
    return [found[name] for name in MILD]
