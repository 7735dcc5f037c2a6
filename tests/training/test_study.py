"""Several variants and seeds: what is finished stays, what is not goes on, and the table says what was measured."""

import dataclasses
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from training.__main__ import app
from training.data import load_dataset
from training.loop import TrainingError
from training.recipes import Recipe
from training.runs import RunError, load_final, read_record
from training.step import Stepper
from training.study import is_finished


@pytest.fixture(scope="module")
def command(small_data: list[str]) -> list[str]:
    """Studies two variants; needs --out."""
    return ["study", *small_data, "--variants", "mha,csra-r2", "--set", "schedule.epochs=2"]


@pytest.fixture(scope="module")
def studied(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A study of two variants and two seeds, made by two commands; the second finds two runs finished."""
    out = tmp_path_factory.mktemp("study")
    first = CliRunner().invoke(app, [*command, "--out", str(out), "--seeds", "0"])
    assert first.exit_code == 0, first.output
    weights = out / "digits-mha-s0" / "final" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    second = CliRunner().invoke(app, [*command, "--out", str(out), "--seeds", "0,1"])
    assert second.exit_code == 0, second.output
    assert weights.stat().st_mtime_ns == written, "a finished run was trained again"
    return out, second.stdout


def test_every_run_is_in_the_table_with_mean_and_deviation(studied: tuple[Path, str]) -> None:
    out, printed = studied
    table = (out / "study.md").read_text()
    assert table in printed
    for variant in ("mha", "csra-r2"):
        cards = [load_final(out / f"digits-{variant}-s{seed}")[1] for seed in (0, 1)]
        top1 = [100 * card.accuracy.top1 for card in cards if card.accuracy]
        (line,) = [line for line in table.splitlines() if line.startswith(f"| `{variant}` ")]
        assert f"| 0, 1 | {cards[0].architecture.kv_tokens} of 64 |" in line
        assert f"{statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f} %" in line
    runs = json.loads((out / "study.json").read_text())["runs"]
    assert [(run["variant"], run["seed"]) for run in runs] == [("mha", 0), ("csra-r2", 0), ("mha", 1), ("csra-r2", 1)]


def test_curves_are_drawn(studied: tuple[Path, str]) -> None:
    out, _ = studied
    assert "csra-r2" in (out / "curves.svg").read_text()
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_run_of_another_recipe_is_refused(command: list[str], studied: tuple[Path, str]) -> None:
    out, _ = studied
    result = CliRunner().invoke(app, [*command, "--out", str(out), "--set", "optim.lr=1e-4"])
    assert result.exit_code == 1
    assert "was trained with other settings" in " ".join(result.stderr.split())


def test_run_on_other_data_is_refused(small_data: list[str], studied: tuple[Path, str]) -> None:
    out, _ = studied
    folder = out / "digits-mha-s0"
    same = load_dataset("small", small_data[small_data.index("--data") + 1])
    other = dataclasses.replace(same, test=same.test.take(np.arange(9)))
    recipe = Recipe.model_validate(read_record(folder)["recipe"])
    assert is_finished(folder, recipe, "mha", same)
    for variant, dataset in (("mha", other), ("csra-r2", same)):
        with pytest.raises(RunError, match="other settings or data"):
            is_finished(folder, recipe, variant, dataset)


def test_failing_run_does_not_stop_the_others(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Stepper.__call__

    def fail_first(self: Stepper, *arguments: object, **options: object) -> object:
        if not (tmp_path / "digits-mha-s0" / "failed").exists():
            (tmp_path / "digits-mha-s0" / "failed").touch()
            raise TrainingError("loss is nan")
        return take(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Stepper, "__call__", fail_first)
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path), "--set", "schedule.epochs=1"])
    assert result.exit_code == 1
    assert "digits-mha-s0 failed: loss is nan" in result.stderr
    assert "| `csra-r2` | 0 |" in result.stdout
    assert "`mha`" not in result.stdout
