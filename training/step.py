"""One optimiser step: forward, backward, clipping, update, moving average."""

import math
import os
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from timm.layers import Attention
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2 import CutMix, MixUp

from training import seeding
from training.attention import CompressedAttention
from training.augment import Batch
from training.distill import Teacher, outputs
from training.distributed import World
from training.models import NormalizedModel
from training.recipes import Recipe

_AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Diverged(Exception):
    """The loss or the gradient is not finite; no weight was changed by this step."""


class Stepper:
    """The optimiser, and everything else besides the weights that a step changes."""

    def __init__(
        self,
        classifier: NormalizedModel,
        recipe: Recipe,
        world: World,
        *,
        num_classes: int,
        steps_per_epoch: int,
        teacher: Teacher | None = None,
    ) -> None:
        if recipe.precision == "fp16" and world.device.type == "cpu":
            raise ValueError("precision fp16 needs a GPU: use --set precision=bf16 on a CPU")
        if recipe.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        if world.device.type == "cpu":
            use_plain_attention(classifier)
        if teacher:
            teacher.classifier.to(world.device)
        self.recipe, self.world, self.classifier, self.teacher = recipe, world, classifier, teacher
        self.optimizer = create_optimizer_v2(
            classifier.model, opt="adamw", lr=recipe.optim.lr, weight_decay=recipe.optim.weight_decay, fused=True
        )
        schedule = recipe.schedule
        total = total_steps(schedule.epochs, steps_per_epoch)
        warmup = schedule.warmup_steps
        if warmup is None:
            warmup = round(schedule.warmup_epochs * steps_per_epoch)
        if total and warmup > total:
            raise ValueError(
                f"a warm-up of {warmup} steps never ends in {total}: --set schedule.warmup_steps={total // 10}"
            )
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=max(2, total - warmup if schedule.cosine_after_warmup else total),
            warmup_t=min(warmup, total),
            warmup_prefix=schedule.cosine_after_warmup,
            warmup_lr_init=schedule.min_lr,
            lr_min=schedule.min_lr,
            t_in_epochs=False,
        )
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.precision == "fp16")
        decay = recipe.optim.ema_decay
        self.average = ModelEmaV3(classifier, decay=decay, use_warmup=True) if decay else None
        augment = recipe.augment
        mixers: dict[type[MixUp | CutMix], float] = {MixUp: augment.mixup_alpha, CutMix: augment.cutmix_alpha}
        self.mixers = [mix(alpha=alpha, num_classes=num_classes) for mix, alpha in mixers.items() if alpha]
        self.distributed: DistributedDataParallel | None = None
        forward: nn.Module = classifier
        if world.size > 1:
            devices = [world.device.index] if world.device.type == "cuda" else None
            forward = self.distributed = DistributedDataParallel(
                classifier, device_ids=devices, broadcast_buffers=False
            )
        if recipe.compile:
            # Graphs of earlier models count towards a limit beyond which torch silently stops compiling.
            torch.compiler.reset()
        self.forward = torch.compile(forward) if recipe.compile else forward

    @property
    def evaluated(self) -> NormalizedModel:
        """The classifier to evaluate and to ship: the moving average, if there is one."""
        if self.average is None:
            return self.classifier
        averaged: NormalizedModel = self.average.module
        return averaged

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def __call__(self, step: int, micro_batches: Iterable[Batch], *, stop: bool = False) -> tuple[float, bool]:
        """Take step number `step` (from 0). Returns its mean loss, and whether any process wants to stop.

        Raises Diverged before a weight is changed.
        """
        self.scheduler.step_update(step)
        parts = self.recipe.schedule.accumulate
        total = torch.zeros((), device=self.world.device)
        for part, batch in enumerate(micro_batches, start=1):
            wait = self.distributed.no_sync() if self.distributed and part < parts else nullcontext()
            with wait:
                loss = self._loss(batch, step, part) / parts
                torch.autograd.backward(self.scaler.scale(loss))
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.classifier.parameters(), self.recipe.optim.clip_norm)
        summed, wants_stop = self.world.sum(torch.stack([total, torch.full_like(total, stop)])).tolist()
        mean_loss = summed / self.world.size
        finite = math.isfinite(norm.item())
        # The scaler provokes infinite gradients to find its scale, and skips such a step by itself; a scale below one
        # means that the gradients themselves are at fault.
        searching = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        if not math.isfinite(mean_loss) or not (finite or searching):
            self.optimizer.zero_grad()
            raise Diverged(f"loss is {mean_loss}, gradient norm {norm.item()}")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average and finite:
            self.average.update(self.classifier, step=step)
        return mean_loss, wants_stop > 0

    def _loss(self, batch: Batch, step: int, part: int) -> torch.Tensor:
        """Mean loss of a micro-batch. Mixing and drop-path draw from torch's global generator, seeded by the step."""
        key = self.recipe.seed, step
        images = batch[0].to(self.world.device, non_blocking=True)
        targets = batch[1].to(self.world.device, non_blocking=True)
        if self.mixers:
            torch.manual_seed(seeding.step_seed(*key))  # one weight for all micro-batches of all processes
            images, targets = self.mixed(images, targets)
        torch.manual_seed(seeding.step_seed(*key, part, self.world.rank))
        precision = self.recipe.precision
        with torch.autocast(self.world.device.type, dtype=_AUTOCAST[precision], enabled=precision != "fp32"):
            made = outputs(self.forward, images, blocks=self.recipe.distill.blocks > 0)
            taught = self.teacher(images) if self.teacher else None
        loss = F.cross_entropy(made[0].float(), targets, label_smoothing=self.recipe.label_smoothing)
        return self.teacher.loss(made, taught, loss) if self.teacher and taught else loss

    def mixed(self, images_BHWC: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each image mixed with its neighbour in the batch, in float32, and probabilities (B,C) for labels (B,)."""
        mix = self.mixers[int(torch.randint(len(self.mixers), ()))]
        images_BCHW, targets = mix(images_BHWC.float().permute(0, 3, 1, 2), labels)
        return images_BCHW.permute(0, 2, 3, 1), targets

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs to take the same next step."""
        return {name: part.state_dict() for name, part in self._stateful().items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state()` returned."""
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])

    def _stateful(self) -> dict[str, Any]:
        average = {"average": self.evaluated.model} if self.average else {}
        return {"model": self.classifier.model, "optimizer": self.optimizer, "scaler": self.scaler, **average}


def total_steps(epochs: float, steps_per_epoch: int) -> int:
    """Steps of a run: at least one, unless it has no epochs."""
    return max(1, round(epochs * steps_per_epoch)) if epochs else 0


def use_plain_attention(model: nn.Module) -> None:
    """Replace fused attention with two matrix products and a softmax: its backward pass is slow on a CPU.

    In `vit-xs` it took 38 % of a training step, two products take 10 % (docs/results.md).
    """
    for module in model.modules():
        if isinstance(module, Attention | CompressedAttention):
            setattr(module, "fused_attn", False)  # noqa: B010 (timm declares it Final for TorchScript's sake)
