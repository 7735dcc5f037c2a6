"""What the client makes of a server that misbehaves on purpose."""

import asyncio
import socket
import struct
from collections.abc import Callable

import pytest

from loadtests.experiment.server import free_port
from loadtests.faults.client import Client, Outcome, Unanswered, judge
from loadtests.faults.load import Load, Sample
from loadtests.faults.numbers import FORMS, Form, make_request
from tests.loadtests.faults.misbehaving import Question, answer, encoded, listening, misbehaving

Behave = Callable[[asyncio.StreamWriter, Question], bytes | None]


def outcomes(behave: Behave, *, count: int = 12, answer_seconds: float = 60.0) -> list[Sample]:
    """What becomes of the first requests of a load, one after the other."""

    async def send() -> list[Sample]:
        samples: list[Sample] = []
        async with misbehaving(behave) as (port, _):
            client = Client("127.0.0.1", port, answer_seconds=answer_seconds)
            load = Load(client, "numbered", deadline_ms=1000, keep=samples.append)
            for _ in range(count):
                await load.send(0.0)
            client.close()
        return samples

    return asyncio.run(send())


def test_right_answers_count_as_answered_in_every_form_and_on_both_kinds_of_connection() -> None:
    samples = outcomes(lambda _, question: answer(question))
    assert {sample.outcome for sample in samples} == {Outcome.ANSWERED}
    assert {(sample.form, sample.kept) for sample in samples} == {(form, kept) for form in FORMS for kept in (0, 1)}


def test_an_answer_to_another_image_is_swapped() -> None:
    assert {sample.outcome for sample in outcomes(lambda _, q: answer(q, shift=1))} == {Outcome.SWAPPED}


def test_an_answer_with_the_id_of_another_request_is_swapped() -> None:
    assert {sample.outcome for sample in outcomes(lambda _, q: answer(q, id_shift=1))} == {Outcome.SWAPPED}


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_that_holds_no_number_is_failed(form: Form) -> None:
    request = make_request(form, 7, model="numbered", deadline_ms=1000)

    async def ask() -> Outcome:
        async with misbehaving(lambda *_: encoded(200, {"X-Request-ID": "7"}, b"{}")) as (port, _):
            client = Client("127.0.0.1", port, answer_seconds=60)
            return judge(request, await client.ask(request.encoded(close=True), keep=False))

    assert asyncio.run(ask()) is Outcome.FAILED


@pytest.mark.parametrize(
    ("status", "headers", "outcome"),
    [
        (429, {"Retry-After": "1"}, Outcome.REFUSED),
        (503, {"Retry-After": "1"}, Outcome.REFUSED),
        (429, {}, Outcome.FAILED),
        (503, {}, Outcome.FAILED),
        (500, {"Retry-After": "1"}, Outcome.FAILED),
        (404, {}, Outcome.FAILED),
    ],
)
def test_a_refusal_is_one_that_says_when_to_try_again(status: int, headers: dict[str, str], outcome: Outcome) -> None:
    samples = outcomes(lambda *_: encoded(status, headers), count=3)
    assert [(sample.outcome, sample.status) for sample in samples] == [(outcome, status)] * 3


def test_a_connection_that_is_closed_without_an_answer_loses_the_request() -> None:
    assert {sample.outcome for sample in outcomes(lambda *_: None)} == {Outcome.LOST}


def test_half_an_answer_is_none() -> None:
    def half(writer: asyncio.StreamWriter, question: Question) -> None:
        writer.write(answer(question)[:-5])

    assert {sample.outcome for sample in outcomes(half)} == {Outcome.LOST}


def test_a_connection_that_is_reset_loses_the_request() -> None:
    def reset(writer: asyncio.StreamWriter, _: Question) -> None:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    assert {sample.outcome for sample in outcomes(reset)} == {Outcome.LOST}


def test_an_answer_that_never_comes_loses_the_request() -> None:
    assert {sample.outcome for sample in outcomes(lambda *_: b"", count=2, answer_seconds=2)} == {Outcome.LOST}


def test_what_is_not_http_loses_the_request() -> None:
    assert {sample.outcome for sample in outcomes(lambda *_: b"\0\0\0\0\r\n\r\n", count=2)} == {Outcome.LOST}


def test_nothing_is_sent_where_nobody_listens() -> None:
    async def ask() -> None:
        await Client("127.0.0.1", free_port(), answer_seconds=60).ask(b"GET / HTTP/1.1\r\n\r\n", keep=True)

    with pytest.raises(Unanswered) as failed:
        asyncio.run(ask())
    assert failed.value.outcome is Outcome.UNCONNECTED


def test_a_request_that_breaks_off_while_it_is_sent_is_unsent() -> None:
    async def close_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.transport.abort()

    async def ask() -> None:
        async with listening(close_at_once) as port:
            client = Client("127.0.0.1", port, answer_seconds=60)
            await client.ask(bytes(64 * 2**20), keep=False)

    with pytest.raises(Unanswered) as failed:
        asyncio.run(ask())
    assert failed.value.outcome is Outcome.UNSENT


def test_an_early_answer_to_a_body_that_is_not_read_is_an_answer() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(encoded(429, {"Retry-After": "1", "Connection": "close"}))
        await writer.drain()

    async def ask() -> int:
        async with listening(refuse) as port:
            client = Client("127.0.0.1", port, answer_seconds=60)
            length = 64 * 2**20
            head = f"POST / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode()
            return (await client.ask(head + bytes(length), keep=False)).status

    assert asyncio.run(ask()) == 429


def test_kept_connections_are_used_again_and_others_are_not() -> None:
    async def ask(*, keep: bool) -> list[int]:
        async with misbehaving(lambda _, question: answer(question)) as (port, connections):
            client = Client("127.0.0.1", port, answer_seconds=60)
            for number in range(1, 4):
                request = make_request("v1", number, model="numbered", deadline_ms=1000)
                await client.ask(request.encoded(close=False), keep=keep)
            client.close()
        return connections

    assert asyncio.run(ask(keep=True)) == [3]
    assert asyncio.run(ask(keep=False)) == [1, 1, 1]


def test_a_connection_that_was_closed_while_idle_is_not_used_again() -> None:
    async def ask() -> list[int]:
        def answer_and_close(writer: asyncio.StreamWriter, question: Question) -> None:
            writer.write(answer(question))

        async with misbehaving(answer_and_close) as (port, connections):
            client = Client("127.0.0.1", port, answer_seconds=60)
            for number in range(1, 4):
                request = make_request("v1", number, model="numbered", deadline_ms=1000)
                reply = await client.ask(request.encoded(close=False), keep=True)
                assert judge(request, reply) is Outcome.ANSWERED
                await asyncio.sleep(0.05)
        return connections

    assert asyncio.run(ask()) == [1, 1, 1]


def test_an_open_loop_counts_latency_from_the_moment_at_which_a_request_was_due() -> None:
    async def send() -> list[Sample]:
        samples: list[Sample] = []
        stop = asyncio.Event()

        def keep(sample: Sample) -> None:
            samples.append(sample)
            if len(samples) > 20:
                stop.set()

        async with misbehaving(lambda _, question: answer(question)) as (port, _):
            client = Client("127.0.0.1", port, answer_seconds=60)
            load = Load(client, "numbered", deadline_ms=1000, keep=keep)
            await load.open_loop(200, stop, seed="1")
            client.close()
        return samples

    samples = asyncio.run(send())
    assert all(sample.latency_ms >= sample.behind_ms >= 0 for sample in samples)
    assert len({sample.due_s for sample in samples}) == len(samples)
