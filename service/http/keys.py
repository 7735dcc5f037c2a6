"""API keys. The service knows only their hashes, so that neither its settings nor its memory give a key away."""

import hashlib
import hmac
import secrets
from collections.abc import Sequence


class KeyRing:
    """The keys that are accepted."""

    def __init__(self, hashes: Sequence[str]) -> None:
        """`hashes`: SHA-256 of each key, in hexadecimal. Raises ValueError if one is not hexadecimal."""
        self._digests = tuple(bytes.fromhex(digest) for digest in hashes)

    def accepts(self, key: str) -> bool:
        """Whether `key` is one of them, in a time that tells nothing of how near it came, nor to which."""
        digest = _digest(key)
        accepted = False
        for known in self._digests:
            accepted |= hmac.compare_digest(digest, known)
        return accepted


def new_key() -> tuple[str, str]:
    """A random key of 256 bits, and the hash by which the service knows it."""
    key = secrets.token_urlsafe(32)
    return key, _digest(key).hex()


def _digest(key: str) -> bytes:
    # No salt and no slow hash: a key is random, not chosen, so there is no dictionary to try.
    # "surrogatepass", for whatever a header may hold must be refused and not break the request.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
