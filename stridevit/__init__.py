"""The command `stridevit` and the clients. Other packages are imported only when one of their commands is called."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stridevit.answers import Busy, DeadlineExceeded, Rejected, StrideViTError, Unreachable
    from stridevit.client import AsyncClient, Client

__all__ = ["AsyncClient", "Busy", "Client", "DeadlineExceeded", "Rejected", "StrideViTError", "Unreachable"]


def __getattr__(name: str) -> Any:
    """Import the clients when one is first used: the command needs neither httpx nor pydantic."""
    if name not in __all__:
        raise AttributeError(f"module 'stridevit' has no attribute {name!r}")
    from stridevit import answers, client  # noqa: PLC0415 (lazily)

    return getattr(client if name.endswith("Client") else answers, name)
