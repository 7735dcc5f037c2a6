"""API keys: who has one gets in, and nobody else."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from service.http.keys import KeyRing, new_key
from service.settings import Settings

ANY_TEXT = st.text(st.characters())  # with lone surrogates, which UTF-8 cannot hold


def hashed(key: str) -> str:
    """As `sha256sum` would."""
    return hashlib.sha256(key.encode()).hexdigest()


@given(st.lists(st.text(), max_size=5), ANY_TEXT)
def test_exactly_the_keys_whose_hashes_are_known_are_accepted(keys: list[str], other: str) -> None:
    ring = KeyRing([hashed(key) for key in keys])
    assert all(ring.accepts(key) for key in keys)
    assert ring.accepts(other) == (other in keys)


def test_a_new_key_opens_the_ring_made_of_its_hash_and_no_other_does() -> None:
    key, digest = new_key()
    other, _ = new_key()
    ring = KeyRing(Settings(api_key_hashes=(digest,)).api_key_hashes)
    assert ring.accepts(key)
    assert not ring.accepts(other)
    assert not ring.accepts(digest)


def test_new_keys_differ_and_hold_256_bits() -> None:
    keys = {new_key()[0] for _ in range(100)}
    assert len(keys) == 100
    assert min(map(len, keys)) >= 43  # 32 bytes in base64


def test_an_empty_ring_accepts_nothing() -> None:
    assert not KeyRing(()).accepts("")


def test_every_hash_is_compared_wherever_the_right_one_stands() -> None:
    keys = ["first", "second", "third"]
    ring = KeyRing([hashed(key) for key in keys])
    assert [ring.accepts(key) for key in keys] == [True, True, True]


def test_a_ring_does_not_show_its_hashes() -> None:
    digest = new_key()[1]
    assert digest not in repr(KeyRing([digest]))
