"""What the reports of `limit` and `overload` share: results.json with every block, conditions, and failed blocks."""

from pathlib import Path
from typing import Any

from loadtests.experiment.model import Experiment
from loadtests.report.document import block_document
from loadtests.report.rendering import write_report

SCHEMA_VERSION = 2


def conditions(experiment: Experiment[Any], what: str) -> str:
    """What the figures hold for, in one sentence or two."""
    early = f" Ended early: {experiment.ended_early}." if experiment.ended_early else ""
    rounds = f"{experiment.plan.rounds} round{'s' * (experiment.plan.rounds > 1)}"
    return f"{what}; {rounds}; {experiment.payloads}.{early}"


def write_experiment(
    experiment: Experiment[Any], out: Path, *, template: str, figures: dict[str, Any], **context: Any
) -> None:
    """Write report.md and results.json, which begins with `figures` and ends with all blocks."""
    blocks = [{**block_document(block), "info": block.info} for block in experiment.blocks]
    facts = {"schema_version": SCHEMA_VERSION, **experiment.facts(), "plan": experiment.plan}
    write_report(
        out,
        document={**facts, **figures, "blocks": blocks},
        template=template,
        command=experiment.command,
        environment=experiment.environment | context.pop("versions", {}),
        failures=[f"{block.arm}, round {block.round + 1}: {block.failure}" for block in experiment.failures],
        **context,
    )
