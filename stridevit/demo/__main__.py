"""`stridevit demo`: train, export, serve and compare three variants, with the commands that a user would type."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True)
console = Console(stderr=True)


@app.callback()
def stridevit_demo() -> None:
    """The whole workflow in one command."""


@app.command()
def demo(
    data: Annotated[
        Path | None, typer.Option(help="Your pictures, a folder per class. [default: scikit-learn's digits]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for runs, models, and the report of the comparison.")] = Path(
        "demo"
    ),
    variants: Annotated[str, typer.Option(help="Separated by commas; the first is the baseline.")] = (
        "mha,lsra-r2,csra-r2"
    ),
    epochs: Annotated[float | None, typer.Option(min=0, help="Instead of the recipe's.", show_default=False)] = None,
) -> None:
    """Train variants on digits or on your pictures, export them, serve them and compare them under load.

    Each step is a command that is shown before it runs. The same command continues where it was stopped: finished runs
    and exported models are kept. On 2 cores, the digits take about 5 minutes.

    Example: `stridevit demo --data photos/`
    """
    if data is not None and not data.is_dir():
        raise typer.BadParameter(f"{data} is not a folder", param_hint="--data")
    family = (
        "digits" if data is None else re.sub(r"[^a-z0-9]+", "-", data.resolve().name.lower()).strip("-") or "pictures"
    )
    source = ["--recipe", "digits"] if data is None else ["--data", str(data)]
    names = variants.split(",")
    for variant in names:
        run = out / "runs" / f"{family}-{variant}"
        if not (run / "final" / "model.json").is_file():
            resume = ["--resume"] if (run / "last.pt").is_file() else []
            length = [] if epochs is None else ["--epochs", f"{epochs:g}"]
            _run("train", *source, "--variant", variant, "--out", str(run), *length, *resume)
        if not (out / "models" / f"{family}-{variant}").is_dir():
            pictures = [] if data is None else ["--data", str(data)]
            _run("export", "run", str(run), *pictures, "--family", family, "--repository", str(out / "models"))
    images = data
    if images is None:
        images = out / "images"
        _run("images", "--dataset", "digits", "--out", str(images))
    models = ",".join(f"{family}-{variant}" for variant in names)
    where = ["--repository", str(out / "models"), "--data", str(images), "--out", str(out)]
    _run("compare", *where, "--models", models, "--quick", "--no-aa-run", "--fresh")
    console.print(f"serve them with: stridevit serve --repository {out / 'models'}", highlight=False, soft_wrap=True)


def _run(*arguments: str) -> None:
    """Run one command of ours, and end with its exit code if it fails."""
    console.print(f"[bold]$ stridevit {' '.join(arguments)}[/]", highlight=False, soft_wrap=True)
    environment = {key: value for key, value in os.environ.items() if key != "STRIDEVIT_DATA"}
    with subprocess.Popen([sys.executable, "-m", "stridevit", *arguments], env=environment) as step:  # noqa: S603
        try:
            code = step.wait()
        except KeyboardInterrupt:
            # The terminal has interrupted the step too: let it save its work.
            code = step.wait() or 130
    if code:
        raise typer.Exit(code)


if __name__ == "__main__":
    app(prog_name="python -m stridevit.demo")
