"""Batch work moves on under any load, and never takes more than its share from interactive work."""

import pytest

from service.scheduling.turns import Turns


@pytest.mark.parametrize("share", [0.5, 0.2, 0.1])
def test_batch_work_gets_its_share_of_the_turns_while_both_wait(share: float) -> None:
    turns = Turns(share)
    taken = [turns.batch_first(interactive_waits=True, batch_waits=True) for _ in range(1000)]
    assert sum(taken) == pytest.approx(1000 * share, abs=1)
    assert not taken[0], "interactive work goes first"


def test_whoever_waits_alone_has_every_turn() -> None:
    turns = Turns(0.1)
    assert all(turns.batch_first(interactive_waits=False, batch_waits=True) for _ in range(30))
    assert not any(turns.batch_first(interactive_waits=True, batch_waits=False) for _ in range(30))
    assert not turns.batch_first(interactive_waits=False, batch_waits=False)
