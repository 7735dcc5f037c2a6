"""Single GET requests to the server under test, never through a proxy that the environment names."""

import json
import urllib.request
from typing import Any

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str, *, timeout: float) -> bytes:
    """The body of the answer; `timeout` in seconds. Raises OSError, HTTPError for a status of 400 and above."""
    with _OPENER.open(url, timeout=timeout) as response:
        body: bytes = response.read()
        return body


def get_json(url: str, *, timeout: float) -> Any:
    """The same, parsed as JSON. Raises ValueError too."""
    return json.loads(get(url, timeout=timeout))
