"""One training run, from its recipe to `final/`."""

import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.utils.tensorboard import SummaryWriter

from training import runs
from training.augment import Epoch
from training.data import Dataset, split_holdout
from training.evaluate import evaluate
from training.models import Classifier, StrideViT, architecture, count_parameters
from training.recipes import Recipe


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
    console: Console | None = None,
) -> runs.ModelCard:
    """Train one variant by `recipe` into the folder `out` and return the card of the finished model.

    Raises RunError if `out` holds a run already (unless `resume`), or one of another recipe, and TrainingError for a
    loss that is not finite.
    """
    console = console or Console(stderr=True)
    spec = architecture(recipe.preset, variant, classes=len(dataset.classes))
    fit, held_out = split_holdout(dataset.train, recipe.holdout)
    model = StrideViT(spec, seed=recipe.seed, drop_path_rate=recipe.drop_path)
    classifier = Classifier(model, mean=dataset.mean, std=dataset.std).to(device)
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=recipe.optim.lr, weight_decay=recipe.optim.weight_decay
    )
    steps_per_epoch = len(fit) // recipe.schedule.batch_size
    if not steps_per_epoch:
        raise TrainingError(f"batch size {recipe.schedule.batch_size} exceeds the {len(fit)} train images")
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=recipe.schedule.epochs * steps_per_epoch,
        warmup_t=round(recipe.schedule.warmup_epochs * steps_per_epoch),
        warmup_lr_init=recipe.schedule.min_lr,
        lr_min=recipe.schedule.min_lr,
        warmup_prefix=False,
        t_in_epochs=False,
    )
    identity = {
        "recipe": recipe.model_dump(mode="json"),
        "variant": spec.variant,
        "architecture": spec.model_dump(mode="json"),
        "data_fingerprint": dataset.fingerprint(),
    }
    rows: list[dict[str, float | int]] = []
    if resume:
        state = runs.load_last(out)
        if state["identity"] != identity:
            raise runs.RunError(
                f"{out} was trained with another recipe, variant or data: choose another --out"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rows = state["rows"]
        console.print(f"resuming {out} after epoch {len(rows)}")
    elif (out / runs.RUN_FILE).exists():
        raise runs.RunError(f"{out} holds a run already: continue it with --resume or choose another --out")
    commit = runs.git_commit()
    record = {
        **identity,
        "seed": recipe.seed,
        "git_commit": commit,
        "environment": runs.environment(),
        "parameters": count_parameters(model),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    runs.write_json(out / runs.RUN_FILE, record)

    forward = torch.compile(classifier) if recipe.compile else classifier
    first_epoch = len(rows)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:.0f} images/s"),
        TimeRemainingColumn(),
        console=console,
    )
    with progress, SummaryWriter(str(out / "tensorboard"), purge_step=first_epoch) as board:
        bar = progress.add_task(
            spec.variant,
            total=recipe.schedule.epochs * steps_per_epoch,
            completed=first_epoch * steps_per_epoch,
            loss=float("nan"),
            rate=0.0,
        )
        for number in range(first_epoch, recipe.schedule.epochs):
            # Drop-path draws from the global generator: a function of (seed, epoch) too, so that a resumed run agrees.
            torch.manual_seed(recipe.seed * 100_003 + number)
            epoch = Epoch(fit, recipe.augment, classes=len(dataset.classes), seed=recipe.seed, epoch=number)
            classifier.train()
            started, total_loss = time.perf_counter(), 0.0
            for step in range(steps_per_epoch):
                scheduler.step_update(number * steps_per_epoch + step)
                begin = step * recipe.schedule.batch_size
                images, targets = epoch.batch(epoch.order[begin : begin + recipe.schedule.batch_size])
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
                    logits = forward(images.to(device, non_blocking=True))
                loss = F.cross_entropy(
                    logits.float(), targets.to(device), label_smoothing=recipe.label_smoothing
                )
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip_norm)
                loss_value = loss.item()
                if not torch.isfinite(loss):
                    raise TrainingError(
                        f"loss is {loss_value} in epoch {number + 1}: lower optim.lr; {runs.LAST_FILE} keeps the last good epoch"
                    )
                optimizer.step()
                optimizer.zero_grad()
                total_loss += loss_value
                rate = (step + 1) * recipe.schedule.batch_size / (time.perf_counter() - started)
                progress.update(bar, advance=1, loss=total_loss / (step + 1), rate=rate)
            seconds = time.perf_counter() - started
            row: dict[str, float | int] = {
                "epoch": number + 1,
                "step": (number + 1) * steps_per_epoch,
                "lr": round(optimizer.param_groups[0]["lr"], 8),
                "train_loss": round(total_loss / steps_per_epoch, 5),
            }
            if len(held_out):
                held = evaluate(classifier, held_out, device=device)
                row |= {
                    "holdout_loss": round(held.loss, 5),
                    "holdout_top1": round(held.top1, 5),
                    "holdout_top5": round(held.top5, 5),
                }
            for key, value in row.items():
                board.add_scalar(key, value, number + 1)
            row |= {"seconds": round(seconds, 1), "images_per_s": round(len(fit) / seconds, 1)}
            rows.append(row)
            runs.write_metrics(out / runs.METRICS_FILE, rows)
            runs.save_last(
                out,
                {
                    "identity": identity,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "rows": rows,
                },
            )
            console.print("  ".join(f"{key} {value}" for key, value in row.items()))

    test = evaluate(classifier, dataset.test, device=device)
    accuracy = runs.Accuracy(
        dataset=dataset.name, split="test", n=len(dataset.test), top1=test.top1, top5=test.top5
    )

    def card(weights_sha256: str) -> runs.ModelCard:
        return runs.ModelCard(
            name=out.name,
            architecture=spec,
            preprocessing=runs.Preprocessing(
                resize=spec.image_size, crop=spec.image_size, mean=dataset.mean, std=dataset.std
            ),
            labels=dataset.classes,
            accuracy=accuracy,
            dataset=dataset.name,
            recipe=recipe.name,
            seed=recipe.seed,
            epochs=recipe.schedule.epochs,
            git_commit=commit,
            weights_sha256=weights_sha256,
        )

    runs.save_final(out, model, card)
    runs.write_json(
        out / runs.RUN_FILE, {**record, "finished": datetime.now(UTC).isoformat(timespec="seconds")}
    )
    _, finished = runs.load_final(out)
    console.print(f"{out}: test top-1 {test.top1:.2%}, top-5 {test.top5:.2%} of {len(dataset.test)}")
    return finished
