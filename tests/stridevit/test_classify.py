"""The command `stridevit classify`, against a real service and a stub."""

import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from loadtests.experiment.server import free_port
from stridevit.classify.many import Window
from stridevit.command import app
from tests.processes import PATIENCE_SECONDS, PATIENT_SERVICE, ROOT, get, interruptible, serving, wait_until
from tests.service.identity import LABELS, picture, publish_identity
from tests.stridevit.stub import CLASSIFICATION, Reply, Stub, problem

COUNT = 60


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real service that takes few images at once, and some time for each."""
    folder = tmp_path_factory.mktemp("models")
    publish_identity(folder, work=400)
    environment = PATIENT_SERVICE | {
        "STRIDEVIT_MAX_PENDING_IMAGES": "4",
        "STRIDEVIT_MAX_IMAGES_PER_REQUEST": "1",
        "STRIDEVIT_LOG_REQUESTS": "none",
    }
    with serving(folder, environment=environment) as (address, _):
        yield address


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of images, two of them broken, and of other things."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number in range(1, COUNT + 1):
        (folder / ("more" if number % 2 else ".") / f"{number:03}.png").write_bytes(picture(number))
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "empty.JPG").touch()
    (folder / ".hidden.png").write_bytes(picture(1))
    (folder / "notes.txt").write_text("not sent")
    return folder


def run(*words: str | float | Path, **more: Any) -> Result:
    return CliRunner().invoke(app, ["classify", *map(str, words)], prog_name="stridevit", **more)


def plain(ended: Result) -> str:
    """What was said, without the frame and the line ends of a message on arguments."""
    return " ".join(ended.output.replace("│", "").split())


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


def test_images_are_printed_in_their_order_with_standard_input_among_them(url: str, tmp_path: Path) -> None:
    file = tmp_path / "a b.png"
    file.write_bytes(picture(7))
    ended = run("-", file, "--url", url, "--top-k", 2, input=picture(9 << 8))
    first, second = ended.stdout.splitlines()
    assert ended.exit_code == 0
    assert first.startswith(f"-: {LABELS[1]} ")
    assert second.startswith(f"{file}: {LABELS[0]} ")
    assert "(identity-a, " in second
    assert "2 classified, 0 with an error" in ended.stderr


def test_json_has_one_object_a_line_also_for_an_error(url: str, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.pdf"
    good.write_bytes(picture(7))
    bad.write_bytes(b"%PDF-1.7")
    ended = run(good, bad, "--url", url, "--json", "--model", "identity", "--deadline-ms", 120_000)
    first, second = map(json.loads, ended.stdout.splitlines())
    assert (first["image"], first["predictions"][0]["label"], first["model"]) == (str(good), LABELS[0], "identity-a")
    assert first["choice"]["reason"] == "most_accurate"
    assert (second["image"], second["error"]["code"], second["error"]["status"]) == (str(bad), "unsupported-image", 415)
    assert ended.exit_code == 1


def test_a_folder_becomes_a_table_although_the_service_refuses_some(
    url: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, resize = list[float](), Window._resize

    def watched(self: Window, size: float) -> None:
        resize(self, size)
        sizes.append(self.places.total_tokens)

    monkeypatch.setattr(Window, "_resize", watched)
    out = tmp_path / "results.csv"
    ended = run(photos, "--url", url, "--out", out, "--top-k", 2, "--at-once", 200)
    assert ended.exit_code == 1  # two are broken
    found = {Path(row["image"]).name: row for row in rows(out)}
    assert len(rows(out)) == len(found) == COUNT + 2
    assert {row["label_1"] for name, row in found.items() if name.endswith(".png")} == {LABELS[0]}
    assert found["broken.jpg"]["error"].startswith("unsupported-image: ")
    assert found["empty.JPG"]["error"].startswith("bad-request: the body is empty")
    assert found["001.png"] | {"image": "", "probability_1": "", "probability_2": ""} == {
        **dict.fromkeys(found["001.png"], ""),
        **{"label_1": LABELS[0], "label_2": LABELS[1], "requested": "", "model": "identity-a", "version": "1"},
    }
    assert f"{COUNT} classified, 2 with an error in {out}" in ended.stderr
    refused = re.search(r'^stridevit_rejections_total{reason="images"} (\S+)', get(f"{url}/metrics").text, re.MULTILINE)
    assert refused
    assert float(refused[1]) > 0
    assert any(later < earlier for earlier, later in itertools.pairwise(sizes))


def test_a_second_run_sends_only_what_has_no_row(url: str, photos: Path, tmp_path: Path, stub: Stub) -> None:
    out = tmp_path / "results.csv"
    run(photos, "--url", url, "--out", out)
    lines = out.read_bytes().splitlines(keepends=True)
    # What a run leaves that is killed while it writes.
    out.write_bytes(b"".join(lines[:40]) + lines[40][:10])
    ended = run(photos, "--url", url, "--out", out)
    assert sorted(out.read_bytes().splitlines()) == sorted(b"".join(lines).splitlines())
    assert "39 from before" in ended.stderr
    again = run(photos, "--url", stub.url, "--out", out)
    assert (again.exit_code, stub.asked) == (1, [])
    counts = f"0 classified, 0 with an error, {COUNT + 2} from before, 2 of them with an error in {out}"
    assert again.stderr.splitlines()[0] == counts
    assert f"delete their rows from {out}" in again.stderr
    out.write_bytes(b"".join(line for line in lines if b"bad-request" not in line and b"unsupported" not in line))
    assert run(photos / "more", "--url", stub.url, "--out", out).exit_code == 0


def test_a_file_that_is_no_table_is_left_alone(tmp_path: Path, photos: Path) -> None:
    out = tmp_path / "results.csv"
    out.write_text("a,b\n1,2\n")
    ended = run(photos, "--out", out)
    assert (ended.exit_code, out.read_text()) == (2, "a,b\n1,2\n")
    assert "is no table of this command" in plain(ended)


def test_what_is_late_gets_no_row_and_is_sent_again(stub: Stub, tmp_path: Path) -> None:
    file, out = tmp_path / "a.png", tmp_path / "results.csv"
    file.write_bytes(picture(1))
    stub.replies = [problem(504, "deadline-exceeded"), Reply(body=CLASSIFICATION)]
    ended = run(file, "--url", stub.url, "--out", out)
    assert (ended.exit_code, rows(out)) == (1, [])
    assert "0 classified, 0 with an error, 1 missed the deadline" in ended.stderr
    assert run(file, "--url", stub.url, "--out", out).exit_code == 0
    assert [row["label_1"] for row in rows(out)] == ["cat"]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (problem(401, "unauthorized"), "this is unauthorized; keys come from STRIDEVIT_API_KEY"),
        (problem(404, "unknown-model"), "this is unknown-model"),
        (problem(429, "overloaded", retry_after_ms=3_600_000), "this is overloaded"),
    ],
    ids=["401", "404", "429"],
)
def test_what_concerns_all_images_ends_the_run_with_one_message(
    reply: Reply, said: str, stub: Stub, photos: Path, tmp_path: Path
) -> None:
    stub.replies = [reply]
    ended = run(photos, "--url", stub.url, "--out", tmp_path / "results.csv")
    assert (ended.exit_code, ended.stderr.count("error: ")) == (1, 1)
    assert re.search(rf"error: {photos}/\S+: {said}", ended.stderr)
    assert len(stub.asked) <= 4


def test_nobody_there_is_one_line_that_names_the_fix(photos: Path) -> None:
    ended = run(photos, "--url", f"http://127.0.0.1:{free_port()}")
    assert (ended.exit_code, ended.stderr.count("error: ")) == (1, 1)
    assert "Start one with `stridevit serve`" in ended.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none.png"], "no such file or folder: none.png"),
        (["."], "no images in ."),
        ([str(ROOT / "README.md"), "--url", "localhost:8000"], "must look like http://127.0.0.1:8000"),
        ([str(ROOT / "README.md"), "--json", "--out", "x.csv"], "leave out --json or --out"),
        ([str(ROOT / "README.md"), "--top-k", "0"], "--top-k"),
        ([str(ROOT / "README.md"), "--url", "http://127.0.0.1:port"], "must look like http://127.0.0.1:8000"),
        ([str(ROOT / "README.md"), "--deadline-ms", "nan"], "--deadline-ms"),
        ([str(ROOT / "README.md"), "--deadline-ms", "inf"], "--deadline-ms"),
        ([str(ROOT / "README.md"), "--out", "nodir/x.csv"], "there is no folder nodir: create it first"),
        (["-", "-"], "standard input can be read only once"),
        ([], "images"),
    ],
)
def test_wrong_arguments_end_with_2(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run(*words)
    assert ended.exit_code == 2
    assert said.lower() in plain(ended).lower()


def test_a_wrong_key_is_not_blamed_on_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRIDEVIT_API_KEY", "a key")
    ended = run(ROOT / "README.md")
    assert ended.exit_code == 2
    assert "the API key (STRIDEVIT_API_KEY or api_key) has characters" in plain(ended)
    assert "--url" not in plain(ended)


def test_a_file_that_cannot_be_read_is_an_error_of_its_own(stub: Stub, tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    good.write_bytes(picture(1))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "loop.png").symlink_to("loop.png")
    ended = run(good, tmp_path / "sub", "--url", stub.url)
    assert (ended.exit_code, len(stub.asked)) == (1, 1)
    assert "loop.png: error: Too many levels of symbolic links" in ended.stderr


def test_names_of_any_bytes_are_one_line_each(stub: Stub, tmp_path: Path) -> None:
    folder, out = tmp_path / "photos", tmp_path / "results.csv"
    folder.mkdir()
    for name in (b"a\nb.png", rb"a\nb.png", b"\xff.png", 'é,\u2028".png'.encode()):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(picture(1))
    for _ in range(2):
        assert run(folder, "--url", stub.url, "--out", out).exit_code == 0
    assert len(stub.asked) == 4
    names = {row["image"].rpartition("/")[2] for row in rows(out)}
    assert names == {"a\\nb.png", "a\\\\nb.png", "\\udcff.png", 'é,\\u2028".png'}


def test_ctrl_c_keeps_what_is_there(stub: Stub, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.csv"
    stub.replies = [*[Reply(body=CLASSIFICATION)] * 5, problem(429, "overloaded", retry_after_ms=15_000)]
    words = ("-m", "stridevit", "classify", str(photos), "--url", stub.url, "--out", str(out))
    with interruptible(sys.executable, *words) as process:
        # Rows are in the file while the run goes on. It ends when an image is refused for half a minute.
        wait_until(lambda: len(stub.asked) >= 7 and len(rows(out)) == 5, process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, len(rows(out))) == (130, 5)
    assert "interrupted: run the same command to resume" in said
    assert "Traceback" not in said


def test_ctrl_c_without_a_table_promises_nothing(stub: Stub, photos: Path) -> None:
    stub.replies = [problem(429, "overloaded", retry_after_ms=15_000)]
    with interruptible(sys.executable, "-m", "stridevit", "classify", str(photos), "--url", stub.url) as process:
        wait_until(lambda: len(stub.asked) >= 2, process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, said.splitlines()[0]) == (130, "interrupted")
    assert "goes on" not in said


def test_a_deadline_without_a_table_is_an_image_s_own(stub: Stub, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.png", "b.png")]
    for file in files:
        file.write_bytes(picture(1))
    stub.replies = [problem(429, "overloaded", retry_after_ms=3_600_000)]
    ended = run(*files, "--url", stub.url, "--deadline-ms", 400_000)
    assert (ended.exit_code, len(stub.asked)) == (1, 2)
    assert "0 classified, 0 with an error, 2 missed the deadline" in ended.stderr


def test_what_was_answered_is_printed_although_the_run_ends(stub: Stub, tmp_path: Path) -> None:
    first, second = tmp_path / "1.png", tmp_path / "2.png"
    first.write_bytes(picture(1))
    second.write_bytes(picture(2))

    def choose() -> None:
        of_second = [asked.body == picture(2) for asked in stub.asked]
        if of_second[-1]:
            stub.replies = [Reply(body=CLASSIFICATION)]
        elif any(of_second):
            stub.replies = [problem(401, "unauthorized")]
        else:
            stub.replies = [problem(429, "overloaded", retry_after_ms=1)]

    stub.before = choose
    ended = run(first, second, "--url", stub.url)
    assert ended.exit_code == 1
    assert [line.partition(": ")[0] for line in ended.stdout.splitlines()] == [str(second)]
    assert ended.stderr.splitlines()[-1] == "1 classified, 0 with an error"


def test_whoever_reads_the_lines_may_have_enough(stub: Stub, photos: Path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    try:
        command = [sys.executable, "-m", "stridevit", "classify", str(photos), "--url", stub.url]
        ended = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, check=False, cwd=ROOT)
    finally:
        os.close(writes)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(stub: Stub, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.csv"
    command = [sys.executable, "-m", "stridevit", "classify", str(photos), "--url", stub.url, "--out", str(out)]
    limited = ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", *command]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run(limited, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert (ended.returncode, "Traceback" in ended.stderr, ended.stderr.count("error: ")) == (1, False, 1)
    assert f"'{out}'. Once that is fixed, run the same command to resume" in ended.stderr
    written = len(rows(out))
    assert 0 < written < COUNT + 2
    assert f"{written} from before" in run(photos, "--url", stub.url, "--out", out).stderr
    assert len(rows(out)) == COUNT + 2


def test_help_states_the_exit_codes() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "stridevit", "classify", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert "Exit code: 0 each image was classified" in " ".join(shown.split())


def test_the_window_widens_while_answered_and_halves_once_for_what_was_sent_together() -> None:
    window = Window(10)
    sizes = [window.places.total_tokens]
    for _ in range(10):
        window.answered()
    sizes.append(window.places.total_tokens)
    epoch = window.epoch
    for _ in range(5):
        window.refused(epoch)
    sizes.append(window.places.total_tokens)
    for _ in range(5):
        window.answered()
    sizes.append(window.places.total_tokens)
    for _ in range(20):
        window.refused(window.epoch)
    sizes.append(window.places.total_tokens)
    assert sizes == [2, 10, 5, 5, 1]
