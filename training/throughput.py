"""Where the time of a training step goes: images/s, the share of the data, and the most expensive operators."""

import statistics
import time
from dataclasses import dataclass

import numpy as np
from rich.markup import escape
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from training.augment import InMemoryEpoch
from training.data import Split
from training.distributed import World
from training.models import NormalizedModel, StrideViT, architecture
from training.recipes import Recipe
from training.step import Stepper

WARMUP_STEPS, PROFILED_STEPS = 3, 3


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Speed of training by one recipe and variant on random images."""

    images_per_s: float
    slowest: float
    fastest: float
    """Images/s of the slowest and fastest tenth of the steps."""
    data_share: float
    """Share of the time that order and augmentation take."""
    operators: list[tuple[str, float, float]]
    """(name, share of the step's time, calls per step), most expensive first."""

    def operator_table(self, count: int) -> Table:
        """The `count` most expensive operators."""
        table = Table("operator", "share", "calls per step")
        for name, share, calls in self.operators[:count]:
            table.add_row(escape(name), f"{share:.1%}", f"{calls:.0f}")
        return table


def measure(recipe: Recipe, variant: str, *, world: World, steps: int) -> Throughput:
    """Time `steps` steps after a warm-up, then run some more under torch's profiler."""
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
        """Seconds for the data, and in total."""
        started = time.perf_counter()
        batches = [epoch.batch(draw.integers(0, 2 * size, size)) for _ in range(parts)]
        ready = time.perf_counter()
        stepper(number, batches)
        return ready - started, time.perf_counter() - started

    classifier.train()
    for number in range(WARMUP_STEPS):
        step(number)
    data, total = zip(*(step(number) for number in range(steps)), strict=True)
    rates = sorted(parts * size / seconds for seconds in total)
    tenth = max(1, len(rates) // 10)
    on_gpu = world.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])) as profiler:
        for number in range(PROFILED_STEPS):
            step(number)
    spent = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in profiler.key_averages()
    }
    all_time = sum(microseconds for microseconds, _ in spent.values())
    operators = [(name, own / all_time, calls / PROFILED_STEPS) for name, (own, calls) in spent.items()]
    return Throughput(
        images_per_s=statistics.median(rates),
        slowest=statistics.mean(rates[:tenth]),
        fastest=statistics.mean(rates[-tenth:]),
        data_share=sum(data) / sum(total),
        operators=sorted(operators, key=lambda operator: -operator[1]),
    )
