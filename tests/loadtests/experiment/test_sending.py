"""Requests of which none may be left out: all are sent, several at a time, and what ends one ends all."""

import asyncio
import signal
from collections.abc import Callable

import httpx
import pytest

from loadtests.experiment.sending import send_all
from tests.loadtests.servers import fake_server


def test_every_item_is_sent_several_at_a_time() -> None:
    async def send(client: httpx.AsyncClient, item: int) -> None:
        await client.post("/", content=str(item))

    with fake_server(lambda _: 0.01) as server:
        send_all(server.url, range(40), send, connections=4)
    assert sorted(int(body) for body in server.bodies) == list(range(40))
    assert 2 <= server.max_in_flight <= 4


class Endless:
    """Sends that never end but for the last one, which does what it is given."""

    def __init__(self, last: int, act: Callable[[], None]) -> None:
        self._last, self._act, self.cancelled = last, act, 0

    async def send(self, _: httpx.AsyncClient, item: int) -> None:
        if item == self._last:
            self._act()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def test_an_error_ends_the_others() -> None:
    def fail() -> None:
        raise ValueError("the third")

    failing = Endless(2, fail)
    with pytest.raises(ValueError, match="the third"):
        send_all("http://127.0.0.1", range(100), failing.send, connections=3)
    assert failing.cancelled == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_all_quietly(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before, stopped = signal.getsignal(signal.SIGTERM), Endless(2, lambda: signal.raise_signal(number))
    with pytest.raises(KeyboardInterrupt):
        send_all("http://127.0.0.1", range(100), stopped.send, connections=3)
    assert stopped.cancelled == 3
    assert signal.getsignal(signal.SIGTERM) is before
    assert capfd.readouterr() == ("", "")
