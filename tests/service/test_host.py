"""Facts about the machine: they come from the files that the system offers, and are plain where it offers none."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from service import host
from tests.processes import ROOT

CPUINFO = """\
processor\t: 0
model name\t: Example 9000 @ 2.00GHz
flags\t\t: fpu sse4_1 avx avx2 fma rdrand
"""


@pytest.mark.parametrize(
    ("text", "expected"), [("max 100000", 4), ("150000 100000", 1), ("50000 100000", 1), ("300000 100000", 3)]
)
def test_cores_follow_the_container_s_quota(
    text: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text(text)
    monkeypatch.setattr(host, "_CGROUP_V2", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert host.available_cores() == expected


def test_the_cpu_is_named_with_its_vector_extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_CPUINFO", tmp_path / "cpuinfo")
    assert host.cpu_features() == host.cpu_model() != ""
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    assert host.cpu_model() == "Example 9000 @ 2.00GHz"
    assert host.cpu_features() == "Example 9000 @ 2.00GHz (sse4_1 avx avx2 fma)"


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("flags : fma avx2", True),
        ("flags : fma avx2 avx_vnni", False),
        ("flags : avx512f avx512_vnni", False),
        ("Features : asimd i8mm", False),
    ],
)
def test_bytes_saturate_on_x86_without_vnni(
    listed: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_CPUINFO", tmp_path / "cpuinfo")
    assert not host.bytes_saturate(), "nothing is known"
    (tmp_path / "cpuinfo").write_text(listed)
    assert host.bytes_saturate() is expected


def test_the_peak_stays_when_memory_is_freed_until_it_is_reset() -> None:
    before = host.peak_bytes()
    held = np.ones(64_000_000, dtype=np.uint8)
    assert host.resident_bytes() > held.nbytes
    del held
    peak = host.peak_bytes()
    assert peak >= before
    host.reset_peak()
    assert host.peak_bytes() < peak


def test_memory_of_a_process_tree_includes_its_children() -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(0, flush=True); input()'])"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe, cwd=ROOT) as process:
        assert process.stdout
        process.stdout.readline()
        parent, child = host.process_tree(process.pid)
        assert host.process_tree_bytes(process.pid) > host.process_tree_bytes(child.pid) > 0
        process.communicate(b"\n")
    assert parent.pid == process.pid
    assert host.process_tree(process.pid) == []
    assert host.process_tree_bytes(process.pid) == 0


def test_proportional_memory_of_this_process_is_at_most_what_is_resident() -> None:
    pss = host.pss_bytes()
    assert pss is not None
    assert 0 < pss <= host.resident_bytes() * 1.01


@pytest.mark.parametrize(
    ("line", "folder", "limit", "used", "cache"),
    [
        ("0::/pod/box", "pod/box", "memory.max", "memory.current", "inactive_file"),
        (
            "4:memory:/pod/box",
            "memory/pod/box",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
        # As in a container whose path is the host's.
        ("0::/not/here", "", "memory.max", "memory.current", "inactive_file"),
    ],
)
def test_memory_that_is_left_follows_the_container_s_limit(
    line: str, folder: str, limit: str, used: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, process, machine = tmp_path / "cgroup", tmp_path / "self", tmp_path / "meminfo"
    (groups / folder).mkdir(parents=True)
    process.mkdir()
    (process / "cgroup").write_text(f"7:pids:/\n{line}\n")
    monkeypatch.setattr(host, "_CGROUPS", groups)
    monkeypatch.setattr(host, "_PROCESS", process)
    monkeypatch.setattr(host, "_MEMINFO", machine)
    assert host.memory_left_bytes() is None
    machine.write_text("MemFree: 1 kB\nMemAvailable:    5000 kB\n")
    assert host.memory_left_bytes() == 5000 * 1024
    (groups / folder / limit).write_text("max\n")
    (groups / folder / used).write_text("3000000\n")
    (groups / folder / "memory.stat").write_text(f"anon 7\n{cache} 500000\n")
    assert host.memory_left_bytes() == 5000 * 1024
    (groups / folder / limit).write_text("4000000\n")
    assert host.memory_left_bytes() == 1_500_000, "page cache is given up when memory is needed"
    (groups / folder / used).write_text("9000000\n")
    assert host.memory_left_bytes() == 0


def test_memory_that_is_left_follows_the_limits_of_the_process() -> None:
    code = (
        "import resource; from service import host;"
        "limit = host.data_bytes() + (1 << 28); resource.setrlimit(resource.RLIMIT_DATA, (limit, limit));"
        "left = host.memory_left_bytes(); assert 0 < left <= 1 << 28, left"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_nothing_is_reported_where_the_system_reports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_PROCESS", tmp_path / "nowhere")
    assert (host.resident_bytes(), host.peak_bytes(), host.pss_bytes()) == (0, 0, None)
    with pytest.raises(OSError, match="nowhere"):
        host.reset_peak()


def test_the_commit_is_that_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.git_commit().split(" and changes ")[0] == host.git("rev-parse", "--short=12", "HEAD")
    monkeypatch.setattr(host, "git", lambda *_: (_ for _ in ()).throw(OSError("no git")))
    assert host.git_commit() == "unknown"
