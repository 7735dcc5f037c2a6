"""From the settings to several workers, or to one process."""

import asyncio
import logging
from typing import Final

import structlog

from service.errors import StartupError
from service.http.server.listening import require_free_address
from service.logs import Logs
from service.models.scratch import scratch_folder
from service.settings import Settings
from service.workers.envoy import find_envoy
from service.workers.placement import places, this_machine
from service.workers.supervisor import Supervisor

log = structlog.get_logger()

_LONGEST_SOCKET: Final = 107
"""Bytes of a UNIX socket's path that Linux allows."""


def supervise(settings: Settings, logs: Logs) -> bool:
    """Serve with several workers until the end; returns False if one process is enough here.

    Raises StartupError, or SystemExit with the exit status unless it is 0.
    """
    # A line for each request to a worker would drown all others.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    machine = this_machine()
    found = places(settings.workers, machine, device=settings.device, threads=settings.threads)
    if len(found) == 1:
        log.info("one worker is enough here: no front", cores=machine.usable)
        return False
    if len(found) > machine.usable and found[0].device == "cpu":
        log.warning(f"{len(found)} workers share {machine.usable} cores: more than one for each core only takes memory")
    require_free_address(settings.host, settings.port)
    program = find_envoy()
    if program is None:
        log.warning(
            "without a front the system gives each connection to a worker by chance, which is uneven (measured: 361 "
            "requests to 124), and a request whose worker dies is lost: pip install 'stridevit[workers]'"
        )
    with scratch_folder() as folder:
        if folder is None or len(str(folder)) + len("/supervisor.sock") > _LONGEST_SOCKET:
            where = "nowhere to write to" if folder is None else f"the path of {folder} is too long for sockets"
            raise StartupError(f"workers need a folder for their sockets: {where}: set TMPDIR to a short path")
        status = asyncio.run(Supervisor(settings, logs, found, folder, program).run())
    if status:
        raise SystemExit(status)
    return True
