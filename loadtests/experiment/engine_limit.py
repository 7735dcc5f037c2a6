"""The engine limit: what decoding and the engine reach together without HTTP, measured by the service's own command."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtests.experiment.process import start
from loadtests.experiment.server import ServerError

TRIALS_SECONDS = 20
"""About how long it takes besides the measured seconds."""


def engine_limit(model: str, repository: Path, images: Path, seconds: float, settings: Sequence[str]) -> dict[str, Any]:
    """The JSON of `stridevit engine-limit` on the files of a folder. Raises ServerError."""
    command = [sys.executable, "-m", "service", "engine-limit", "--model", model, "--repository", str(repository)]
    command += ["--data", str(images), "--seconds", f"{seconds:g}", "--json", *settings]
    with start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        output, errors = process.communicate()
    try:
        return dict(json.loads(output))
    except ValueError as error:
        raise ServerError(f"the engine limit of {model} could not be measured:\n{errors[-2000:]}") from error
