"""The engine limit, on the session's small model; no figure of speed is asserted."""

import io
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from service.engine_limit import drawn_jpeg, measure_limit, render, run
from service.errors import StartupError
from service.settings import Settings
from tests.service.conftest import PNG, encoded, noise

MODEL = "digits-csra-r2"


def settings(repository: Path, **changes: object) -> Settings:
    return Settings(repository=repository, device="cpu", max_batch=6, threads=2, **changes)  # type: ignore[arg-type]


def test_rates_are_positive_and_the_batch_is_the_fastest_tried(repository: Path) -> None:
    images = [PNG, encoded(noise(320, 240), "JPEG"), encoded(noise(100, 300))]
    limit = measure_limit(settings(repository, decode_threads=1), MODEL, images, seconds=0.3)
    assert set(limit.by_batch) == set(limit.engine_only) == {1, 2, 4, 6}
    assert limit.batch == max(limit.by_batch, key=lambda size: limit.by_batch[size])
    assert limit.images_per_second > 0
    assert limit.decode_only > 0
    assert all(rate > 0 for rate in (*limit.by_batch.values(), *limit.engine_only.values()))
    assert (limit.model, limit.version, limit.device) == (MODEL, 1, "cpu")
    assert limit.intra_op_threads in (1, 2), "whichever was faster"
    assert (limit.decode_threads, limit.images) == (1, 3)
    assert limit.baseline_bytes is not None
    assert limit.baseline_batch1_bytes is not None
    assert 20_000_000 < limit.baseline_batch1_bytes <= limit.baseline_bytes * 1.05
    assert "engine limit" in render(limit)
    document = json.loads(json.dumps(asdict(limit)))
    assert document["by_batch"]["6"] == limit.by_batch[6]
    assert "onnxruntime" in " ".join(document["versions"])


def test_without_a_folder_a_jpeg_of_about_100_kb_is_drawn(repository: Path) -> None:
    assert 60_000 < len(drawn_jpeg()) < 160_000
    assert Image.open(io.BytesIO(drawn_jpeg())).size == (640, 480)
    limit = run(settings(repository).model_copy(update={"max_batch": 1}), MODEL, None, 0.1)
    assert (limit.images, limit.image_bytes, limit.batch) == (1, len(drawn_jpeg()), 1)


def test_a_folder_s_files_are_the_images(repository: Path, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number:05d}").write_bytes(encoded(noise(seed=number)))
    limit = run(settings(repository).model_copy(update={"max_batch": 1}), MODEL, tmp_path, 0.1)
    assert limit.images == 3


def test_what_cannot_be_measured_is_said_in_one_line(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="'no-such-model': no version of it"):
        run(settings(repository), "no-such-model", None, 0.1)
    with pytest.raises(StartupError, match="nowhere: cannot be read"):
        run(settings(repository), MODEL, tmp_path / "nowhere", 0.1)
    with pytest.raises(StartupError, match="there is no file in it"):
        run(settings(repository), MODEL, tmp_path, 0.1)
    (tmp_path / "note.txt").write_text("not an image")
    with pytest.raises(StartupError, match="can be decoded: not an image"):
        run(settings(repository), MODEL, tmp_path, 0.1)
