"""The engine limit, on the session's small model; no figure of speed is asserted."""

import io
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from service.__main__ import app
from service.engine_limit import EngineLimit, generated_jpeg, measure_engine_limit, read_images
from service.errors import StartupError
from service.settings import Settings
from tests.service.conftest import PNG, encoded, noise

MODEL = "digits-csra-r2"


def settings(repository: Path, **changes: object) -> Settings:
    return Settings(repository=repository, device="cpu", max_batch=6, threads=2, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def limit(repository: Path) -> EngineLimit:
    images = [PNG, encoded(noise(320, 240), "JPEG"), encoded(noise(100, 300))]
    return measure_engine_limit(settings(repository, decode_threads=1), MODEL, images, seconds=0.1)


def test_rates_are_positive_and_the_batch_size_is_the_fastest_tried(limit: EngineLimit) -> None:
    by_size, alone = limit.images_per_second_by_batch_size, limit.engine_images_per_second_by_batch_size
    assert set(by_size) == set(alone) == {1, 2, 4, 6}
    assert limit.batch_size == max(by_size, key=lambda size: by_size[size])
    assert limit.images_per_second > 0
    assert limit.decode_images_per_second > 0
    assert all(rate > 0 for rate in (*by_size.values(), *alone.values()))
    assert (limit.model, limit.version, limit.device) == (MODEL, 1, "cpu")
    assert (limit.intra_op_threads, limit.engine_lanes) in ((1, 2), (2, 1)), "whichever was faster"
    assert (limit.decode_threads, limit.images) == (1, 3)


def test_the_baseline_is_the_memory_of_the_engine_and_the_model_alone(limit: EngineLimit) -> None:
    assert limit.baseline_pss_bytes is not None
    assert limit.baseline_pss_one_image_bytes is not None
    # Other processes that share its libraries come and go, so the two readings are not comparable.
    assert min(limit.baseline_pss_one_image_bytes, limit.baseline_pss_bytes) > 20_000_000


def test_the_limit_is_text_or_json(limit: EngineLimit) -> None:
    lines = {line[:40].strip(): line[40:] for line in limit.text().splitlines()}
    assert lines["images per second"] == f"{limit.images_per_second:.1f}"
    assert lines["images per second by batch size"].startswith("1: ")
    document = json.loads(json.dumps(asdict(limit)))
    assert document["images_per_second_by_batch_size"]["6"] == limit.images_per_second_by_batch_size[6]
    assert "onnxruntime" in " ".join(document["versions"])


def test_without_a_folder_a_jpeg_of_about_100_kb_is_generated() -> None:
    assert read_images(None) == [generated_jpeg()]
    assert 60_000 < len(generated_jpeg()) < 160_000
    assert Image.open(io.BytesIO(generated_jpeg())).size == (640, 480)


def test_the_files_of_a_folder_are_the_images(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number:05d}").write_bytes(encoded(noise(seed=number)))
    (tmp_path / "labels.csv").write_text("file,index\n00000,1\n")
    (tmp_path / ".hidden").write_text("not an image")
    (tmp_path / "folder").mkdir()
    assert read_images(tmp_path) == [encoded(noise(seed=number)) for number in range(3)]


def test_a_folder_without_images_is_an_error_that_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"--data .*nowhere: cannot be read"):
        read_images(tmp_path / "nowhere")
    with pytest.raises(StartupError, match=r"--data .*: no image found there"):
        read_images(tmp_path)


@pytest.mark.parametrize(
    ("model", "content", "message"),
    [
        ("no-such-model", PNG, "'no-such-model': no version of it"),
        (MODEL, b"not an image", "can be decoded: not an image"),
    ],
)
@pytest.mark.usefixtures("_no_logging")
def test_a_measurement_that_is_impossible_ends_with_one_line(
    model: str, content: bytes, message: str, repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "image").write_bytes(content)
    arguments = ["--model", model, "--data", str(tmp_path), "--repository", str(repository), "--device", "cpu"]
    result = CliRunner().invoke(app, ["engine-limit", *arguments, "--max-batch", "1"])
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
