"""Options shared by several commands of `python -m training`."""

from pathlib import Path
from typing import Annotated

import typer

from training.recipes import RECIPES
from training.resolve import DATA_VARIABLE
from training.variants import REGISTERED

MAX_EPOCHS = 100_000
RecipeOption = Annotated[str, typer.Option(help=f"One of: {', '.join(RECIPES)}.")]
AnyRecipeOption = Annotated[
    str, typer.Option(help=f"`folder`, with settings from the data, or one of: {', '.join(RECIPES)}.")
]
VariantOption = Annotated[str, typer.Option(help="`mha`, `lsra-rR` or `csra-rR`, such as csra-r2.")]
VariantsOption = Annotated[str, typer.Option(help="Variants, separated by commas.")]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        envvar=DATA_VARIABLE,
        metavar="DIR|hub:OWNER/NAME",
        help="The folder of the data set, or its parent, or its name on the hub. Not needed for `digits`.",
    ),
]
OverridesOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe: optim.lr=5e-4. May be repeated."),
]
ResumeOption = Annotated[bool, typer.Option(help="Continue a stopped run from its last checkpoint.")]
AutoResumeOption = Annotated[
    bool,
    typer.Option(
        "--auto-resume",
        help="Continue from the last checkpoint if there is one, else start: for torchrun's restarts, and for "
        "schedulers that repeat a command.",
    ),
]
TestOption = Annotated[
    bool, typer.Option(help="Evaluate on the test split at the end; `--no-test` for runs that decisions are based on.")
]
CheckpointOption = Annotated[int, typer.Option("--checkpoint-steps", min=1, help="Steps between checkpoints.")]
WorkersOption = Annotated[int | None, typer.Option(min=0, help="Processes that decode images. [default: one per core]")]
DeviceOption = Annotated[str, typer.Option(help="auto (a GPU if torch finds one), cpu, cuda, or a GPU such as cuda:1.")]
WeightsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.safetensors", help="With timm:NAME: weights to use, instead of fetching them from the hub."
    ),
]
EpochsOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=MAX_EPOCHS,
        help="Number of epochs instead of the recipe's; 0.5 is half an epoch. The warm-up takes at most a tenth.",
        show_default=False,
    ),
]
ALL_VARIANTS = ",".join(REGISTERED)
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
