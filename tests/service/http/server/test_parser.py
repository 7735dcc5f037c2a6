"""In what pieces bytes are parsed."""

import pytest

from service.http.server.connections import ConnectionLimits
from service.http.server.parser import Head, Parser, Refused
from tests.service.http.server.bench import LIMITS

POST = b"POST /a HTTP/1.1\r\nHost: h\r\n"


class Parsed:
    """Takes what is parsed, and notes the lengths of heads and pieces of bodies."""

    def __init__(self) -> None:
        self.lengths: list[int | None] = []

    def begin(self) -> None:
        pass

    def head(self, head: Head) -> None:
        self.lengths.append(head.content_length)

    def body(self, data: bytes) -> None:
        self.lengths.append(len(data))

    def complete(self) -> None:
        pass


@pytest.mark.parametrize("before", [b"", POST + b"Content-Length: 9000\r\n\r\n" + b"b" * 9000])
def test_a_head_without_end_is_refused_within_the_read_in_which_it_begins(before: bytes) -> None:
    limits = ConnectionLimits(**LIMITS)
    most = limits.max_head_bytes + 2 * 4096
    with pytest.raises(Refused) as refused:
        Parser(limits, Parsed()).feed(before + b"GET /a HTTP/1.1\r\nX: " + b"v" * most)
    assert refused.value.error
    assert refused.value.error.status == 431


def test_a_body_of_known_length_is_not_cut_into_pieces() -> None:
    parsed = Parsed()
    head = POST + b"Content-Length: 130000\r\n\r\n"
    parser = Parser(ConnectionLimits(**LIMITS), parsed)
    parser.feed(head)
    parser.feed(b"b" * 130_000 + head + b"b" * 130_000)
    first = 4096 - len(head)
    assert parsed.lengths == [130_000, 130_000, 130_000, first, 130_000 - first]
