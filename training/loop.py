"""One training run, from its recipe to `final/`."""

import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from training import runs
from training.augment import Batch, epoch_order, training_batches
from training.checkpoints import LAST_FILE, can_resume, load_checkpoint, save_checkpoint
from training.data import Dataset, Images, Split, split_val
from training.display import Board, MetricsRow, progress_bar
from training.distributed import World
from training.evaluate import Evaluation, accuracy_of, evaluate
from training.models import NormalizedModel, StrideViT, architecture, count_parameters
from training.recipes import Recipe
from training.step import Diverged, Stepper
from training.stopping import Stopped, StopRequest, stop_requests


class TrainingError(Exception):
    """A run that cannot go on; the message says why and what to do."""


def train(
    recipe: Recipe,
    variant: str,
    dataset: Dataset,
    out: Path,
    *,
    world: World,
    resume: bool = False,
    test: bool = True,
    checkpoint_steps: int = 500,
    workers: int = 0,
    console: Console | None = None,
) -> runs.ModelCard:
    """Train one variant by `recipe` into the folder `out` and return the card of the finished model.

    A checkpoint is written every `checkpoint_steps` steps, at the end of each epoch, and before a Stopped is raised for
    SIGTERM or Ctrl-C. Without `test` the test split stays untouched and the card has no accuracy: for runs that decide
    something. `workers` processes decode images that are read from disk.

    Raises RunError if `out` holds a run already (unless `resume`), or one of another recipe, and TrainingError for a
    loss that is not finite.
    """
    console = console if world.main and console else Console(stderr=True, quiet=not world.main)
    run = _Run(recipe, variant, dataset, out, world=world, workers=workers, console=console)
    if resume:
        run.restore()
        console.print(f"resuming {out} at step {run.step} of {run.total_steps}")
    elif world.decide(lambda: can_resume(out) or (out / runs.FINAL_FOLDER).exists()):
        raise runs.RunError(f"{out} holds a run already: continue it with --resume or choose another --out")
    run.record()
    with stop_requests() as stop:
        run.train(stop, checkpoint_steps)
    card = run.finish(test=test)
    if card.accuracy:
        top1, top5, split = card.accuracy.top1, card.accuracy.top5, card.accuracy.split
        console.print(f"{out}: {split} top-1 {top1:.2%}, top-5 {top5:.2%} of {card.accuracy.n}")
    return card


def run_identity(recipe: Recipe, variant: str, dataset: Dataset) -> dict[str, Any]:
    """What makes a run this one and no other, as run.json has it."""
    spec = architecture(recipe.preset, variant, num_classes=len(dataset.classes), img_size=recipe.img_size)
    return {
        "schema_version": runs.SCHEMA_VERSION,
        "recipe": recipe.model_dump(mode="json"),
        "variant": spec.variant,
        "architecture": spec.model_dump(mode="json"),
        "data_fingerprint": dataset.fingerprint,
    }


def _decisive(identity: dict[str, Any]) -> dict[str, Any]:
    """`identity` without what only says how steps are computed: a run may go on with smaller micro-batches."""
    recipe = Recipe.model_validate(identity["recipe"]).model_dump(mode="json")
    schedule = {key: value for key, value in recipe["schedule"].items() if key != "accumulate"}
    kept = {key: value for key, value in recipe.items() if key not in ("compile", "deterministic")}
    return {**identity, "recipe": {**kept, "schedule": schedule}}


class _Run:
    """The state of one run: a Stepper, its position, and a row of metrics for each epoch done."""

    def __init__(
        self,
        recipe: Recipe,
        variant: str,
        dataset: Dataset,
        out: Path,
        *,
        world: World,
        workers: int,
        console: Console,
    ) -> None:
        self.recipe, self.dataset, self.out, self.world = recipe, dataset, out, world
        self.workers, self.console = workers, console
        self.spec = architecture(recipe.preset, variant, num_classes=len(dataset.classes), img_size=recipe.img_size)
        self.fit, self.val = split_val(dataset.train, recipe.val_images)
        self._check_sizes()
        self.steps_per_epoch = len(self.fit) // recipe.schedule.batch_size
        self.total_steps = recipe.schedule.epochs * self.steps_per_epoch
        crop = self.spec.image_shape[0]
        self.preprocessing = runs.Preprocessing(
            resize=round(crop / recipe.crop_pct), crop=crop, mean=dataset.mean, std=dataset.std
        )
        self.model = StrideViT(self.spec, seed=recipe.seed, drop_path_rate=recipe.drop_path)
        self.stepper = Stepper(
            NormalizedModel(self.model, mean=dataset.mean, std=dataset.std).to(world.device),
            recipe,
            world,
            num_classes=self.spec.num_classes,
            steps_per_epoch=self.steps_per_epoch,
        )
        self.rows: list[MetricsRow] = []
        self.step = 0
        self.epoch_loss = 0.0
        """Sum over the steps of this epoch so far."""
        self.seconds = 0.0
        """Spent in training steps so far, over all resumptions; evaluation not counted."""
        self.started = datetime.now(UTC)
        self.commit = runs.git_commit()
        self.identity = run_identity(recipe, variant, dataset)

    def _check_sizes(self) -> None:
        recipe, spec = self.recipe, self.spec
        if isinstance(self.fit, Split) and (shape := self.fit.images.shape[1:3]) != spec.image_shape:
            raise TrainingError(
                f"preset {recipe.preset} takes {spec.img_size} px images, but {self.dataset.name} has "
                f"{shape[1]} × {shape[0]}: choose another --preset, or --set img_size={shape[0]}"
            )
        parts = self.world.size * recipe.schedule.accumulate
        if recipe.schedule.batch_size % parts:
            raise TrainingError(
                f"batch size {recipe.schedule.batch_size} cannot be divided by {self.world.size} processes × "
                f"{recipe.schedule.accumulate} micro-batches"
            )
        if recipe.schedule.batch_size > len(self.fit):
            raise TrainingError(f"batch size {recipe.schedule.batch_size} exceeds the {len(self.fit)} train images")

    def record(self, **more: str) -> None:
        """Write run.json."""
        if self.world.main:
            runs.write_json(
                self.out / runs.RUN_FILE,
                {
                    **self.identity,
                    "seed": self.recipe.seed,
                    "git_commit": self.commit,
                    "environment": runs.environment(),
                    "processes": self.world.size,
                    "parameters": count_parameters(self.model),
                    "started": self.started.isoformat(timespec="seconds"),
                    "train_seconds": round(self.seconds, 1),
                    **more,
                },
            )

    def restore(self) -> None:
        """Go on from the last good checkpoint. Raises RunError if there is none, or if it is of another run."""
        state, warning = self.world.decide(lambda: load_checkpoint(self.out))
        self.started = self.world.decide(lambda: runs.read_started(self.out))
        if _decisive(state["identity"]) != _decisive(self.identity):
            raise runs.RunError(f"{self.out} was trained with another recipe, variant or data: choose another --out")
        if warning:
            self.console.print(f"[yellow]warning:[/] {warning}: going on from the one before", soft_wrap=True)
        self.stepper.restore(state["stepper"])
        self.rows, self.step = state["rows"], state["step"]
        self.epoch_loss, self.seconds = state["epoch_loss"], state["seconds"]

    def save(self) -> None:
        """Write metrics.csv and a checkpoint. A disk that is full costs a warning, not the run."""
        if not self.world.main:
            return
        try:
            if self.rows:
                runs.write_metrics(self.out / runs.METRICS_FILE, self.rows)
            save_checkpoint(
                self.out,
                {
                    "identity": self.identity,
                    "stepper": self.stepper.state(),
                    "rows": self.rows,
                    "step": self.step,
                    "epoch_loss": self.epoch_loss,
                    "seconds": self.seconds,
                },
            )
        except OSError as error:
            self.console.print(
                f"[yellow]warning:[/] no checkpoint of step {self.step} in {self.out} ({error}): make room; "
                "the run goes on and tries again",
                soft_wrap=True,
            )

    def train(self, stop: StopRequest, checkpoint_steps: int) -> None:
        """Take all steps that are left."""
        with (
            progress_bar(self.console, disable=not self.world.main) as progress,
            Board(self.out, self.world, self.console, next_epoch=len(self.rows) + 1) as board,
        ):
            bar = progress.add_task(
                self.spec.variant, total=self.total_steps, completed=self.step, loss=float("nan"), rate=0.0
            )
            while self.step < self.total_steps:
                taken, before = self.step, self.seconds
                for loss, seconds in self._rest_of_the_epoch(stop, checkpoint_steps):
                    progress.update(bar, advance=1, loss=loss, rate=self.recipe.schedule.batch_size / seconds)
                row = self._end_epoch()
                rate = (self.step - taken) * self.recipe.schedule.batch_size / (self.seconds - before)
                board.add({**row, "images_per_s": rate}, epoch=len(self.rows))
                self.save()
                self.console.print("  ".join(f"{key} {value}" for key, value in row.items()) + f"  {rate:.0f} images/s")
                if self.world.sum(torch.tensor(int(stop.signum), device=self.world.device)).item():
                    raise self._stopped(stop)

    def _stopped(self, stop: StopRequest) -> Stopped:
        # A process that was told by another has no signal of its own.
        return Stopped(f"stopped at step {self.step} of {self.total_steps}", stop.signum or signal.SIGTERM)

    def _rest_of_the_epoch(self, stop: StopRequest, checkpoint_steps: int) -> Iterator[tuple[float, float]]:
        """Train to the end of the epoch; yields (mean loss so far, smoothed seconds of a step) after each step."""
        epoch, first = divmod(self.step, self.steps_per_epoch)
        self.stepper.classifier.train()
        batches = self._batches(epoch, first)
        smoothed = 0.0
        for done in range(first + 1, self.steps_per_epoch + 1):
            started = time.perf_counter()
            try:
                share = islice(batches, self.recipe.schedule.accumulate)
                loss, wants_stop = self.stepper(self.step, share, stop=bool(stop.signum))
            except Diverged as error:
                raise TrainingError(
                    f"{error} at step {self.step + 1} (epoch {epoch + 1}): start again with a lower optim.lr"
                    + (f"; {self.out / LAST_FILE} keeps the last good state" if can_resume(self.out) else "")
                ) from error
            self.step += 1
            self.epoch_loss += loss
            seconds = time.perf_counter() - started
            self.seconds += seconds
            smoothed = seconds if not smoothed else 0.95 * smoothed + 0.05 * seconds
            yield self.epoch_loss / done, smoothed
            # An epoch that is full is ended first, in `train`.
            if done < self.steps_per_epoch and (wants_stop or self.step % checkpoint_steps == 0):
                self.save()
                if wants_stop:
                    raise self._stopped(stop)

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """This process's micro-batches of the epoch, from step `first` on."""
        schedule, world = self.recipe.schedule, self.world
        order = epoch_order(len(self.fit), seed=self.recipe.seed, epoch=epoch)
        # (steps, micro-batches, processes, images)
        table = order[: self.steps_per_epoch * schedule.batch_size].reshape(
            self.steps_per_epoch, schedule.accumulate, world.size, -1
        )
        index = table[first:, :, world.rank].reshape(-1, table.shape[-1])
        return training_batches(
            self.fit,
            self.recipe.augment,
            list(index),
            img_size=self.preprocessing.crop,
            seed=self.recipe.seed,
            epoch=epoch,
            workers=self.workers,
        )

    def _end_epoch(self) -> MetricsRow:
        row: MetricsRow = {
            "epoch": len(self.rows) + 1,
            "step": self.step,
            "lr": round(self.stepper.lr, 8),
            "train_loss": round(self.epoch_loss / self.steps_per_epoch, 5),
        }
        if len(self.val):
            held = self._evaluate(self.val)
            row |= {
                "val_loss": round(held.loss, 5),
                "val_top1": round(held.top1, 5),
                "val_top5": round(held.top5, 5),
            }
        self.rows.append(row)
        self.epoch_loss = 0.0
        return row

    def _evaluate(self, images: Images) -> Evaluation:
        return evaluate(
            self.stepper.evaluated,
            images,
            num_classes=self.spec.num_classes,
            preprocessing=self.preprocessing,
            world=self.world,
            workers=self.workers,
        )

    def finish(self, *, test: bool) -> runs.ModelCard:
        """Evaluate on the full test split, once, if at all, and write `final/`."""
        dataset, accuracy = self.dataset, None
        if test:
            result = self._evaluate(dataset.test)
            accuracy = accuracy_of(result, dataset)

        def card(weights_sha256: str) -> runs.ModelCard:
            return runs.ModelCard(
                name=self.out.name,
                architecture=self.spec,
                preprocessing=self.preprocessing,
                labels=dataset.classes,
                accuracy=accuracy,
                dataset=dataset.name,
                recipe=self.recipe.name,
                seed=self.recipe.seed,
                epochs=self.recipe.schedule.epochs,
                git_commit=self.commit,
                weights_sha256=weights_sha256,
            )

        def write() -> runs.ModelCard:
            try:
                # The card comes last: with it the run is finished, and all else is there.
                self.record(finished=datetime.now(UTC).isoformat(timespec="seconds"))
                runs.save_final(self.out, self.stepper.evaluated.model, card)
            except OSError as error:
                raise TrainingError(
                    f"the finished model cannot be written to {self.out} ({error}): make room, then --resume"
                ) from error
            return runs.load_final(self.out)[1]

        return self.world.decide(write)
