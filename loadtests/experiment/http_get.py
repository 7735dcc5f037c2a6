"""Single questions to a server, past any proxy of the environment: that has no business in between."""

import json
import urllib.request
from typing import Any

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str, *, timeout: float) -> bytes:
    """The body of an answer; `timeout` in seconds. Raises OSError, HTTPError for a status of 400 and more."""
    with _OPENER.open(url, timeout=timeout) as response:
        body: bytes = response.read()
        return body


def get_json(url: str, *, timeout: float) -> Any:
    """The same, read as JSON. Raises ValueError too."""
    return json.loads(get(url, timeout=timeout))
