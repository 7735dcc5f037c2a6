"""What a recipe's switches do to one step."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from training.augment import Batch
from training.distributed import World
from training.models import NormalizedModel, StrideViT, architecture
from training.recipes import Recipe, load_recipe
from training.step import Diverged, Stepper

HERE = World(device=torch.device("cpu"))


def stepper(*overrides: str, variant: str = "csra-r2") -> Stepper:
    recipe: Recipe = load_recipe("digits", ["schedule.warmup_epochs=0", *overrides])
    model = StrideViT(architecture("vit-xs", variant, num_classes=10), drop_path_rate=recipe.drop_path)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.get_parameter("head.weight"), std=0.1)
    classifier = NormalizedModel(model, mean=(0.5,) * 3, std=(0.25,) * 3)
    return Stepper(classifier, recipe, HERE, num_classes=10, steps_per_epoch=10)


def batch(seed: int = 0, size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return images, torch.arange(size) % 10


def weights(step: Stepper) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in step.classifier.model.state_dict().items()}


def test_only_matrices_have_weight_decay() -> None:
    groups = stepper("optim.weight_decay=0.5").optimizer.param_groups
    assert {parameter.ndim > 1 for group in groups if group["weight_decay"] for parameter in group["params"]} == {True}
    assert {parameter.ndim for group in groups if not group["weight_decay"] for parameter in group["params"]} == {1}


@pytest.mark.parametrize("override", ["drop_path=0.3", "augment.mixup_alpha=0.4", "augment.cutmix_alpha=1"])
def test_random_numbers_of_a_step_depend_on_its_number(override: str) -> None:
    losses = []
    for number, disturb in ((3, 0), (3, 7), (4, 0)):
        step = stepper(override)
        step.classifier.train()
        torch.rand(disturb)
        losses.append(step(number, [batch()])[0])
    assert losses[0] == losses[1] != losses[2]


def test_mixup_mixes_images_and_labels_alike() -> None:
    step = stepper("augment.mixup_alpha=1.0")
    images, labels = batch()
    torch.manual_seed(1)
    mixed, targets = step.mixed(images, labels)
    weight = float(targets[0, 0])
    assert 0.01 < weight < 0.99
    torch.testing.assert_close(mixed[0], weight * images[0].float() + (1 - weight) * images[-1].float())
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))


def test_cutmix_pastes_a_box_whose_share_is_that_of_the_label() -> None:
    step = stepper("augment.cutmix_alpha=1.0")
    images, labels = batch()
    torch.manual_seed(1)
    mixed, targets = step.mixed(images, labels)
    pasted_HW = (mixed[0] == images[-1]).all(dim=-1)
    assert 0.01 < pasted_HW.float().mean() < 0.99
    assert torch.equal(mixed[0][~pasted_HW], images[0].float()[~pasted_HW])
    rows, columns = (pasted_HW.any(dim=side) for side in (1, 0))
    assert rows.sum() * columns.sum() == pasted_HW.sum()
    torch.testing.assert_close(targets[0, 7], pasted_HW.float().mean())


def test_with_both_each_step_mixes_in_one_of_the_two_ways() -> None:
    step = stepper("augment.mixup_alpha=1.0", "augment.cutmix_alpha=1.0")
    images, labels = batch()
    whole = []
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, _ = step.mixed(images, labels)
        whole.append(bool(((mixed == images) | (mixed == images.roll(1, 0))).all()))
    assert {True, False} == set(whole)


def test_moving_average_follows_the_decay() -> None:
    step = stepper("optim.ema_decay=0.75")
    before = weights(step)
    step(9, [batch()])  # the decay is warmed up: 0.79 would be allowed here
    after, averaged = weights(step), step.evaluated.model.state_dict()
    torch.testing.assert_close(averaged["head.weight"], 0.75 * before["head.weight"] + 0.25 * after["head.weight"])


def test_moving_average_is_warmed_up() -> None:
    step = stepper("optim.ema_decay=0.9998")
    for number in range(3):
        step(number, [batch(number)])
    after, averaged = weights(step), step.evaluated.model.state_dict()
    moved = (after["head.weight"] - stepper().classifier.model.get_parameter("head.weight")).abs().mean()
    assert (after["head.weight"] - averaged["head.weight"]).abs().mean() < 0.5 * moved


@pytest.mark.parametrize("after_warmup", [True, False])
def test_cosine_starts_after_or_with_the_warm_up(after_warmup: bool) -> None:
    step = stepper(
        "optim.lr=1",
        "schedule.epochs=10",
        "schedule.warmup_steps=40",
        "schedule.min_lr=0",
        f"schedule.cosine_after_warmup={str(after_warmup).lower()}",
    )
    rates = []
    for number in (20, 40, 70, 100):
        step.scheduler.step_update(number)
        rates.append(step.lr)
    assert rates[0] == 0.5
    assert rates[2] == pytest.approx(0.5 if after_warmup else 0.5 * (1 + math.cos(math.pi * 0.7)))
    assert rates[3] == 0
    assert (rates[1] == 1) == after_warmup


def test_gradients_are_clipped_to_the_norm() -> None:
    step = stepper("optim.clip_norm=1e-3")
    seen: list[float] = []

    def measure(*_: object) -> None:
        gradients = [p.grad.norm() for p in step.classifier.parameters() if p.grad is not None]
        seen.append(float(torch.stack(gradients).norm()))

    step.optimizer.register_step_pre_hook(measure)
    step(0, [batch()])
    assert seen[0] == pytest.approx(1e-3, rel=1e-3)


def test_diverging_step_changes_no_weight() -> None:
    step = stepper()
    with torch.no_grad():
        step.classifier.model.get_parameter("head.bias")[0] = float("inf")
    before = weights(step)
    with pytest.raises(Diverged, match="nan"):
        step(0, [batch()])
    after = weights(step)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("variant", ["mha", "lsra-r3", "csra-r2"])
def test_bf16_stays_near_float32(variant: str) -> None:
    exact, rounded = (stepper(f"precision={p}", variant=variant)(0, [batch()])[0] for p in ("fp32", "bf16"))
    assert exact != rounded
    assert exact == pytest.approx(rounded, rel=0.02)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_step_has_the_same_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # In this process: a pool of compilers would outlive the test.
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    plain, compiled = stepper(), stepper("compile=true")
    for number in range(2):
        expected = plain(number, [batch(number)])[0]
        assert compiled(number, [batch(number)])[0] == pytest.approx(expected, rel=1e-4)
