"""What workers take of the memory, and how many of them fit."""

import os
from pathlib import Path

import pytest

from service.errors import StartupError
from service.workers.memory import Taken, described, require_room, taken_by
from service.workers.pause import Pause

MIB = 1 << 20
ONE = Taken(resident=100 * MIB, proportional=60 * MIB, shareable=40 * MIB)
SMAPS = """\
55d0-55d1 r-xp 00000000 fe:00 123 /usr/lib/libpython3.11.so
Rss:                 100 kB
Pss:                  50 kB
Shared_Clean:         60 kB
Private_Clean:        30 kB
Private_Dirty:        10 kB
55d2-55d3 rw-p 00000000 00:00 0 [heap]
Rss:                 200 kB
Pss:                 200 kB
Private_Clean:         0 kB
Private_Dirty:       200 kB
55d4-55d5 r--s 00000000 fe:00 124 /tmp/weights.bin (deleted)
Rss:                 400 kB
Pss:                 400 kB
Private_Clean:       400 kB
VmFlags: rd mr
"""


def test_pages_of_files_are_shared_and_those_of_removed_ones_are_not(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "smaps").write_text(SMAPS)
    assert taken_by(7, proc=tmp_path) == Taken(resident=700 << 10, proportional=650 << 10, shareable=90 << 10)
    assert taken_by(8, proc=tmp_path) is None


def test_this_process_takes_memory_of_its_own() -> None:
    taken = taken_by(os.getpid())
    assert taken is not None
    assert 0 < taken.shareable < taken.resident


def test_the_first_worker_counts_the_shared_part_for_all() -> None:
    assert ONE.own == 60 * MIB
    assert described(3, ONE) == {"workers": 3, "of_each_mib": 60, "shared_mib": 40, "together_mib": 220}
    require_room(3, ONE, 120 * MIB)
    require_room(1, ONE, 0)
    require_room(1000, ONE, None)


def test_too_many_workers_are_refused_with_the_largest_number_that_fits() -> None:
    with pytest.raises(StartupError, match=r"--workers 9: each worker takes 60 MiB .* 250 MiB are left .*--workers 5"):
        require_room(9, ONE, 250 * MIB)
    require_room(5, ONE, 250 * MIB)


def test_pauses_double_up_to_half_a_minute_and_begin_anew_after_a_stable_minute() -> None:
    pause = Pause()
    assert [pause.after(1.0) for _ in range(9)] == [0.25, 0.5, 1, 2, 4, 8, 16, 30, 30]
    assert [pause.after(60.0), pause.after(1.0)] == [0.25, 0.5]
