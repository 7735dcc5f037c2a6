"""One training run, from its recipe to `final/`."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from timm.layers import Attention
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from training import runs
from training.attention import CompressedAttention
from training.augment import Epoch
from training.data import Dataset, split_holdout
from training.evaluate import evaluate
from training.models import Classifier, StrideViT, architecture, count_parameters
from training.recipes import Recipe

MetricsRow = dict[str, float | int]


class TrainingError(Exception):
    """A run that cannot go on; the message says why and what to do."""


def train(
    recipe: Recipe,
    variant: str,
    dataset: Dataset,
    out: Path,
    *,
    device: torch.device,
    resume: bool = False,
    test: bool = True,
    console: Console | None = None,
) -> runs.ModelCard:
    """Train one variant by `recipe` into the folder `out` and return the card of the finished model.

    Without `test` the test split stays untouched and the card has no accuracy: for runs that decide something.

    Raises RunError if `out` holds a run already (unless `resume`), or one of another recipe, and TrainingError for a
    loss that is not finite.
    """
    console = console or Console(stderr=True)
    run = _Run(recipe, variant, dataset, out, device=device)
    if resume:
        run.restore()
        console.print(f"resuming {out} after epoch {len(run.rows)}")
    elif runs.can_resume(out) or (out / runs.FINAL_FOLDER).exists():
        raise runs.RunError(f"{out} holds a run already: continue it with --resume or choose another --out")
    run.record()
    with _progress(console) as progress, SummaryWriter(str(out / "tensorboard"), purge_step=len(run.rows)) as board:
        bar = progress.add_task(
            run.spec.variant,
            total=recipe.schedule.epochs * run.steps_per_epoch,
            completed=len(run.rows) * run.steps_per_epoch,
            loss=float("nan"),
            rate=0.0,
        )
        for number in range(len(run.rows), recipe.schedule.epochs):
            before = run.seconds
            row = run.train_epoch(number, progress, bar)
            rate = run.steps_per_epoch * recipe.schedule.batch_size / (run.seconds - before)
            for key, value in row.items():
                board.add_scalar(key, value, number + 1)
            board.add_scalar("images_per_s", rate, number + 1)
            run.save()
            console.print("  ".join(f"{key} {value}" for key, value in row.items()) + f"  {rate:.0f} images/s")
    card = run.finish(test=test)
    if card.accuracy:
        top1, top5 = card.accuracy.top1, card.accuracy.top5
        console.print(f"{out}: test top-1 {top1:.2%}, top-5 {top5:.2%} of {card.accuracy.n}")
    return card


class _Run:
    """The state of one run: model, optimiser, schedule, and a row of metrics for each epoch done."""

    def __init__(self, recipe: Recipe, variant: str, dataset: Dataset, out: Path, *, device: torch.device) -> None:
        self.recipe = recipe
        self.dataset = dataset
        self.out = out
        self.device = device
        self.spec = architecture(recipe.preset, variant, classes=len(dataset.classes))
        height, width = dataset.train.images.shape[1:3]
        if (height, width) != (self.spec.image_size, self.spec.image_size):
            raise TrainingError(
                f"preset {recipe.preset} takes {self.spec.image_size} px images, but {dataset.name} has "
                f"{width} × {height}: choose another --preset"
            )
        self.fit, self.held_out = split_holdout(dataset.train, recipe.holdout)
        self.steps_per_epoch = len(self.fit) // recipe.schedule.batch_size
        if not self.steps_per_epoch:
            raise TrainingError(f"batch size {recipe.schedule.batch_size} exceeds the {len(self.fit)} train images")
        self.model = StrideViT(self.spec, seed=recipe.seed, drop_path_rate=recipe.drop_path)
        self.classifier = Classifier(self.model, mean=dataset.mean, std=dataset.std).to(device)
        if device.type == "cpu":
            use_plain_attention(self.model)
        self.forward = torch.compile(self.classifier) if recipe.compile else self.classifier
        self.optimizer = create_optimizer_v2(
            self.model, opt="adamw", lr=recipe.optim.lr, weight_decay=recipe.optim.weight_decay, fused=True
        )
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=recipe.schedule.epochs * self.steps_per_epoch,
            warmup_t=round(recipe.schedule.warmup_epochs * self.steps_per_epoch),
            warmup_lr_init=recipe.schedule.min_lr,
            lr_min=recipe.schedule.min_lr,
            t_in_epochs=False,
        )
        self.rows: list[MetricsRow] = []
        self.seconds = 0.0
        """Spent in training steps so far, over all resumptions; evaluation not counted."""
        self.started = datetime.now(UTC)
        self.commit = runs.git_commit()
        self.identity: dict[str, Any] = {
            "recipe": recipe.model_dump(mode="json"),
            "variant": self.spec.variant,
            "architecture": self.spec.model_dump(mode="json"),
            "data_fingerprint": dataset.fingerprint(),
        }

    def record(self, **more: str | float) -> None:
        """Write run.json."""
        runs.write_json(
            self.out / runs.RUN_FILE,
            {
                **self.identity,
                "seed": self.recipe.seed,
                "git_commit": self.commit,
                "environment": runs.environment(),
                "parameters": count_parameters(self.model),
                "started": self.started.isoformat(timespec="seconds"),
                **more,
            },
        )

    def restore(self) -> None:
        """Go on from last.pt. Raises RunError if there is none, or if it is of another run."""
        state = runs.load_last(self.out)
        if state["identity"] != self.identity:
            raise runs.RunError(f"{self.out} was trained with another recipe, variant or data: choose another --out")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rows, self.seconds = state["rows"], state["seconds"]
        self.started = runs.read_started(self.out)

    def save(self) -> None:
        """Write metrics.csv and last.pt."""
        runs.write_metrics(self.out / runs.METRICS_FILE, self.rows)
        runs.save_last(
            self.out,
            {
                "identity": self.identity,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "rows": self.rows,
                "seconds": self.seconds,
            },
        )

    def train_epoch(self, number: int, progress: Progress, bar: TaskID) -> MetricsRow:
        """Train the epoch `number` (from 0), evaluate on the held-out images, and return the new row."""
        # Drop-path draws from the global generator: a function of (seed, epoch) too, so that a resumed run agrees.
        torch.manual_seed(self.recipe.seed * 100_003 + number)
        epoch = Epoch(
            self.fit,
            self.recipe.augment,
            classes=len(self.dataset.classes),
            seed=self.recipe.seed,
            epoch=number,
        )
        batch_size = self.recipe.schedule.batch_size
        self.classifier.train()
        started, total_loss = time.perf_counter(), 0.0
        for step in range(self.steps_per_epoch):
            self.scheduler.step_update(number * self.steps_per_epoch + step)
            images, targets = epoch.batch(epoch.order[step * batch_size : (step + 1) * batch_size])
            loss = self._step(images, targets)
            if not loss < float("inf"):
                raise TrainingError(
                    f"loss is {loss} in epoch {number + 1}: lower optim.lr"
                    + (f"; {runs.LAST_FILE} keeps the last good epoch" if number else "")
                )
            total_loss += loss
            rate = (step + 1) * batch_size / (time.perf_counter() - started)
            progress.update(bar, advance=1, loss=total_loss / (step + 1), rate=rate)
        self.seconds += time.perf_counter() - started
        row: MetricsRow = {
            "epoch": number + 1,
            "step": (number + 1) * self.steps_per_epoch,
            "lr": round(self.optimizer.param_groups[0]["lr"], 8),
            "train_loss": round(total_loss / self.steps_per_epoch, 5),
        }
        if len(self.held_out):
            held = evaluate(self.classifier, self.held_out, device=self.device)
            row |= {
                "holdout_loss": round(held.loss, 5),
                "holdout_top1": round(held.top1, 5),
                "holdout_top5": round(held.top5, 5),
            }
        self.rows.append(row)
        return row

    def _step(self, images: torch.Tensor, targets: torch.Tensor) -> float:
        """One optimiser step; its loss. A loss that is not finite changes no weight."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            logits = self.forward(images.to(self.device, non_blocking=True))
        loss = F.cross_entropy(logits.float(), targets.to(self.device), label_smoothing=self.recipe.label_smoothing)
        value = loss.item()
        if value < float("inf"):
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optim.clip_norm)
            self.optimizer.step()
        return value

    def finish(self, *, test: bool) -> runs.ModelCard:
        """Evaluate on the full test split, once, if at all, and write `final/`."""
        size, dataset = self.spec.image_size, self.dataset
        accuracy = None
        if test:
            result = evaluate(self.classifier, dataset.test, device=self.device)
            accuracy = runs.Accuracy(
                dataset=dataset.name, split="test", n=len(dataset.test), top1=result.top1, top5=result.top5
            )

        def card(weights_sha256: str) -> runs.ModelCard:
            return runs.ModelCard(
                name=self.out.name,
                architecture=self.spec,
                preprocessing=runs.Preprocessing(resize=size, crop=size, mean=dataset.mean, std=dataset.std),
                labels=dataset.classes,
                accuracy=accuracy,
                dataset=dataset.name,
                recipe=self.recipe.name,
                seed=self.recipe.seed,
                epochs=self.recipe.schedule.epochs,
                git_commit=self.commit,
                weights_sha256=weights_sha256,
            )

        runs.save_final(self.out, self.model, card)
        self.record(finished=datetime.now(UTC).isoformat(timespec="seconds"), train_seconds=round(self.seconds, 1))
        return runs.load_final(self.out)[1]


def use_plain_attention(model: nn.Module) -> None:
    """Attend by two matrix products and a softmax: the CPU's fused kernel is slow in its backward pass.

    With `vit-xs` it took 38 % of a training step; two products take 10 % (see docs/results.md).
    """
    for module in model.modules():
        if isinstance(module, Attention | CompressedAttention):
            setattr(module, "fused_attn", False)  # noqa: B010 (timm declares it Final for TorchScript's sake)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:.0f} images/s"),
        TimeRemainingColumn(),
        console=console,
    )
