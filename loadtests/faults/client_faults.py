"""Faults of clients: they do not read, do not finish, flood, or send what is expensive to decode."""

from functools import partial

from loadtests.faults.fault import Fault, World

_ATTACKS = {
    "never-reads": ("never_reads", "200 clients ask for large answers again and again, and read none"),
    "slow-heads": ("slow_heads", "300 clients send their heads a byte a second"),
    "slow-bodies": ("slow_bodies", "8 bodies of 32 MiB stop before their end, and 100 come a byte a second"),
    "large-heads": ("large_heads", "4 clients send heads of 32 MiB, in many lines and in one"),
    "connection-flood": ("flood", "300 new connections a second: idle, reset, or closed in the middle of a head"),
    "hostile-images": ("hostile_images", "20 small files a second that are dear to decode"),
    "mixed-attack": (
        "mixed",
        "20 requests a second that are dear to read or decode: images, JSON, forms, gzip, queries",
    ),
}


async def _attack(attack: str, world: World) -> None:
    await world.attack(attack)


def client_faults() -> list[Fault]:
    """All of them."""
    return [Fault(name=name, what=what, act=partial(_attack, attack)) for name, (attack, what) in _ATTACKS.items()]
