"""The clients against a real service, and against a stub where time or rare answers matter."""

import base64
import hashlib
import io
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from PIL import Image

from loadtests.experiment.server import free_port
from stridevit import AsyncClient, Busy, Client, DeadlineExceeded, Rejected, StrideViTError, Unreachable
from tests.processes import PATIENT_SERVICE, get, serving
from tests.service.conftest import Clock
from tests.service.identity import LABELS, picture, publish_identity
from tests.stridevit.stub import CLASSIFICATION, Reply, Stub, problem

KEY = "a-secret-key-of-a-client"
IMAGE = picture(3 | 1 << 8 | 2 << 16)
PATIENT = 400.0

Kind = type[Client] | type[AsyncClient]
both = pytest.mark.parametrize("kind", [Client, AsyncClient])


def result(
    kind: Kind, url: str, call: Callable[[Any], Any], *, pauses: list[float] | None = None, **options: Any
) -> Any:
    """What `call` makes of a client of this kind. `pauses`: where its pauses go, instead of being made."""

    def slept(seconds: float) -> None:
        assert pauses is not None
        pauses.append(seconds)
        if clock := options.get("clock"):
            clock.now += seconds

    async def slept_async(seconds: float) -> None:
        slept(seconds)

    async def main() -> Any:
        async with AsyncClient(url, **options) as client:
            return await call(client)

    if kind is AsyncClient:
        options |= {"sleep": slept_async} if pauses is not None else {}
        return anyio.run(main)
    options |= {"sleep": slept} if pauses is not None else {}
    with Client(url, **options) as client:
        return call(client)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    publish_identity(folder)
    return folder


@pytest.fixture(scope="module")
def url(repository: Path) -> Iterator[str]:
    """A real service that takes so little at once that many clients meet a 429."""
    environment = PATIENT_SERVICE | {
        "STRIDEVIT_MAX_PENDING_IMAGES": "8",
        "STRIDEVIT_MAX_IMAGES_PER_REQUEST": "4",
        "STRIDEVIT_LOG_REQUESTS": "none",
    }
    with serving(repository, environment=environment) as (address, _):
        yield address


def classified(client: Any, *, image: Any) -> Any:
    return client.classify(image, top_k=3)


@both
def test_every_kind_of_image_is_answered(kind: Kind, url: str, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(IMAGE)
    opened = Image.open(file)
    opened.load()
    for image in (file, str(file), IMAGE, bytearray(IMAGE), io.BytesIO(IMAGE), opened, opened.convert("RGBA")):
        answer = result(kind, url, partial(classified, image=image), timeout=PATIENT)
        assert [best.label for best in answer.predictions] == [LABELS[0], LABELS[2], LABELS[1]]
    assert (answer.model, answer.choice) == ("identity-a", None)


@both
def test_of_many_images_a_broken_one_has_its_error_in_its_place(kind: Kind, url: str) -> None:
    answer = result(
        kind, url, lambda client: client.classify([IMAGE, b"%PDF-1.7", picture(9)], model="identity"), timeout=PATIENT
    )
    first, second, third = answer.results
    assert (first.predictions[0].label, third.error) == (LABELS[0], None)
    assert (second.predictions, second.error.code, second.error.status) == (None, "unsupported-image", 415)
    assert (answer.choice.family, answer.choice.reason) == ("identity", "most_accurate")


def test_orientation_of_an_image_of_pillow_counts(url: str) -> None:
    turned = Image.open(io.BytesIO(IMAGE))
    turned.getexif()[0x0112] = 3  # upside down
    with Client(url, timeout=PATIENT) as client:
        assert client.classify(turned, top_k=1).predictions[0].label == LABELS[9]


@both
def test_models_and_families_are_listed(kind: Kind, url: str) -> None:
    listed = result(kind, url, lambda client: client.models(), timeout=PATIENT)
    assert [(model.name, model.state, model.default) for model in listed.models] == [("identity-a", "ready", True)]
    assert (listed.families, listed.models[0].accuracy.top1) == ({"identity": ("identity-a",)}, 0.5)


@both
def test_an_error_has_the_members_of_the_problem(kind: Kind, url: str) -> None:
    with pytest.raises(Rejected, match="no model 'none' here") as raised:
        result(kind, url, lambda client: client.classify(IMAGE, model="none"), timeout=PATIENT)
    assert (raised.value.code, raised.value.status) == ("unknown-model", 404)
    assert raised.value.request_id
    assert raised.value.request_id in str(raised.value)


def test_clients_that_meet_real_429s_are_all_answered(url: str) -> None:
    def refused() -> float:
        lines = [
            line for line in get(f"{url}/metrics").text.splitlines() if line.startswith("stridevit_rejections_total")
        ]
        return sum(float(line.split()[-1]) for line in lines)

    together, before, clients = threading.Barrier(32), refused(), 32
    with Client(url, retries=100_000, timeout=PATIENT) as client, ThreadPoolExecutor(clients) as pool:

        def ask(number: int) -> list[str]:
            together.wait(PATIENT)
            answers = [client.classify([picture(number)] * 4, top_k=1) for _ in range(10)]
            return [answer.results[3].predictions[0].label for answer in answers if answer.results[3].predictions]

        answered = list(pool.map(ask, range(1, clients + 1)))
    assert answered == [[LABELS[0]] * 10] * clients
    assert refused() > before


@both
def test_it_is_ready_once_the_service_is(kind: Kind, stub: Stub, url: str) -> None:
    result(kind, url, lambda client: client.wait_ready(PATIENT))
    stub.replies = [problem(503, "not-ready"), problem(503, "not-ready"), Reply(body={"status": "ready"})]
    pauses: list[float] = []
    result(kind, stub.url, lambda client: client.wait_ready(PATIENT), pauses=pauses)
    assert ([asked.path for asked in stub.asked], len(pauses)) == (["/readyz"] * 3, 2)


@both
def test_waiting_for_a_service_ends_in_time_and_says_why(kind: Kind) -> None:
    with pytest.raises(DeadlineExceeded, match=r"not ready within 30 s: no service answers at http://127"):
        result(kind, f"http://127.0.0.1:{free_port()}", lambda client: client.wait_ready(30), pauses=[], clock=Clock())


@both
def test_a_refused_connection_is_tried_thrice_and_named_with_its_fix(kind: Kind) -> None:
    pauses: list[float] = []
    with pytest.raises(Unreachable, match=r"no service answers at .*Start one with `stridevit serve`, or give"):
        result(kind, f"http://127.0.0.1:{free_port()}", lambda client: client.models(), pauses=pauses)
    assert len(pauses) == 2


@both
def test_after_a_429_it_waits_as_told_and_passes_on_what_is_left(kind: Kind, stub: Stub) -> None:
    stub.replies = [
        problem(429, "overloaded", retry_after_ms=200_000),
        problem(429, "key-limited", retry_after_ms=300_000),
        Reply(body=CLASSIFICATION),
    ]
    # The pauses are made on a clock of the test; what is left of the deadline is also the real time for an answer.
    clock, pauses = Clock(), list[float]()
    answer = result(
        kind,
        stub.url,
        lambda client: client.classify(IMAGE, deadline_ms=1_000_000, model="m", priority="batch"),
        pauses=pauses,
        clock=clock,
    )
    assert answer.predictions[0].label == "cat"
    first, second = pauses
    assert (200 <= first <= 220, 300 <= second <= 330) == (True, True)
    deadlines = [float(asked.query["deadline_ms"]) for asked in stub.asked]
    assert deadlines == pytest.approx([1e6, 1000 * (1000 - first), 1000 * (1000 - first - second)], abs=0.01)
    assert {(asked.query["model"], asked.query["priority"], asked.body) for asked in stub.asked} == {
        ("m", "batch", IMAGE)
    }


@both
def test_it_never_waits_beyond_the_deadline(kind: Kind, stub: Stub) -> None:
    stub.replies = [problem(429, "overloaded", retry_after_ms=400_000)]
    clock, pauses = Clock(), list[float]()
    with pytest.raises(Busy) as raised:
        result(kind, stub.url, lambda client: client.classify(IMAGE, deadline_ms=1e6), pauses=pauses, clock=clock)
    assert (len(stub.asked), sum(pauses) < 1000) == (3, True)
    assert (raised.value.code, raised.value.retry_after_ms, raised.value.request_id) == ("overloaded", 400_000, "r9")


def test_a_deadline_that_passes_in_a_pause_ends_the_call_without_another_request(stub: Stub) -> None:
    stub.replies, clock = [problem(429, "overloaded", retry_after_ms=90_000)], Clock()

    def oversleep(_: float) -> None:
        clock.now += 5000

    with Client(stub.url, timeout=1000, clock=clock, sleep=oversleep) as client, pytest.raises(DeadlineExceeded):
        client.models()
    assert len(stub.asked) == 1


@both
@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (problem(400, "bad-image"), Rejected),
        (problem(401, "unauthorized"), Rejected),
        (problem(408, "body-too-slow"), Rejected),
        (problem(422, "invalid-parameter"), Rejected),
        (problem(500, "model-fault"), Rejected),
        (problem(504, "deadline-exceeded"), DeadlineExceeded),
        (Reply(502, b"<html>Bad Gateway</html>"), Rejected),
        (Reply(200, b"<html>Hello</html>"), Rejected),
        (Reply(200, {"model": "m"}), Rejected),
    ],
    ids=lambda value: value.status if isinstance(value, Reply) else "",
)
def test_what_may_not_be_tried_again_is_asked_once(
    reply: Reply, error: type[StrideViTError], kind: Kind, stub: Stub
) -> None:
    stub.replies = [reply]
    with pytest.raises(error) as raised:
        result(kind, stub.url, lambda client: client.classify(IMAGE), pauses=[])
    assert (len(stub.asked), raised.value.status) == (1, reply.status)
    assert "\n" not in raised.value.detail or reply.status == 200


@both
def test_a_503_is_tried_again_for_a_proxy_too_and_not_for_ever(kind: Kind, stub: Stub) -> None:
    stub.replies = [Reply(503, b"upstream", {"Retry-After": "2"})]
    pauses: list[float] = []
    with pytest.raises(Busy, match="503 Service Unavailable: upstream") as raised:
        result(kind, stub.url, lambda client: client.classify(IMAGE), pauses=pauses, retries=3)
    assert (len(stub.asked), raised.value.code) == (4, "http-503")
    assert all(2 <= pause <= 2.2 for pause in pauses)


@both
def test_a_service_that_never_answers_is_left_at_the_deadline(kind: Kind) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(DeadlineExceeded, match="within 200 ms"):
            result(kind, address, lambda client: client.classify(IMAGE, deadline_ms=200))


def test_a_body_that_is_sent_too_slowly_is_not_sent_to_its_end() -> None:
    clock, body = Clock(), bytes(20_000_000)
    received = bytearray()

    def read_slowly(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            while data := connection.recv(65536):
                received.extend(data)
                clock.now += 0.1

    with socket.create_server(("127.0.0.1", 0)) as listener:
        reader = threading.Thread(target=read_slowly, args=(listener,))
        reader.start()
        try:
            address = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with Client(address, clock=clock) as client, pytest.raises(DeadlineExceeded):
                client.classify(body, deadline_ms=2000)
        finally:
            reader.join()
    assert len(received) < len(body)


@both
def test_the_key_comes_from_an_argument_or_the_environment_and_is_shown_nowhere(
    kind: Kind, repository: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    shown = []
    with serving(repository, environment={"STRIDEVIT_API_KEY_HASHES": digest}) as (url, _):

        def named(client: Any) -> Any:
            shown.append(repr(client))
            return client.models()

        assert result(kind, url, named, api_key=KEY).models
        with pytest.raises(Rejected) as raised:
            result(kind, url, named, api_key=KEY + "x")
        assert raised.value.status == 401
        shown.append(repr(raised.value) + str(raised.value))
        monkeypatch.setenv("STRIDEVIT_API_KEY", KEY)
        assert result(kind, url, named).models
    with pytest.raises(ValueError, match="characters that no header can hold") as refused:
        kind(url, api_key=f"{KEY}\n")
    assert KEY not in "".join([*shown, str(refused.value), caplog.text])
    assert caplog.text


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "ftp://127.0.0.1", "", "http://"])
def test_an_address_that_is_none_is_told_how_to_write_it(address: str) -> None:
    with pytest.raises(ValueError, match=r"must look like http://127\.0\.0\.1:8000"):
        Client(address)


def test_a_password_in_the_address_is_refused_without_showing_it() -> None:
    with pytest.raises(ValueError, match="must hold no password") as raised:
        Client(f"http://me:{KEY}@127.0.0.1:8000")
    assert KEY not in str(raised.value)


def test_a_service_may_be_under_a_path(stub: Stub) -> None:
    with Client(f"{stub.url}/a/prefix/") as client:
        client.classify(IMAGE)
    assert stub.asked[0].path == "/a/prefix/v1/classify"


@pytest.mark.parametrize(("images", "error"), [([], ValueError), ([3], TypeError), (io.StringIO("text"), TypeError)])
def test_what_is_no_image_is_an_error_before_anything_is_sent(images: Any, error: type[Exception], stub: Stub) -> None:
    with Client(stub.url) as client, pytest.raises(error):
        client.classify(images)
    assert stub.asked == []


@both
def test_a_service_s_models_are_compared_on_one_image(kind: Kind, tmp_path: Path) -> None:
    for name, top1 in (("identity-a", 0.5), ("identity-b", 0.6)):
        publish_identity(tmp_path, name, top1=top1)
    with serving(tmp_path, environment=PATIENT_SERVICE) as (url, _):
        found = result(kind, url, lambda client: client.compare(IMAGE, top_k=1), timeout=PATIENT)
        assert {answer.model: answer.predictions[0].label for answer in found.answers} == {
            "identity-a": LABELS[0],
            "identity-b": LABELS[0],
        }
        assert (found.agreement.model, found.agreement.of, found.agreement.agree) == ("identity-b", 1, 1)
        seen = Image.open(io.BytesIO(base64.b64decode(found.pictures[0].png)))
        assert (seen.size, seen.getpixel((0, 0))) == ((2, 2), (3, 1, 2))
        one = result(kind, url, lambda client: client.compare(IMAGE, models=["identity-a"]), timeout=PATIENT)
        assert [answer.model for answer in one.answers] == ["identity-a"]
        with pytest.raises(Rejected, match="no model 'none'"):
            result(kind, url, lambda client: client.compare(IMAGE, models=["none"]), timeout=PATIENT)


EVENTS: list[dict[str, Any]] = [
    {"event": "picture", "models": ["a", "b"], "width": 2, "height": 2, "png": "iVBO"},
    {
        "event": "answer",
        "model": "a",
        "version": 1,
        "predictions": [{"index": 0, "label": "cat", "probability": 0.9}],
        "timings_ms": {"total": 2.0},
    },
    {"event": "error", "model": "b", "problem": problem(429, "overloaded", retry_after_ms=5).body},
    {"event": "end", "request_id": "r2", "agreement": {"model": "a", "of": 1, "agree": 1}},
]


def as_lines(events: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)


@both
def test_a_comparison_has_every_model_s_answer_or_problem(kind: Kind, stub: Stub) -> None:
    stub.replies = [Reply(body=as_lines(EVENTS))]
    found = result(kind, stub.url, lambda client: client.compare(IMAGE, models=["a", "b"], top_k=1, deadline_ms=60_000))
    assert (stub.asked[0].path, stub.asked[0].query["models"]) == ("/v1/compare", "a,b")
    first, second = found.answers
    assert (first.predictions[0].label, second.problem.code, second.predictions) == ("cat", "overloaded", None)
    assert (found.pictures[0].models, found.agreement.agree, found.request_id) == (("a", "b"), 1, "r2")


@both
def test_one_name_is_no_sequence_of_letters(kind: Kind, stub: Stub) -> None:
    stub.replies = [Reply(body=as_lines(EVENTS))]
    result(kind, stub.url, lambda client: client.compare(IMAGE, models="cifar100"))
    assert stub.asked[0].query["models"] == "cifar100"


@both
def test_a_comparison_that_breaks_off_is_an_error(kind: Kind, stub: Stub) -> None:
    stub.replies = [Reply(body=as_lines(EVENTS[:-1]))]
    with pytest.raises(Rejected, match="breaks off before its end"):
        result(kind, stub.url, lambda client: client.compare(IMAGE))


def test_importing_the_package_imports_no_client() -> None:
    import subprocess
    import sys

    code = "import sys, stridevit; assert not {'httpx', 'pydantic', 'anyio'} & set(sys.modules); stridevit.Client"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert httpx.__name__
