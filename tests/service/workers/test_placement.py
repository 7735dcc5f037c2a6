"""How many workers, and what each has."""

import pytest

from service.errors import StartupError
from service.workers.placement import Machine, Place, places


def machine(cores: int, *, quota: int | None = None, gpus: int = 0) -> Machine:
    return Machine(cores=tuple(range(cores)), quota=quota, gpus=gpus)


def placed(asked: str, on: Machine, *, device: str = "auto", threads: int = 0) -> list[Place]:
    return places(asked, on, device=device, threads=threads)


def test_auto_is_one_worker_for_every_four_cores() -> None:
    assert [len(placed("auto", machine(cores))) for cores in (1, 2, 4, 7, 8, 64)] == [1, 1, 1, 1, 2, 16]


def test_each_worker_has_neighbouring_cores_of_its_own_as_even_as_possible() -> None:
    assert [place.cores for place in placed("3", machine(8))] == [(0, 1, 2), (3, 4, 5), (6, 7)]
    assert [place.threads for place in placed("3", machine(8))] == [3, 3, 2]


def test_more_workers_than_cores_share_them() -> None:
    assert [place.cores for place in placed("3", machine(2))] == [(0,), (1,), (0,)]


@pytest.mark.parametrize(("quota", "threads"), [(4, 0), (None, 4)])
def test_within_a_quota_or_with_fewer_threads_no_worker_is_pinned(quota: int | None, threads: int) -> None:
    found = placed("2", machine(64, quota=quota), threads=threads)
    assert [(place.cores, place.threads) for place in found] == [((), 2), ((), 2)]


def test_each_gpu_has_a_worker_and_a_share_of_the_cores() -> None:
    found = placed("auto", machine(16, gpus=8))
    assert [place.device for place in found] == [f"cuda:{number}" for number in range(8)]
    assert found[7].cores == (14, 15)


def test_tensorrt_sees_one_gpu_in_each_worker() -> None:
    found = placed("2", machine(4, gpus=2), device="tensorrt")
    assert [(place.device, place.environment) for place in found] == [
        ("tensorrt", {"CUDA_VISIBLE_DEVICES": "0"}),
        ("tensorrt", {"CUDA_VISIBLE_DEVICES": "1"}),
    ]


def test_on_a_machine_with_gpus_the_cpu_can_be_asked_for() -> None:
    assert [place.device for place in placed("2", machine(4, gpus=8), device="cpu")] == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("asked", "on", "device", "names"),
    [
        ("9", machine(64, gpus=8), "auto", "--workers 9: there are 8 GPUs, .* use --workers 8 or auto"),
        ("2", machine(64, gpus=1), "cuda", "--workers 2: there is 1 GPU, .* use --workers 1 or auto"),
        ("2", machine(64, gpus=8), "cuda:3", "--device cuda:3 names one GPU, .* use --device cuda"),
        ("2", machine(64), "cuda", "no GPU is found here: use --device cpu"),
    ],
)
def test_what_cannot_be_is_an_error_that_names_what_can(asked: str, on: Machine, device: str, names: str) -> None:
    with pytest.raises(StartupError, match=names):
        placed(asked, on, device=device)
