"""Seeds for everything that is random: each is a function of a key, never of what was drawn before.

So all variants start from equal weights and see equal data, and a resumed run repeats what an uninterrupted one draws.
"""

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def generator(*key: int) -> np.random.Generator:
    """A generator of its own for `key`, such as (seed, epoch)."""
    return np.random.default_rng(np.random.SeedSequence(key))


def step_seed(*key: int) -> int:
    """A seed for torch's generator from `key`, such as (seed, step)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def name_seed(name: str) -> int:
    """A seed for torch's generator from text, such as `0/blocks.3.mlp.fc1`."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch, and restore their states afterwards."""
    python, legacy = random.getstate(), np.random.get_state()
    first, second, third = np.random.SeedSequence(key).generate_state(3).tolist()
    with torch.random.fork_rng(devices=[]):
        random.seed(first)
        np.random.seed(second)
        torch.manual_seed(third)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
