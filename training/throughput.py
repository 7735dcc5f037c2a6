"""Where the time of a training step goes: images/s, the share of the data, and the costliest operators."""

import statistics
import time
from dataclasses import dataclass

import numpy as np
from torch.profiler import ProfilerActivity, profile

from training.augment import InMemoryEpoch
from training.data import Split
from training.distributed import World
from training.models import NormalizedModel, StrideViT, architecture
from training.recipes import Recipe
from training.step import Stepper

WARMUP_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Of one recipe and variant on random images. `operators` are (name, share of the step's time, calls a step)."""

    images_per_s: float
    slowest: float
    fastest: float
    """Images/s of the slowest and fastest tenth of the steps."""
    data_share: float
    """Share of the time that goes into order and augmentation."""
    operators: list[tuple[str, float, float]]


def measure(recipe: Recipe, variant: str, *, world: World, steps: int) -> Throughput:
    """Take `steps` steps after a warm-up, then some more under torch's profiler."""
    spec = architecture(recipe.preset, variant, img_size=recipe.img_size)
    model = StrideViT(spec, seed=recipe.seed, drop_path_rate=recipe.drop_path)
    classifier = NormalizedModel(model, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)).to(world.device)
    stepper = Stepper(classifier, recipe, world, num_classes=100, steps_per_epoch=steps)
    parts = recipe.schedule.accumulate
    size = recipe.schedule.batch_size // parts
    draw = np.random.default_rng(recipe.seed)
    images = draw.integers(0, 256, (2 * size, *spec.image_shape, 3), dtype=np.uint8)
    epoch = InMemoryEpoch(Split(images=images, labels=np.arange(2 * size) % 100), recipe.augment, seed=0, epoch=0)

    def step(number: int) -> tuple[float, float]:
        """Seconds of the data and of all."""
        started = time.perf_counter()
        batches = [epoch.batch(draw.integers(0, 2 * size, size)) for _ in range(parts)]
        ready = time.perf_counter()
        stepper(number, batches)
        return ready - started, time.perf_counter() - started

    classifier.train()
    for number in range(WARMUP_STEPS):
        step(number)
    data, whole = zip(*(step(number) for number in range(steps)), strict=True)
    rates = sorted(parts * size / seconds for seconds in whole)
    tenth = max(1, len(rates) // 10)
    profiled = 3
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if world.device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        for number in range(profiled):
            step(number)
    on_gpu = world.device.type == "cuda"
    operators = [
        (event.key, event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count / profiled)
        for event in profiler.key_averages()
    ]
    total = sum(microseconds for _, microseconds, _ in operators)
    return Throughput(
        images_per_s=statistics.median(rates),
        slowest=statistics.mean(rates[:tenth]),
        fastest=statistics.mean(rates[-tenth:]),
        data_share=sum(data) / sum(whole),
        operators=sorted(
            ((name, microseconds / total, calls) for name, microseconds, calls in operators), key=lambda row: -row[1]
        ),
    )
