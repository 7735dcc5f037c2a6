"""The id of a request: what its client offers in `X-Request-ID`, if it may be logged as it is, else one of ours."""

import itertools
import re
import secrets

_ACCEPTED = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class RequestIds:
    """Makes ids that are unique without asking the system for random numbers at every request."""

    def __init__(self) -> None:
        self._prefix, self._numbers = secrets.token_hex(8), itertools.count(1)

    def choose(self, offered: str) -> str:
        """The id of a request whose client offers `offered`, which may be empty."""
        return offered if _ACCEPTED.fullmatch(offered) else f"{self._prefix}{next(self._numbers):016x}"
