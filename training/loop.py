"""One training run, from its recipe to `final/`."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from training import runs
from training.augment import Batch, epoch_order, training_batches
from training.bf16 import bf16_is_emulated, bf16_slowdown
from training.checkpoints import LAST_FILE, can_resume, load_checkpoint, save_checkpoint
from training.data import Dataset, Images, Split, split_val
from training.distill import Teacher
from training.distributed import World
from training.evaluate import Evaluation, evaluate
from training.initial import Source, Taken, take
from training.models import Architecture, NormalizedModel, StrideViT, architecture, count_parameters
from training.progress import MetricsRow, TensorBoard, progress_bar
from training.recipes import Recipe
from training.retrofit import retrofit
from training.step import Diverged, Stepper, total_steps
from training.stopping import Stopped, StopRequest, stop_requests


class TrainingError(Exception):
    """A run cannot start or continue; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a run is executed; none of it changes the result."""

    world: World
    workers: int = 0
    """Processes that decode images read from disk."""
    checkpoint_steps: int = 500
    """Steps between checkpoints; there is also one at the end of each epoch."""
    console: Console = field(default_factory=lambda: Console(stderr=True))

    def say(self, message: str) -> None:
        """Print one line for the user, from the main process only."""
        if self.world.main:
            self.console.print(message, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Trained models that a run begins with or learns from."""

    init: Source | None = None
    """Its weights are the initial ones. With `recipe.fit`, its attention is compressed, and it is also the teacher."""
    teacher: Source | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """As in run.json: empty for a run from random weights and without a teacher."""
        known = {"init": self.init, "teacher": self.teacher}
        return {name: source.identity for name, source in known.items() if source}


FROM_SCRATCH = Origin()


def train(
    recipe: Recipe,
    variant: str,
    dataset: Dataset,
    out: Path,
    on: Execution,
    *,
    origin: Origin = FROM_SCRATCH,
    resume: bool | Literal["auto"] = False,
    test: bool = True,
) -> runs.ModelCard:
    """Train one variant by `recipe` into the folder `out` and return the card of the finished model.

    With `resume="auto"` the run continues from its last checkpoint if there is one, and otherwise starts.

    SIGTERM and Ctrl-C save a checkpoint and raise Stopped. Without `test` the test split is not read and the card has
    no accuracy: for runs whose results decisions are based on.

    Raises RunError if `out` already holds a run (unless `resume`), or a run of another recipe, and TrainingError if the
    loss is not finite, or if the processes were started with different settings or data.
    """
    _check_agreement(on.world, {**run_identity(recipe, variant, dataset, origin), "resume": resume, "test": test})
    if resume == "auto":
        resume = _can_resume(on.world, out)
    if not resume and on.world.decide(lambda: can_resume(out) or (out / runs.WEIGHTS_FILE).exists()):
        raise runs.RunError(f"{out} holds a run already: continue it with --resume or choose another --out")
    if recipe.precision == "bf16" and bf16_is_emulated(on.world.device):
        on.say(
            "[yellow]warning:[/] this CPU has no instructions for bfloat16 and computes such products "
            f"{bf16_slowdown(on.world.device):.0f} times slower than float32: start again with --set precision=fp32"
        )
    run = _Run(recipe, variant, dataset, out, on, origin, begin=not resume)
    if resume:
        run.restore()
        on.say(f"resuming {out} at step {run.step} of {run.total_steps}")
    run.record()
    with stop_requests() as stop:
        run.train(stop)
    card = run.finish(test=test)
    if known := card.accuracy:
        on.say(f"{out}: {known.split} top-1 {known.top1:.2%}, top-5 {known.top5:.2%} of {known.n}")
    return card


def _check_agreement(world: World, settings: dict[str, Any]) -> None:
    """Check that all processes agree; else they would wait for each other for ever, or train on different data."""
    first, *others = world.gather(settings)
    for rank, other in enumerate(others, start=1):
        if different := [name for name in first if first[name] != other.get(name)]:
            raise TrainingError(
                f"process {rank} has another {', '.join(different)} than process 0: start all machines with the same "
                "command, code and data"
            )


def _can_resume(world: World, out: Path) -> bool:
    """Whether the main process finds a checkpoint; it may run on another machine than before a restart."""
    found = world.gather(can_resume(out))
    if any(found) and not found[0]:
        raise runs.RunError(
            f"process {found.index(True)} has a checkpoint in {out}, but process 0, which reads it for all, does not: "
            "choose an --out that all machines share"
        )
    return found[0]


def run_identity(recipe: Recipe, variant: str, dataset: Dataset, origin: Origin = FROM_SCRATCH) -> dict[str, Any]:
    """What a resumed or repeated run must share with the first one, as in run.json."""
    spec = architecture_of(recipe, variant, dataset, origin)
    return {
        "schema_version": runs.SCHEMA_VERSION,
        "recipe": recipe.model_dump(mode="json"),
        "variant": spec.variant,
        "architecture": spec.model_dump(mode="json"),
        "data_fingerprint": dataset.fingerprint,
        **origin.identity,
    }


def architecture_of(recipe: Recipe, variant: str, dataset: Dataset, origin: Origin) -> Architecture:
    """The preset's architecture, or the source's if it has the recipe's preset, with the changes of `recipe`."""
    known = origin.init.architecture if origin.init else None
    if known is None or recipe.preset != known.preset:
        return architecture(
            recipe.preset,
            variant,
            num_classes=len(dataset.classes),
            img_size=recipe.img_size,
            rank=recipe.rank,
            positions=recipe.positions,
            pool=recipe.pool,
        )
    changed = {
        "variant": variant,
        "num_classes": len(dataset.classes),
        "img_size": recipe.img_size or known.img_size,
        "rank": recipe.rank or known.rank,
        "positions": recipe.positions,
        "pool": recipe.pool,
    }
    return Architecture.model_validate(known.model_dump() | changed)


def same_run(identity: dict[str, Any]) -> dict[str, Any]:
    """`identity` in the form that is compared: settings that an older record lacks get today's defaults."""
    recipe = Recipe.model_validate(identity["recipe"])
    spec = Architecture.model_validate(identity["architecture"])
    return {**identity, "recipe": recipe.model_dump(), "architecture": spec.model_dump()}


def _decisive(identity: dict[str, Any]) -> dict[str, Any]:
    """`identity` without what only determines how steps are computed: a run may resume with smaller micro-batches."""
    compared = same_run(identity)
    for name in ("compile", "deterministic"):
        del compared["recipe"][name]
    del compared["recipe"]["schedule"]["accumulate"]
    for name in ("init", "teacher"):
        if name in compared:
            compared[name] = compared[name]["sha256"]
    return compared


class _Run:
    """The state of one run: a Stepper, its position, and one row of metrics per finished epoch."""

    def __init__(
        self,
        recipe: Recipe,
        variant: str,
        dataset: Dataset,
        out: Path,
        on: Execution,
        origin: Origin,
        *,
        begin: bool,
    ) -> None:
        self.recipe, self.dataset, self.out, self.on, self.world = recipe, dataset, out, on, on.world
        self.origin = origin
        self.spec = architecture_of(recipe, variant, dataset, origin)
        self.fit, self.val = split_val(dataset.train, recipe.val_images)
        self._check_sizes()
        self._check_origin()
        if not (recipe.schedule.epochs or origin.init):
            raise TrainingError("no epochs and no --init: there is nothing to train or evaluate")
        self.steps_per_epoch = len(self.fit) // recipe.schedule.batch_size
        self.total_steps = total_steps(recipe.schedule.epochs, self.steps_per_epoch)
        crop = self.spec.image_shape[0]
        self.preprocessing = runs.Preprocessing(
            resize=round(crop / recipe.crop_pct),
            crop=crop,
            interpolation=origin.init.preprocessing.interpolation
            if origin.init and origin.init.preprocessing
            else "bicubic",
            mean=dataset.mean,
            std=dataset.std,
        )
        self.model = StrideViT(self.spec, seed=recipe.seed, drop_path_rate=recipe.drop_path)
        if begin and origin.init:
            for line in self._begin(origin.init).lines():
                on.say(line)
        classifier = NormalizedModel(self.model, mean=dataset.mean, std=dataset.std).to(self.world.device)
        teacher = Teacher(origin.teacher.classifier(), recipe.distill, self.model) if origin.teacher else None
        self.stepper = Stepper(
            classifier,
            recipe,
            self.world,
            num_classes=self.spec.num_classes,
            steps_per_epoch=self.steps_per_epoch,
            teacher=teacher,
        )
        self.rows: list[MetricsRow] = []
        self.step = 0
        self.epoch_loss = 0.0
        """Sum of the losses of this epoch's steps so far."""
        self.seconds = 0.0
        """Time in training steps so far, including those before a resume, excluding evaluation."""
        self.started = datetime.now(UTC)
        self.commit = runs.git_commit()
        self.identity = run_identity(recipe, variant, dataset, origin)

    def _check_origin(self) -> None:
        distill = self.recipe.distill
        if (distill.logits or distill.blocks) and not self.origin.teacher:
            raise TrainingError("distill.logits and distill.blocks have no effect without a --teacher: name one")
        must_agree = [self.origin.teacher, self.origin.init if self.recipe.fit else None]
        for source in filter(None, must_agree):
            if source.labels and source.labels != self.dataset.classes:
                raise TrainingError(
                    f"{source.name} knows other classes ({len(source.labels)}, from {source.labels[0]!r}) than the "
                    f"data has ({len(self.dataset.classes)}, from {self.dataset.classes[0]!r})"
                )

    def _begin(self, source: Source) -> Taken:
        """Set the initial weights from `source`: as they are, or fitted to compressed attention."""
        if self.recipe.fit is None:
            return take(self.model, source, self.dataset.classes)
        return retrofit(self.model, source, source.classifier(), self.recipe.fit, self.fit, self.preprocessing)

    def _check_sizes(self) -> None:
        recipe, spec, batch = self.recipe, self.spec, self.recipe.schedule.batch_size
        if isinstance(self.fit, Split) and (shape := self.fit.images.shape[1:3]) != spec.image_shape:
            raise TrainingError(
                f"preset {recipe.preset} takes {spec.img_size} px images, but {self.dataset.name} has "
                f"{shape[1]} × {shape[0]}: choose another --preset, or --set img_size={shape[0]}"
            )
        if batch % (self.world.size * recipe.schedule.accumulate):
            raise TrainingError(
                f"batch size {batch} cannot be divided by {self.world.size} processes × "
                f"{recipe.schedule.accumulate} micro-batches"
            )
        if batch > len(self.fit):
            fitting = 2 ** max(0, (len(self.fit) // 4).bit_length() - 1)
            raise TrainingError(
                f"batch size {batch} exceeds the {len(self.fit)} train images: --set schedule.batch_size={fitting}"
            )

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
                    "params": count_parameters(self.model),
                    "started": self.started.isoformat(timespec="seconds"),
                    "train_seconds": round(self.seconds, 1),
                    **more,
                },
            )

    def restore(self) -> None:
        """Continue from the last good checkpoint. Raises RunError if there is none, or if it belongs to another run."""
        state, warning = self.world.decide(lambda: load_checkpoint(self.out))
        record = self.world.decide(lambda: runs.read_record(self.out))
        if _decisive(state["identity"]) != _decisive(self.identity):
            raise runs.RunError(f"{self.out} was trained with another recipe, variant or data: choose another --out")
        if warning:
            self.on.say(f"[yellow]warning:[/] {warning}: continuing from the one before")
        self.stepper.restore(state["stepper"])
        self.rows, self.step = state["rows"], state["step"]
        self.epoch_loss, self.seconds = state["epoch_loss"], state["seconds"]
        self.started = datetime.fromisoformat(record["started"])

    def save(self) -> None:
        """Write metrics.csv and a checkpoint. If the disk is full, warn and go on."""
        if not self.world.main:
            return
        state = {
            "identity": self.identity,
            "stepper": self.stepper.state(),
            "rows": self.rows,
            "step": self.step,
            "epoch_loss": self.epoch_loss,
            "seconds": self.seconds,
        }
        try:
            if self.rows:
                runs.write_metrics(self.out / runs.METRICS_FILE, self.rows)
            save_checkpoint(self.out, state)
        except OSError as error:
            self.on.say(
                f"[yellow]warning:[/] no checkpoint of step {self.step} in {self.out} ({error}): make room; the run "
                "continues and tries again"
            )

    def train(self, stop: StopRequest) -> None:
        """Take all remaining steps."""
        log = self.out / "tensorboard" if self.world.main else None
        with (
            progress_bar(self.on.console, disable=not self.world.main) as progress,
            closing(TensorBoard(log, self.on.say, next_epoch=len(self.rows) + 1)) as board,
        ):
            if not self.total_steps:
                self.rows = [self._metrics(train_loss=math.nan)]
                self.save()
            bar = progress.add_task(
                self.spec.variant, total=self.total_steps, completed=self.step, loss=float("nan"), rate=0.0
            )
            while self.step < self.total_steps:
                first, before, rate = self.step, self.seconds, 0.0
                for loss in self._rest_of_epoch(stop):
                    rate = (self.step - first) * self.recipe.schedule.batch_size / (self.seconds - before)
                    progress.update(bar, advance=1, loss=loss, rate=rate)
                row = self._end_epoch()
                board.add({**row, "images_per_s": rate}, epoch=len(self.rows))
                self.save()
                self.on.say("  ".join(f"{key} {value}" for key, value in row.items()) + f"  {rate:.0f} images/s")
                if self.world.sum(torch.tensor(int(stop.signum), device=self.world.device)).item():
                    raise self._stopped(stop)

    def _stopped(self, stop: StopRequest) -> Stopped:
        # A process that stops because another one was asked to has received no signal itself.
        return Stopped(f"stopped at step {self.step} of {self.total_steps}", stop.signum or signal.SIGTERM)

    def _rest_of_epoch(self, stop: StopRequest) -> Iterator[float]:
        """Train to the end of the epoch; yields the epoch's mean loss so far after each step."""
        epoch, first = divmod(self.step, self.steps_per_epoch)
        self.stepper.classifier.train()
        batches = self._batches(epoch, first)
        steps = self._steps_of(epoch)
        for done in range(first + 1, steps + 1):
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
            self.seconds += time.perf_counter() - started
            yield self.epoch_loss / done
            # After the last step of an epoch, `train` evaluates first and then saves and stops.
            if done < steps and (wants_stop or self.step % self.on.checkpoint_steps == 0):
                self.save()
                if wants_stop:
                    raise self._stopped(stop)

    def _steps_of(self, epoch: int) -> int:
        """Number of steps of an epoch; the last epoch may be shorter."""
        return min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """This process's micro-batches of the epoch, from step `first` on."""
        schedule, world, seed = self.recipe.schedule, self.world, self.recipe.seed
        order = epoch_order(len(self.fit), seed=seed, epoch=epoch)[: self.steps_per_epoch * schedule.batch_size]
        # (steps, micro-batches, processes, images)
        table = order.reshape(self.steps_per_epoch, schedule.accumulate, world.size, -1)
        index = list(table[first:, :, world.rank].reshape(-1, table.shape[-1]))
        crop, workers = self.preprocessing.crop, self.on.workers
        return training_batches(
            self.fit, self.recipe.augment, index, img_size=crop, seed=seed, epoch=epoch, workers=workers
        )

    def _end_epoch(self) -> MetricsRow:
        row = self._metrics(train_loss=round(self.epoch_loss / self._steps_of(len(self.rows)), 5))
        self.rows.append(row)
        self.epoch_loss = 0.0
        return row

    def _metrics(self, *, train_loss: float) -> MetricsRow:
        row: MetricsRow = {
            "epoch": len(self.rows) + (self.total_steps > 0),
            "step": self.step,
            "lr": round(self.stepper.lr, 8),
            "train_loss": train_loss,
        }
        if len(self.val):
            val = self._evaluate(self.val)
            row |= {"val_loss": round(val.loss, 5), "val_top1": round(val.top1, 5), "val_top5": round(val.top5, 5)}
        return row

    def _evaluate(self, images: Images) -> Evaluation:
        classes, workers = self.spec.num_classes, self.on.workers
        return evaluate(
            self.stepper.evaluated, images, self.preprocessing, num_classes=classes, world=self.world, workers=workers
        )

    def finish(self, *, test: bool) -> runs.ModelCard:
        """Evaluate on the full test split, unless `test` is false, and write `final/`."""
        card = partial(
            runs.ModelCard,
            name=self.out.name,
            architecture=self.spec,
            preprocessing=self.preprocessing,
            labels=self.dataset.classes,
            accuracy=self._evaluate(self.dataset.test).accuracy(self.dataset) if test else None,
            dataset=self.dataset.name,
            recipe=self.recipe.name,
            seed=self.recipe.seed,
            epochs=self.recipe.schedule.epochs,
            git_commit=self.commit,
        )

        def write() -> runs.ModelCard:
            try:
                # The card is written last: it marks the run as finished.
                self.record(finished=datetime.now(UTC).isoformat(timespec="seconds"))
                runs.save_final(self.out, self.stepper.evaluated.model, card)
            except OSError as error:
                raise TrainingError(
                    f"the finished model cannot be written to {self.out} ({error}): make room, then --resume"
                ) from error
            return runs.load_final(self.out)[1]

        return self.world.decide(write)
