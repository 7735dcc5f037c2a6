"""A service whose answers are known, images for it, and the command."""

import csv
import json
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import typer
from typer.testing import CliRunner, Result

from loadtests.accuracy.cli import accuracy

CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen")

app = typer.Typer()
app.command()(accuracy)

Answers = tuple[int, dict[str, str], Any]
"""Status, headers, JSON."""


class Fake(ThreadingHTTPServer):
    """Answers as the service does; an image's bytes say what a model named `right`, or any other, makes of it."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.stated: dict[str, dict[str, Any] | None] = {"right": None, "left": None}
        self.asked: list[tuple[float, str, str]] = []
        self.answer: Callable[[str, str, int], Answers] = lambda model, image, _: predicted(model, image)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that a test breaks on purpose is not worth a traceback."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Fake

    def do_GET(self) -> None:
        name = urlsplit(self.path).path.rpartition("/")[2]
        if name == "readyz":
            return self._send(200, {}, {"ready": True})
        if name not in self.server.stated:
            return self._send(404, {}, {"detail": f"no model {name!r} here; there are: left, right"})
        manifest = {"accuracy": self.server.stated[name]}
        return self._send(200, {}, {"name": name, "version": 3, "labels": CLASSES, "manifest": manifest})

    def do_POST(self) -> None:
        query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        image = self.rfile.read(int(self.headers["Content-Length"])).decode()
        assert (query["version"], query["top_k"]) == ("3", "5")
        earlier = sum(asked[1:] == (query["model"], image) for asked in self.server.asked)
        self.server.asked.append((time.monotonic(), query["model"], image))
        self._send(*self.server.answer(query["model"], image, earlier))

    def _send(self, status: int, headers: dict[str, str], body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def predicted(model: str, image: str) -> Answers:
    """An image `right=ant,bee;left=cat` is ant, then bee, to one model and cat to the other."""
    said = dict(part.split("=") for part in image.partition("#")[0].split(";"))[model].split(",")
    predictions = [
        {"index": CLASSES.index(label), "label": label, "probability": round(0.9 / (1 + place), 3)}
        for place, label in enumerate(said)
    ]
    return 200, {}, {"model": model, "version": 3, "results": [{"predictions": predictions}]}


def images_of(folder: Path, images: list[tuple[str, str]]) -> Path:
    """(label, what the models say): files 00.png, 01.png, ... and their labels.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["file,label"]
    for number, (label, content) in enumerate(images):
        (folder / f"{number:02d}.png").write_text(f"{content}#{number}")
        lines.append(f"{number:02d}.png,{label}")
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder


def asking(data: Path, out: Path, *options: str, model: str = "right") -> Result:
    words = ["--model", model, "--data", str(data), "--out", str(out), "--command", "as typed", *options]
    return CliRunner().invoke(app, words)


def results_in(out: Path) -> Any:
    return json.loads((out / "results.json").read_text())


def rows_in(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


TEN = [
    *[("ant", "right=ant,bee;left=ant")] * 4,
    *[("bee", "right=bee,ant;left=ant,bee")] * 2,
    *[("cat", "right=dog,cat,ant;left=cat")] * 1,
    *[("dog", "right=ant,bee,cat,elk,dog;left=fox")] * 1,
    *[("elk", "right=ant,bee,cat,dog,fox;left=ant")] * 2,
]
"""`right`: six of ten, in the top five eight. `left`: five, seven. The same class for four and the last two."""
