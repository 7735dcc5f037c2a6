"""Errors caused by the machine's state at the moment, and not by the model."""

import errno
from collections.abc import Iterator

from service.errors import NotReady

_OF_THE_MOMENT = frozenset(
    {
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENOSPC),
        *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTUNREACH),
    }
)
"""Resources that have run out, and disks and file servers that do not answer. Not included: missing files or
permissions, as the folder changes once they are there."""


def is_out_of_memory(error: BaseException | str) -> bool:
    """Whether an error or its cause, or a message of ONNX Runtime or the C++ library, says that memory ran out."""
    if isinstance(error, str):
        signs = ("bad_alloc", "bad allocation", "Failed to allocate memory", "out of memory")
        return any(sign in error for sign in signs)
    return any(
        isinstance(one, MemoryError)
        or (isinstance(one, OSError) and one.errno == errno.ENOMEM)
        or is_out_of_memory(str(one))
        for one in _chain(error)
    )


def is_of_the_moment(error: BaseException) -> bool:
    """Whether a later attempt may succeed: the engine hung, memory or descriptors ran out, a file server was away."""
    return is_out_of_memory(error) or any(
        isinstance(one, NotReady) or (isinstance(one, OSError) and one.errno in _OF_THE_MOMENT) for one in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
