"""When to ask again for what failed."""

from service.remote.attempts import Attempts
from tests.service.conftest import Clock


def test_pauses_double_up_to_ten_minutes() -> None:
    attempts = Attempts(clock := Clock())
    pauses = []
    for _ in range(9):
        attempts.failed("a", ValueError("x"))
        began = clock.now
        while attempts.pending("a"):
            clock.now += 1
        pauses.append(clock.now - began)
    assert pauses == [5, 10, 20, 40, 80, 160, 320, 600, 600]


def test_only_another_reason_is_news_and_only_another_tag_is_tried_at_once() -> None:
    attempts = Attempts(Clock())
    assert attempts.failed("a", ValueError("x"), "1")
    assert not attempts.failed("a", ValueError("x"), "1")
    assert attempts.failed("a", ValueError("y"), "1")
    assert attempts.pending("a", "1")
    assert not attempts.pending("a", "2")
    assert not attempts.pending("b", "1")
    attempts.forget_others({"b"})
    assert not attempts.pending("a", "1")
