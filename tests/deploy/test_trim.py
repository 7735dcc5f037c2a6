"""What the image leaves out of its packages; deploy/image-test.sh tests that what is left serves."""

from pathlib import Path

import pytest

from deploy.trim import UNUSED, UNUSED_ON_A_CPU, trim


def _environment(folder: Path, *, gpu: bool = False) -> Path:
    """A file for each name, and one that stays."""
    for pattern in UNUSED + UNUSED_ON_A_CPU:
        file = folder / pattern.replace("**", "deep").replace("*", "x")
        if file.suffix:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"12")
        else:
            file.mkdir(parents=True)
            (file / "inside.py").write_bytes(b"12")
    (folder / "numpy" / "__init__.py").write_bytes(b"12")
    (folder / ("onnxruntime_gpu-1.dist-info" if gpu else "onnxruntime-1.dist-info")).mkdir()
    return folder


def test_only_what_is_named_is_removed(tmp_path: Path) -> None:
    assert trim(_environment(tmp_path)) == 2 * len(UNUSED + UNUSED_ON_A_CPU)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["__init__.py"]


def test_on_a_gpu_what_was_not_tried_there_stays(tmp_path: Path) -> None:
    trim(_environment(tmp_path, gpu=True))
    assert [file.name for file in (tmp_path / "onnxruntime" / "capi").iterdir()] == ["libonnxruntime.so.x"]


def test_a_name_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    (_environment(tmp_path) / "numpy" / "f2py" / "inside.py").unlink()
    (tmp_path / "numpy" / "f2py").rmdir()
    with pytest.raises(FileNotFoundError, match="numpy/f2py matches nothing"):
        trim(tmp_path)
