"""`gs://` through fsspec's interface: its memory file system in the place of Google's service, which was not asked."""

import fsspec
import pytest
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.memory import MemoryFileSystem

from tests.service.remote.conftest import World, bundle_files, contents

_FILES = MemoryFileSystem()


class _Google(AsyncFileSystemWrapper):  # type: ignore[misc]
    def __init__(self, **options: object) -> None:
        super().__init__(fs=_FILES, **options)


def test_bundles_are_copied(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec, "get_filesystem_class", {"gs": _Google}.__getitem__)
    for file, data in bundle_files().items():
        _FILES.pipe_file(f"/bucket/models/a/1/{file}", data)
    mirror = world.mirror("gs://bucket/models")
    assert mirror.update() == {}
    assert contents(mirror.folder) == {"a/1": bundle_files()}
