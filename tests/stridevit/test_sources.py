"""The images that the arguments of `stridevit classify` name."""

import os
import socket
from pathlib import Path

import pytest

from stridevit.classify.many import Source
from stridevit.classify.sources import named


def names(*arguments: str | Path) -> list[str]:
    return [source.name for source in named([str(argument) for argument in arguments])]


def test_what_may_never_end_is_not_sent_from_a_folder_and_a_broken_link_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    folder = Path("photos")
    folder.mkdir()
    (folder / "a.png").touch()
    os.mkfifo(folder / "pipe.png")
    (folder / "linked-pipe.png").symlink_to("pipe.png")
    (folder / "linked.png").symlink_to("a.png")
    (folder / "broken.png").symlink_to("none.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("photos/socket.png")
        assert names(folder) == ["photos/a.png", "photos/broken.png", "photos/linked.png"]
    assert names(folder / "pipe.png") == ["photos/pipe.png"]  # named explicitly, such as by <(command)


def test_a_folder_that_cannot_be_listed_is_an_outcome_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    # Its path is too long for the system, also for root, who may list everything.
    at = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=at)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    image, folder = named([str(tmp_path)])
    assert image.name == f"{tmp_path}/a.png"
    assert folder.name.endswith("d")
    assert isinstance(folder.content, OSError)


def test_different_names_are_different_in_one_line_each(tmp_path: Path) -> None:
    for name in ("a\nb.png", r"a\nb.png", r"a\\nb.png"):
        (tmp_path / name).touch()
    shown = [name.removeprefix(f"{tmp_path}/") for name in names(tmp_path)]
    assert sorted(shown) == sorted([r"a\nb.png", r"a\\nb.png", r"a\\\\nb.png"])


def test_no_name_is_a_formula_in_a_spreadsheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("=1+2.png", "@a.png", "-a.png", "+a.png", "a=b.png"):
        Path(name).touch()
    assert names(".") == ["./+a.png", "./-a.png", "./=1+2.png", "./@a.png", "a=b.png"]
    assert names("=1+2.png", "./=1+2.png") == ["./=1+2.png"]


def test_a_source_is_named_once_in_the_order_of_the_arguments(tmp_path: Path) -> None:
    for name in ("b.png", "a.png"):
        (tmp_path / name).touch()
    found = named([str(tmp_path / "b.png"), str(tmp_path)])
    assert [source.name for source in found] == [f"{tmp_path}/b.png", f"{tmp_path}/a.png"]
    assert all(isinstance(source, Source) for source in found)
