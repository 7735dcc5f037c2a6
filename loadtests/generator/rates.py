"""When images are due: Poisson arrivals, and rates that change over time.

200:30,900:10,200:30      steps: 200 images a second for 30 s, then 900 for 10 s (a spike if short), ...
50>500:60                 a ramp from 50 to 500 in 60 s
100:14400                 a soak of four hours
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

_PART = re.compile(r"(?P<first>[\d.]+)(>(?P<last>[\d.]+))?:(?P<seconds>[\d.]+)")


def poisson_arrivals(rate: float, *, seed: str) -> Iterator[float]:
    """Seconds after the start at which a Poisson process of `rate` arrivals a second has its events, without end."""
    gaps = random.Random(seed)  # noqa: S311 (arrivals are no secret)
    due = 0.0
    while True:
        due += gaps.expovariate(rate)
        yield due


@dataclass(frozen=True, kw_only=True)
class Part:
    """The rate changes linearly from `first` to `last`, both in images a second."""

    first: float
    last: float
    seconds: float


def parse_rates(text: str) -> tuple[Part, ...]:
    """`200:30,50>500:60` as parts. Raises ValueError, whose message names the form."""
    parts = []
    for word in text.split(","):
        match = _PART.fullmatch(word.strip())
        if match is None:
            raise ValueError(f"{word!r}: give RATE:SECONDS or FROM>TO:SECONDS, separated by commas")
        first, last, seconds = (float(match[name] or match["first"]) for name in ("first", "last", "seconds"))
        if seconds <= 0 or max(first, last) <= 0:
            raise ValueError(f"{word!r}: a rate and its seconds must be greater than zero")
        parts.append(Part(first=first, last=last, seconds=seconds))
    return tuple(parts)


def rate_at(parts: tuple[Part, ...], seconds: float) -> float | None:
    """Images a second at a moment after the start; None when all parts are over."""
    for part in parts:
        if seconds < part.seconds:
            return part.first + (part.last - part.first) * seconds / part.seconds
        seconds -= part.seconds
    return None
