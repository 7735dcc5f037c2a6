"""A version that cannot be served is found out elsewhere: its failure costs the serving process nothing."""

import json
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from structlog.testing import capture_logs

from service.bundle import content_digest, read_bundle
from service.engine import Engine, Tuning, pack
from service.errors import BundleError, NotNow
from service.host import resident_bytes
from service.models import loading
from service.models.engines import blank
from service.models.loading import Loader
from service.models.packed import clear
from service.models.proof import EngineOptions, Proof, prove
from service.scheduling.cost import Load
from service.scheduling.layouts import Layout
from service.scheduling.scheduler import Scheduler
from tests.processes import still_running, wait_until
from tests.service.conftest import resum
from tests.service.identity import publish_identity
from tests.service.models.hostile import publish_endless, publish_greedy, publish_wrong, trials

MIB = 1 << 20
MakeLoader = Callable[..., Loader]


@pytest.fixture
def make_loader() -> Iterator[MakeLoader]:
    """Makes loaders, and ends what they started."""
    made: list[Loader] = []

    def make(
        *, threads: int = 1, memory_bytes: int = 0, timeout_seconds: float = 300, packed: Path | None = None
    ) -> Loader:
        options = EngineOptions.of("cpu", threads=threads, max_batch=2, tuning=Tuning())
        scheduler = Scheduler(load := Load(), cores=options.cores)
        loader = Loader(
            scheduler,
            load,
            options,
            memory_bytes=memory_bytes,
            timeout_seconds=timeout_seconds,
            packed=packed,
        )
        made.append(loader)
        return loader

    yield make
    for loader in made:
        loader.close()
        loader.rest()


def test_a_version_that_was_proven_is_loaded_and_its_memory_is_known(make_loader: MakeLoader, tmp_path: Path) -> None:
    loader = make_loader()
    model = loader.load(publish_identity(tmp_path, work=8))
    assert model.queue.cost.sizes[0] == 1
    assert model.model_bytes > 8 * MIB, "eight matrices of a mebibyte"
    loader.rest()
    assert trials() == []


@pytest.mark.parametrize(("threads", "intra_op_threads"), [(1, 0), (2, 0), (2, 2)])
def test_a_proof_chooses_threads_and_batch_sizes(threads: int, intra_op_threads: int, tmp_path: Path) -> None:
    options = EngineOptions.of(
        "cpu",
        threads=threads,
        intra_op_threads=intra_op_threads,
        max_batch=4,
        tuning=Tuning(allow_spinning=False),
    )
    proof = prove(publish_identity(tmp_path, work=4), options, tmp_path)
    for layout in proof.layouts:
        assert layout.threads in ({intra_op_threads} if intra_op_threads else {1, threads})
        assert layout.lanes * layout.threads <= options.cores
        assert set(layout.sizes) <= {1, 2, 4}
        assert min(layout.sizes) == 1
    assert proof.peak_bytes >= proof.weights_bytes + proof.arena_bytes


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs: other processes do not change it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def test_sessions_of_one_model_share_its_packed_weights_also_after_the_files_are_gone(tmp_path: Path) -> None:
    bundle, scratch = read_bundle(publish_identity(tmp_path, work=64)), tmp_path / "scratch"
    scratch.mkdir()
    model, images = pack(bundle.model_path, scratch), blank(bundle, 1)
    expected = Engine(bundle.model_path).run(images)
    first = Engine(model, threads=1, packed=True)
    first.run(images)
    before = anonymous_bytes()
    second = Engine(model, threads=2, packed=True)
    for file in scratch.iterdir():
        file.unlink()
    for engine in (first, second):
        for output, wanted in zip(engine.run(images), expected, strict=True):
            np.testing.assert_allclose(output, wanted, atol=1e-5)
    assert anonymous_bytes() - before < 16 * MIB, "not another 64 MiB"


def test_without_room_for_packed_weights_one_layout_is_served_and_the_log_says_why(
    make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = publish_identity(tmp_path, work=4)
    options = EngineOptions.of("cpu", threads=2, max_batch=2, tuning=Tuning())
    proof = prove(folder, options, tmp_path / "missing")
    assert [(layout.threads, layout.lanes) for layout in proof.layouts] == [(2, 1)]
    assert "pack the model's weights" in proof.note

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with capture_logs() as logs:
        model = make_loader(threads=2).load(folder)
    assert [layout.threads for layout in model.queue.cost.layouts] == [2]
    assert any(line["event"] == "one layout only" and "set TMPDIR" in line["reason"] for line in logs)


def test_a_model_of_several_layouts_answers_the_same_in_each_and_leaves_no_file(
    make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # Whatever this machine measures.
    monkeypatch.setattr("service.models.prover.Prover.prove", _both_layouts)
    folder = publish_identity(tmp_path / "models", work=4)
    for _ in range(2):
        model = make_loader(threads=2).load(folder)
        one, other = (model.engines.run(blank(model.bundle, 1), threads) for threads in (1, 2))
        np.testing.assert_allclose(one[0], other[0], atol=1e-5)
        assert list(tmp_path.iterdir()) == [tmp_path / "models"]


def test_packed_weights_are_shared_by_their_content_and_removed_once_nobody_maps_them(
    make_loader: MakeLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.models.prover.Prover.prove", _both_layouts)
    packed = tmp_path / "packed"
    packed.mkdir()
    one, other = (publish_identity(tmp_path / "models", work=work) for work in (1, 2))
    images = np.random.default_rng(0).integers(0, 256, (2, 2, 2, 3), np.uint8)
    # As in processes of their own: each packs for itself, and what is the same is there once.
    models = [make_loader(threads=2, packed=packed).load(one) for _ in range(3)]
    (folder,) = packed.iterdir()
    assert str(folder) in Path("/proc/self/maps").read_text()
    different = make_loader(threads=2, packed=packed).load(other)
    assert len(list(packed.iterdir())) == 2
    answers = [model.engines.run(images, 2)[0] for model in models]
    assert all(np.array_equal(answer, answers[0]) for answer in answers)
    different.engines.close()
    clear(packed, [os.getpid()])
    assert list(packed.iterdir()) == [folder]
    for model in models:
        model.engines.close()
    clear(packed, [os.getpid()])
    assert list(packed.iterdir()) == []


def _both_layouts(
    _: object, folder: Path, scratch: Path | None, *, memory_bytes: int | None, known: Proof | None, background: bool
) -> Proof:
    assert scratch
    pack(folder / "model.onnx", scratch)
    layouts = tuple(Layout(threads=threads, lanes=2 // threads, seconds={1: 0.001}) for threads in (1, 2))
    digest = content_digest(folder)
    return Proof(digest=digest, layouts=layouts, weights_bytes=0, arena_bytes=0, peak_bytes=0)


def test_what_was_proven_once_is_loaded_again_without_another_process(make_loader: MakeLoader, tmp_path: Path) -> None:
    loader = make_loader()
    folder = publish_identity(tmp_path)
    loader.load(folder)
    loader.rest()
    loader.load(folder)
    assert trials() == []
    (folder / "labels.txt").write_text("".join(f"other {number}\n" for number in range(12)))
    resum(folder)
    loader.load(folder)
    assert len(trials()) == 1, "other files under the same version are proven anew"


def test_a_version_that_never_ends_is_given_up_after_the_time_limit(make_loader: MakeLoader, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"did not finish within 0\.5 s: raise load_timeout_seconds"):
        make_loader(timeout_seconds=0.5).load(publish_endless(tmp_path))
    assert trials() == []


def test_a_version_that_takes_more_memory_than_is_left_fails_within_its_limit(
    make_loader: MakeLoader, tmp_path: Path
) -> None:
    loader = make_loader(memory_bytes=resident_bytes() + 500 * MIB)
    with pytest.raises(NotNow, match=r"loading it takes more memory than the \d+ MiB that are left") as refused:
        loader.load(publish_greedy(tmp_path, mebibytes=4000))
    assert refused.value.needed_bytes > 550 * MIB, "not proven again for a few bytes more"


@pytest.mark.parametrize(("serving", "nicer"), [(False, 0), (True, 10)], ids=["before", "beside"])
def test_the_process_that_proves_a_version_is_the_first_to_go_and_beside_traffic_the_last_to_run(
    *, serving: bool, nicer: int, make_loader: MakeLoader, tmp_path: Path
) -> None:
    loader = make_loader()
    if serving:
        loader.rest()
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(loader.load, publish_endless(tmp_path))
        own = psutil.Process().nice()
        wait_until(lambda: bool(trials()) and trials()[0].nice() == min(19, own + nicer))
        (trial,) = trials()
        wait_until(lambda: Path(f"/proc/{trial.pid}/oom_score_adj").read_text().strip() == "1000")
        autogroup = Path(f"/proc/{trial.pid}/autogroup")
        if os.access("/proc/self/autogroup", os.W_OK):
            wait_until(lambda: autogroup.read_text().strip().endswith(f"nice {nicer}"))
        trial.send_signal(signal.SIGSEGV)
        with pytest.raises(BundleError, match="the process that loaded it ended with SIGSEGV"):
            loaded.result()
    assert trials() == []


def test_a_killed_process_is_reported_as_a_lack_of_memory(make_loader: MakeLoader, tmp_path: Path) -> None:
    """As the kernel does it when the container's limit is reached."""
    loader = make_loader()
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(loader.load, publish_endless(tmp_path))
        wait_until(lambda: bool(trials()))
        trials()[0].kill()
        with pytest.raises(NotNow, match=r"takes more memory.*killed by the system"):
            loaded.result()


def test_a_loader_that_is_closed_ends_what_it_is_loading(make_loader: MakeLoader, tmp_path: Path) -> None:
    loader = make_loader()
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(loader.load, publish_endless(tmp_path))
        wait_until(lambda: bool(trials()))
        loader.close()
        with pytest.raises(NotNow, match="shutting down"):
            loaded.result()
    with pytest.raises(NotNow, match="shutting down"):
        loader.load(publish_identity(tmp_path, "identity-b"))
    assert trials() == []


def test_golden_outputs_that_differ_are_the_reason(make_loader: MakeLoader, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"identity-a/1/golden\.npz: .* differ .* by 1 in a logit"):
        make_loader().load(publish_wrong(tmp_path))


def test_needs_that_the_manifest_declares_are_checked_before_anything_is_loaded(
    make_loader: MakeLoader, tmp_path: Path
) -> None:
    folder = publish_identity(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["memory"] = {"weights_bytes": 300 * MIB, "arena_bytes": 200 * MIB}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    resum(folder)
    loader = make_loader(memory_bytes=resident_bytes() + 400 * MIB)
    with pytest.raises(NotNow, match=r"needs 500 MiB of memory \(by its manifest\), but \d+ MiB are left") as refused:
        loader.load(folder)
    assert refused.value.needed_bytes == 500 * MIB
    assert trials() == []


def test_needs_that_no_manifest_declares_are_estimated_from_the_graph(make_loader: MakeLoader, tmp_path: Path) -> None:
    folder = publish_identity(tmp_path, work=20)
    with pytest.raises(NotNow, match=r"needs 2 MiB of memory \(estimated from its graph of 1 MiB\), but 0 MiB"):
        make_loader(memory_bytes=1).load(folder)
    assert trials() == []


def test_measured_needs_are_checked_before_the_service_loads_a_version(
    make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loader = make_loader()
    folder = publish_identity(tmp_path, work=20)
    loader.load(folder)
    monkeypatch.setattr(loading, "_MEMORY_PER_GRAPH_BYTE", 0)
    loader._memory_bytes = 1
    with pytest.raises(NotNow, match=r"needs \d+ MiB of memory \(measured\), but 0 MiB are left"):
        loader.load(folder)


def test_what_fails_in_the_serving_process_leaves_no_engine_open(
    make_loader: MakeLoader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed: list[str] = []
    close = Engine.close

    def record(engine: Engine) -> None:
        closed.append(threading.current_thread().name)
        close(engine)

    def differ(*_: object, **__: object) -> None:
        raise BundleError("outputs differ here")

    monkeypatch.setattr(Engine, "close", record)
    monkeypatch.setattr(loading, "verify_golden", differ)
    with pytest.raises(BundleError, match="outputs differ here"):
        make_loader().load(publish_identity(tmp_path))
    assert closed == ["engine-0"]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_300_failing_loads_leave_resident_memory_flat(make_loader: MakeLoader, tmp_path: Path) -> None:
    loader = make_loader()
    folder = publish_wrong(tmp_path, work=30)
    sizes: list[int] = []
    for _ in range(300):
        with pytest.raises(BundleError, match="differ"):
            loader.load(folder)
        sizes.append(resident_bytes())
    assert still_running([psutil.Process(), *trials()]) == [psutil.Process()]
    # One session of 30 MiB that was kept would show.
    assert max(sizes[100:]) - max(sizes[:50]) < 8 * MIB, sizes
