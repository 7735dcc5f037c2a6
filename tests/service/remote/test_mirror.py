"""A bucket as a local folder: new versions in, removed ones out, wrong ones never."""

import threading
from collections.abc import Iterable

import pytest

from service.bundle import MAX_FILE_BYTES
from service.errors import NotReady, RepositoryError
from service.remote import mirror as mirror_module
from tests.processes import PATIENCE_SECONDS
from tests.service.remote.conftest import SECRET, Bucket, FaultyServer, World, bundle_files, contents, put_bundle


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "_READ_PAUSE_SECONDS", 0)


def test_bundles_are_copied_and_an_unchanged_bucket_costs_one_listing(bucket: Bucket, world: World) -> None:
    put_bundle(bucket, "a/1")
    put_bundle(bucket, "b/3")
    bucket.put("a/1/.DS_Store", b"x")
    bucket.put("a/1/../../../escaped", b"x")
    bucket.put("../a/2/model.onnx", b"x")
    bucket.put("README.md", b"x")
    mirror = world.mirror(bucket.url)
    assert mirror.update() == {}
    assert contents(mirror.folder) == {"a/1": bundle_files(), "b/3": bundle_files()}
    assert len([path for path in bucket.asked if path.endswith("model.onnx")]) == 1, "equal files are read once"
    bucket.asked.clear()
    assert mirror.update() == {}
    assert bucket.asked == ["list"]


def test_another_process_finds_the_files_in_the_cache(bucket: Bucket, world: World) -> None:
    put_bundle(bucket, "a/1")
    world.mirror(bucket.url).update()
    bucket.asked.clear()
    other = world.mirror(bucket.url)
    assert other.update() == {}
    assert bucket.asked == ["list", "a/1/SHA256SUMS"]


def test_two_processes_at_once_read_each_bundle_once(bucket: Bucket, world: World) -> None:
    for number in range(4):
        put_bundle(bucket, f"m{number}/1", str(number).encode())
    mirrors = [world.mirror(bucket.url) for _ in range(2)]
    threads = [threading.Thread(target=mirror.update) for mirror in mirrors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([path for path in bucket.asked if path.endswith("model.onnx")]) == 4
    assert sorted(contents(mirrors[0].folder)) == ["m0/1", "m1/1", "m2/1", "m3/1"]


def test_new_versions_come_and_removed_ones_go(bucket: Bucket, world: World) -> None:
    put_bundle(bucket, "a/1", b"1")
    put_bundle(bucket, "b/1", b"b")
    mirror = world.mirror(bucket.url)
    mirror.update()
    put_bundle(bucket, "a/2", b"2")
    mirror.update({("a", 1)})
    assert sorted(contents(mirror.folder)) == ["a/1", "a/2", "b/1"]
    bucket.delete("b/")
    put_bundle(bucket, "a/3", b"3")
    mirror.update({("a", 1)})
    assert sorted(contents(mirror.folder)) == ["a/1", "a/2", "a/3"], "one that serves stays"
    mirror.update({("a", 3)})
    assert sorted(contents(mirror.folder)) == ["a/2", "a/3"], "the newest, and one to fall back on"
    blobs = {path.name for path in (mirror.folder.parent / "blobs").iterdir()}
    assert len(blobs) == 8, "files of removed versions are removed"


def test_a_version_on_trial_is_copied_and_stays_however_old_it_is(bucket: Bucket, world: World) -> None:
    for version in range(1, 6):
        put_bundle(bucket, f"a/{version}", b"%d" % version)
    mirror = world.mirror(bucket.url, on_trial=(("a", 2), ("a", 9)))
    assert mirror.update() == {}
    assert sorted(contents(mirror.folder)) == ["a/2", "a/4", "a/5"]
    put_bundle(bucket, "a/6", b"6")
    mirror.update()
    assert sorted(contents(mirror.folder)) == ["a/2", "a/5", "a/6"]


def test_only_the_models_that_are_served_are_copied(bucket: Bucket, world: World) -> None:
    put_bundle(bucket, "a/1", b"a")
    put_bundle(bucket, "b/1", b"b")
    world.mirror(bucket.url, names=("b",)).update()
    mirror = world.mirror(bucket.url, names=("a",))
    mirror.update()
    assert sorted(contents(mirror.folder)) == ["a/1", "b/1"], "what another process copied stays"


def test_a_wrong_digest_names_the_file_and_leaves_the_old_version(bucket: Bucket, world: World) -> None:
    put_bundle(bucket, "a/1", b"1")
    mirror = world.mirror(bucket.url)
    mirror.update()
    before = contents(mirror.folder)
    put_bundle(bucket, "a/2", b"2")
    bucket.put("a/2/labels.txt", b"wrong")
    missing = mirror.update({("a", 1)})
    assert list(missing) == [("a", 2)]
    assert "a/2/labels.txt: sha256 is" in missing["a", 2]
    assert contents(mirror.folder) == before
    bucket.asked.clear()
    assert mirror.update({("a", 1)}) == missing
    assert bucket.asked == ["list"], "it is not read again before a pause"
    bucket.put("a/2/labels.txt", bundle_files(b"2")["labels.txt"])
    assert mirror.update({("a", 1)}) == {}, "something new is read at once"
    assert sorted(contents(mirror.folder)) == ["a/1", "a/2"]


def test_a_version_removed_for_a_wrong_one_goes_on_serving(bucket: Bucket, world: World) -> None:
    put_bundle(bucket, "a/1", b"1")
    put_bundle(bucket, "b/1", b"b")
    mirror = world.mirror(bucket.url)
    mirror.update()
    bucket.delete("a/1/")
    put_bundle(bucket, "a/2", b"2")
    bucket.put("a/2/model.onnx", b"wrong")
    assert list(mirror.update({("a", 1)})) == [("a", 2)]
    assert sorted(contents(mirror.folder)) == ["a/1", "b/1"]


def test_a_version_whose_content_changes_is_exchanged_only_for_a_right_one(bucket: Bucket, world: World) -> None:
    put_bundle(bucket, "a/1", b"old")
    mirror = world.mirror(bucket.url)
    mirror.update()
    bucket.put("a/1/model.onnx", b"new")
    assert "a/1/model.onnx: sha256" not in str(mirror.update()), "by its digests the copy is what is listed"
    assert contents(mirror.folder)["a/1"] == bundle_files(b"old")
    put_bundle(bucket, "a/1", b"new")
    bucket.put("a/1/golden.npz", b"wrong")
    assert "a/1/golden.npz: sha256 is" in mirror.update()["a", 1]
    assert contents(mirror.folder)["a/1"] == bundle_files(b"old")
    put_bundle(bucket, "a/1", b"new")
    assert mirror.update() == {}
    assert contents(mirror.folder)["a/1"] == bundle_files(b"new")


def test_a_half_uploaded_version_is_taken_once_it_is_whole(bucket: Bucket, world: World) -> None:
    put_bundle(bucket, "a/1", b"1")
    files = bundle_files(b"2")
    for file in ("SHA256SUMS", "golden.npz", "labels.txt"):
        bucket.put(f"a/2/{file}", files[file])
    mirror = world.mirror(bucket.url)
    assert mirror.update() == {("a", 2): "a/2/manifest.json: missing"}
    for file in ("manifest.json", "model.onnx"):
        bucket.put(f"a/2/{file}", files[file])
    assert mirror.update() == {}


def test_a_file_that_is_cut_short_is_read_again_and_then_named(bucket: Bucket, world: World) -> None:
    put_bundle(bucket, "a/1")
    put_bundle(bucket, "b/1", b"b")
    cuts = iter([True, False])
    bucket.faults["a/1/model.onnx"] = lambda content: [content[:5]] if next(cuts, False) else [content]
    bucket.faults["b/1/model.onnx"] = lambda content: [content[:5]]
    mirror = world.mirror(bucket.url)
    missing = mirror.update()
    assert list(missing) == [("b", 1)]
    assert missing["b", 1].startswith("b/1/model.onnx: ")
    assert sorted(contents(mirror.folder)) == ["a/1"]
    bucket.faults.clear()
    world.clock.now += 3600
    assert mirror.update() == {}


@pytest.mark.slow
def test_a_file_that_comes_too_slowly_is_given_up(
    bucket: Bucket, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "_READS", 1)
    put_bundle(bucket, "a/1")
    put_bundle(bucket, "b/1", b"b")
    gone_on = threading.Event()

    def trickle(content: bytes) -> Iterable[bytes]:
        yield content[:1]
        gone_on.wait(120)
        yield content[1:]

    bucket.faults["b/1/model.onnx"] = trickle
    mirror = world.mirror(bucket.url, timeout=20)
    try:
        missing = mirror.update()
    finally:
        gone_on.set()
    assert "took longer than 20 s (repository_timeout_seconds)" in missing["b", 1]
    assert sorted(contents(mirror.folder)) == ["a/1"]


def test_an_object_that_may_not_be_read_concerns_its_version_alone(bucket: Bucket, world: World) -> None:
    put_bundle(bucket, "a/1")
    put_bundle(bucket, "b/1", b"b")
    bucket.faults["b/1/labels.txt"] = lambda _: None
    mirror = world.mirror(bucket.url)
    (reason,) = mirror.update().values()
    assert reason.startswith("b/1/labels.txt: ")
    assert "access denied: set AWS_ACCESS_KEY_ID" in reason
    assert sorted(contents(mirror.folder)) == ["a/1"]


def test_an_object_that_changes_between_listing_and_read_is_refused(bucket: Bucket, world: World) -> None:
    put_bundle(bucket, "a/1", b"old")

    def change(sums: bytes) -> list[bytes]:
        bucket.put("a/1/model.onnx", bundle_files(b"new")["model.onnx"])
        return [sums]

    bucket.faults["a/1/SHA256SUMS"] = change
    mirror = world.mirror(bucket.url)
    assert "a/1/model.onnx: sha256 is" in mirror.update()["a", 1]
    assert contents(mirror.folder) == {}


@pytest.mark.parametrize("names", [["x"], []])
def test_sums_that_are_none_are_refused(names: list[str], bucket: Bucket, world: World) -> None:
    put_bundle(bucket, "a/1")
    bucket.put("a/1/SHA256SUMS", b"".join(f"{'0' * 64}  ../../{name}\n".encode() for name in names))
    mirror = world.mirror(bucket.url)
    assert "a/1/SHA256SUMS" in mirror.update()["a", 1]
    assert contents(mirror.folder) == {}


def test_files_and_cache_have_a_largest_size(bucket: Bucket, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    put_bundle(bucket, "a/1", b"x" * 1000)
    put_bundle(bucket, "a/2", b"x" * 5000)
    mirror = world.mirror(bucket.url, max_bytes=10_000)
    (reason,) = mirror.update().values()
    assert reason.startswith("a/2: ")
    assert "repository_cache_bytes leaves" in reason
    monkeypatch.setitem(MAX_FILE_BYTES, "labels.txt", 100)
    assert "labels.txt: 1014 bytes, more than 100" in world.mirror(bucket.url).update()["a", 1]


def test_a_damaged_copy_is_fetched_again(bucket: Bucket, world: World) -> None:
    put_bundle(bucket, "a/1")
    mirror = world.mirror(bucket.url)
    mirror.update()
    path = mirror.folder / "a" / "1" / "model.onnx"
    path.chmod(0o600)
    path.write_bytes(b"bit rot")
    other = world.mirror(bucket.url)
    assert other.update() == {}
    assert contents(other.folder) == {"a/1": bundle_files()}


def test_what_a_killed_process_left_is_removed(bucket: Bucket, world: World) -> None:
    put_bundle(bucket, "a/1")
    mirror = world.mirror(bucket.url)
    partial = mirror.folder.parent / "partial"
    (partial / "tmpabc").write_bytes(b"half")
    (partial / "staging").mkdir()
    (partial / "staging" / "model.onnx").write_bytes(b"half")
    mirror.update()
    assert world.leftovers() == []


def test_without_hard_links_files_are_copied(bucket: Bucket, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr("os.link", refused)
    put_bundle(bucket, "a/1")
    mirror = world.mirror(bucket.url)
    assert mirror.update() == {}
    assert contents(mirror.folder) == {"a/1": bundle_files()}


def test_closing_ends_a_download_and_leaves_nothing(bucket: Bucket, world: World) -> None:
    put_bundle(bucket, "a/1")
    reading, gone_on = threading.Event(), threading.Event()

    def hang(content: bytes) -> Iterable[bytes]:
        reading.set()
        gone_on.wait(PATIENCE_SECONDS)
        return [content]

    bucket.faults["model.onnx"] = hang
    mirror, ended = world.mirror(bucket.url, timeout=PATIENCE_SECONDS), []

    def update() -> None:
        with pytest.raises(NotReady, match="shutting down"):
            mirror.update()
        ended.append(True)

    thread = threading.Thread(target=update)
    thread.start()
    try:
        assert reading.wait(PATIENCE_SECONDS)
        mirror.close()
        thread.join(PATIENCE_SECONDS)
    finally:
        gone_on.set()
    assert ended == [True]
    assert contents(mirror.folder) == {}
    with pytest.raises(NotReady):
        mirror.update()


def test_a_server_that_is_down_is_asked_again_after_pauses_that_double(
    bucket: Bucket, server: FaultyServer, world: World
) -> None:
    put_bundle(bucket, "a/1")
    mirror = world.mirror(bucket.url, timeout=60)
    mirror.update()
    server.down = True
    with pytest.raises(RepositoryError, match="cannot be reached"):
        mirror.update()
    server.down = False
    with pytest.raises(RepositoryError, match="cannot be reached"):
        mirror.update()
    world.clock.now += 6
    assert mirror.update() == {}
    server.down = True
    with pytest.raises(RepositoryError):
        mirror.update()
    server.down = False
    assert mirror.update(force=True) == {}, "someone asks for it"
    assert contents(mirror.folder) == {"a/1": bundle_files()}


def test_a_bucket_that_is_emptied_takes_nothing_away(bucket: Bucket, world: World) -> None:
    put_bundle(bucket, "a/1")
    mirror = world.mirror(bucket.url)
    mirror.update()
    bucket.delete("")
    with pytest.raises(RepositoryError, match="is empty"):
        mirror.update()
    assert sorted(contents(mirror.folder)) == ["a/1"]


def test_what_is_wrong_with_the_address_is_one_line(
    bucket: Bucket, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reason(url: str) -> str:
        with pytest.raises(RepositoryError) as caught:
            world.mirror(url).update()
        assert "\n" not in str(caught.value)
        assert SECRET not in str(caught.value)
        return str(caught.value)

    assert "is empty: name the folder above <name>/<version>/" in reason(bucket.url)
    bucket.put("some/key.txt", b"x")
    assert "holds 1 objects, but no bundle" in reason(bucket.url)
    assert "there is no s3://no-such-bucket/models: create the bucket" in reason("s3://no-such-bucket/models")
    bucket.faults["list"] = lambda _: None
    assert "access denied: set AWS_ACCESS_KEY_ID" in reason(bucket.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    assert "no credentials: set AWS_ACCESS_KEY_ID" in reason(bucket.url)
