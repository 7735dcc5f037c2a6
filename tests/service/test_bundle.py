"""Bundles on disk: errors are found and name the file."""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.bundle import (
    CONTENT_FILES,
    SUMS_FILE,
    Golden,
    content_digest,
    list_repository,
    model_names,
    publish,
    read_bundle,
    signature,
    versions,
)
from service.engine import Engine
from service.errors import BundleError
from service.models import verify
from service.models.verify import check_golden, verify_golden
from tests.service.conftest import resum


@pytest.fixture
def bundle(repository: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    copy = tmp_path / "digits-csra-r2" / "1"
    shutil.copytree(repository / "digits-csra-r2" / "1", copy)
    return copy


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(file=st.sampled_from(CONTENT_FILES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_flipped_bit_in_any_file_is_found_and_named(bundle: Path, file: str, place: float, bit: int) -> None:
    path = bundle / file
    intact = path.read_bytes()
    damaged = bytearray(intact)
    damaged[int(place * len(intact))] ^= 1 << bit
    path.write_bytes(damaged)
    with pytest.raises(BundleError, match=rf"{file}: sha256"):
        read_bundle(bundle)
    path.write_bytes(intact)
    read_bundle(bundle)


@pytest.mark.parametrize("file", [*CONTENT_FILES, SUMS_FILE])
def test_a_missing_file_is_named(bundle: Path, file: str) -> None:
    (bundle / file).unlink()
    with pytest.raises(BundleError, match=file):
        read_bundle(bundle)


@pytest.mark.parametrize(
    "text",
    ["", "garbage\n", "00  model.onnx\n", "0" * 64 + "  ../../etc/passwd\n", "0" * 64 + " model.onnx\n"],
)
def test_a_malformed_sums_file_is_an_error(bundle: Path, text: str) -> None:
    (bundle / SUMS_FILE).write_text(text)
    with pytest.raises(BundleError, match=SUMS_FILE):
        read_bundle(bundle)


@pytest.mark.parametrize(
    ("key", "value"), [("schema_version", 3), ("surprise", 1), ("precision", "fp7"), ("name", "../x"), ("opset", None)]
)
def test_a_manifest_that_violates_the_schema_is_refused(bundle: Path, key: str, value: object) -> None:
    manifest = bundle / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), key: value}))
    resum(bundle)
    with pytest.raises(BundleError, match=key):
        read_bundle(bundle)


def test_a_bundle_under_another_name_is_refused(bundle: Path) -> None:
    moved = bundle.parent.parent / "digits-mha" / "1"
    shutil.copytree(bundle, moved)
    with pytest.raises(BundleError, match="names 'digits-csra-r2'"):
        read_bundle(moved)


def test_golden_outputs_beyond_the_tolerance_are_refused_with_the_difference(bundle: Path) -> None:
    loaded = read_bundle(bundle)
    engine = Engine(loaded.model_path)
    verify_golden(loaded, engine)
    golden = loaded.golden()
    logits = golden.logits.copy()
    logits[2, 5] += 0.25
    arrays = {f"image_{n}": np.frombuffer(image, dtype=np.uint8) for n, image in enumerate(golden.images)}
    np.savez(bundle / "golden.npz", allow_pickle=False, logits=logits, probabilities=golden.probabilities, **arrays)
    resum(bundle)
    with pytest.raises(BundleError, match=r"golden\.npz: .* differ .* by 0\.25 in a logit .*CPU"):
        verify_golden(read_bundle(bundle), engine)


@pytest.mark.parametrize("saturate", [True, False])
@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_a_processor_that_cannot_run_int8_exactly_is_named_as_the_reason(
    precision: str, saturate: bool, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "bytes_saturate", lambda: saturate)
    loaded = read_bundle(bundle)
    manifest = loaded.manifest.model_copy(update={"precision": precision})
    golden = dataclasses.replace(loaded.golden(), logits=loaded.golden().logits + np.float32(9))
    with pytest.raises(BundleError, match="differ from the golden ones") as raised:
        check_golden(golden, manifest, Engine(loaded.model_path), path=bundle / "golden.npz")
    assert ("serve the fp32 model" in str(raised.value)) is (precision == "int8" and saturate)


def test_golden_files_are_never_unpickled(bundle: Path) -> None:
    np.savez(bundle / "golden.npz", logits=np.array([{"a": 1}], dtype=object))
    resum(bundle)
    with pytest.raises(BundleError, match=r"golden\.npz: cannot be read"):
        read_bundle(bundle).golden()


def test_publishing_takes_the_next_version_and_leaves_nothing_else(bundle: Path, tmp_path: Path) -> None:
    source = read_bundle(bundle)
    target = tmp_path / "elsewhere"
    for expected in ("1", "2", "3"):
        folder = publish(
            target,
            source.manifest,
            model=source.model_path.read_bytes(),
            labels=source.labels,
            golden=source.golden(),
        )
        assert folder.name == expected
        assert read_bundle(folder).manifest == source.manifest
    assert versions(target, "digits-csra-r2") == [1, 2, 3]
    assert sorted(entry.name for entry in (target / "digits-csra-r2").iterdir()) == ["1", "2", "3"]
    assert model_names(target) == ["digits-csra-r2"]


def test_a_publication_that_fails_leaves_no_version(bundle: Path, tmp_path: Path) -> None:
    source = read_bundle(bundle)
    broken = Golden(images=("not bytes",), logits=source.golden().logits, probabilities=source.golden().probabilities)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        publish(tmp_path / "x", source.manifest, model=b"", labels=source.labels, golden=broken)
    assert list((tmp_path / "x" / "digits-csra-r2").iterdir()) == []


def test_a_missing_repository_is_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="--repository"):
        model_names(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["weights.bin", ".hidden", ".nfs0001", "folder"])
def test_what_the_sums_do_not_list_is_refused_by_name(bundle: Path, name: str) -> None:
    """ONNX Runtime would load external data from it, which no digest covers."""
    if name == "folder":
        (bundle / name).mkdir()
    else:
        (bundle / name).write_bytes(b"\0" * 8)
    with pytest.raises(BundleError, match=rf"/{name}: not listed in SHA256SUMS: .*remove it"):
        read_bundle(bundle)


@pytest.mark.parametrize("file", [*CONTENT_FILES, SUMS_FILE])
def test_what_is_not_a_file_is_refused_without_opening_it(bundle: Path, file: str) -> None:
    path, copy = bundle / file, bundle.parent / "copy"
    path.rename(copy)
    path.symlink_to(copy)
    with pytest.raises(BundleError, match=rf"{file}: is a link, not a file: put the file itself"):
        read_bundle(bundle)
    path.unlink()
    os.mkfifo(path)  # whoever opens it for reading waits for a writer
    with pytest.raises(BundleError, match=rf"{file}: is a FIFO"):
        read_bundle(bundle)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        # The name of a socket may have some hundred characters only.
        with contextlib.chdir(bundle):
            listening.bind(file)
        with pytest.raises(BundleError, match=rf"{file}: is a socket"):
            read_bundle(bundle)


def test_a_file_that_becomes_something_else_while_it_is_read_does_not_block(bundle: Path) -> None:
    path = bundle / SUMS_FILE
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BundleError, match="is a FIFO"):
        content_digest(bundle)


@pytest.mark.parametrize("file", ["SHA256SUMS", "manifest.json", "labels.txt", "golden.npz"])
def test_a_file_that_would_take_too_much_memory_is_refused(bundle: Path, file: str) -> None:
    loaded = read_bundle(bundle)
    with (bundle / file).open("r+b") as stream:
        stream.truncate(300 * 1024 * 1024)  # sparse
    if file != SUMS_FILE:
        resum(bundle)
    read = loaded.golden if file == "golden.npz" else partial(read_bundle, bundle)
    with pytest.raises(BundleError, match=rf"{file}: 314572800 bytes, more than \d+"):
        read()


def test_a_golden_file_that_unpacks_to_too_much_is_refused(bundle: Path) -> None:
    np.savez_compressed(bundle / "golden.npz", allow_pickle=False, logits=np.zeros(1 << 26, np.float64))
    assert (bundle / "golden.npz").stat().st_size < 1 << 20
    resum(bundle)
    with pytest.raises(BundleError, match=r"golden\.npz: unpacks to 5\d{8} bytes"):
        read_bundle(bundle).golden()


def test_only_plain_decimal_numbers_are_versions(bundle: Path) -> None:
    for name in ("0", "01", "٢", "²", "+3", "4.0", "5_0", " 6", "7x", "9" * 19):
        shutil.copytree(bundle, bundle.parent / name)
        with pytest.raises(BundleError, match="is not a bundle"):
            read_bundle(bundle.parent / name)
    shutil.copytree(bundle, bundle.parent / "20261128120000")
    assert versions(bundle.parent.parent, "digits-csra-r2") == [1, 20261128120000]


def test_one_folder_that_cannot_be_listed_hides_no_other(bundle: Path) -> None:
    repository = bundle.parent.parent
    (repository / "loop").symlink_to("loop")
    listing = list_repository(repository)
    assert listing.versions == {"digits-csra-r2": [1]}
    assert list(listing.unreadable) == ["loop"]
    assert listing.names == ["digits-csra-r2", "loop"]


def test_a_signature_changes_with_what_a_folder_holds(bundle: Path) -> None:
    seen = signature(bundle)
    assert signature(bundle) == seen
    (bundle / "labels.txt").chmod(0o600)
    chmod = signature(bundle)
    assert chmod != seen
    (bundle / "labels.txt").write_text((bundle / "labels.txt").read_text())
    assert signature(bundle) != chmod
    assert signature(bundle / "nowhere") is None
