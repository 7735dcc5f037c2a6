"""What `stridevit loadtest rollout` found: a sentence for each rollout, tables, report.md and results.json."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loadtests.report.rendering import UNKNOWN, Cell, Table, number, print_tables, write_report
from loadtests.rollout.counters import ARMS, CANDIDATE, Counts
from loadtests.rollout.measure import CONFIDENCE, RolloutReading, figures

_SCHEMA_VERSION = 1
_OF = {
    "canary": "whole requests, each arm's own",
    "shadow": "the engine, for the images that both computed one after the other",
}


def write(reading: RolloutReading, out: Path) -> Path:
    """Write report.md and results.json in `out`, print the figures, and return the report's path."""
    found = {name: figures(reading.of(name)) for name in reading.names()}
    summary = [f"{kind} {title}: {verdict(kind, values)}" for (kind, title), values in found.items()]
    shown = [_table(kind, title, values) for (kind, title), values in found.items()]
    rows = [row for (kind, title), values in found.items() for row in _rows(reading.of((kind, title)), title, values)]
    rollouts = [{"kind": kind, "rollout": title, **values} for (kind, title), values in found.items()]
    blocks = [
        {"round": number, "kind": kind, "rollout": title, **_plain(counts)}
        for number, counts_of in enumerate(reading.rounds)
        for (kind, title), counts in counts_of.items()
    ]
    facts = {"schema_version": _SCHEMA_VERSION, **reading.facts(), "plan": asdict(reading.plan)}
    plan = reading.plan
    each = f"{plan.seconds / plan.rounds:.3g} s"
    what = f"{len(reading.rounds)} rounds of at most {each}, from the counters of {plan.url}."
    if reading.ended_early:
        what += f" Ended early: {reading.ended_early}."
    write_report(
        out,
        document={**facts, "confidence": CONFIDENCE, "rollouts": rollouts, "rows": rows, "blocks": blocks},
        template="rollout.md.j2",
        command=reading.command,
        environment=reading.environment,
        summary=summary,
        conditions=what,
        tables=shown,
        confidence=f"{CONFIDENCE:.0%}",
    )
    print_tables(*shown, width=110)
    print(*summary, sep="\n")
    return out / "report.md"


def verdict(kind: str, values: dict[str, Any]) -> str:
    """One sentence: agreement, latency, refusals and errors."""
    parts = ["no image was compared"]
    if values["compared"]:
        said = values["agreement"]
        interval = f"{100 * said['low']:.1f}–{100 * said['high']:.1f}"
        parts = [f"agreement {100 * said['share']:.1f} % ({interval}) over {values['compared']:,} images"]
    if change := values["latency"]:
        parts.append(f"latency ×{change['estimate']:.2f} ({change['low']:.2f}–{change['high']:.2f})")
    else:
        parts.append("no interval of latency, with fewer than five rounds in which both answered")
    if kind == "canary":
        parts.append(_listed("left to the primary", values["fallbacks"]) or "none left to the primary")
    parts.append(_listed("errors", values["arms"][CANDIDATE]["errors"]) or "no errors")
    if dropped := sum(values["dropped"].values()):
        parts.append(f"{dropped:,} not compared")
    return "; ".join(parts)


def _listed(what: str, counts: dict[str, int]) -> str:
    return f"{what}: " + ", ".join(f"{count:,} {reason}" for reason, count in counts.items()) if counts else ""


def _table(kind: str, title: str, values: dict[str, Any]) -> Table:
    primary, candidate = title.split(":", 1)
    names = {"primary": primary, "candidate": candidate}
    rows: list[Sequence[str | Cell]] = []
    for arm in ARMS:
        of = values["arms"][arm]
        errors = sum(of["errors"].values())
        shown = [number(of[name]) if of[name] is not None else UNKNOWN for name in ("mean_ms", "p50_ms", "p99_ms")]
        rows.append(
            (
                f"{names[arm]} ({arm})",
                f"{of['images']:,}",
                *shown,
                Cell(f"{errors:,}", "worse" if errors else None),
                f"{sum(values['fallbacks'].values()):,}" if (kind, arm) == ("canary", CANDIDATE) else UNKNOWN,
            )
        )
    not_compared = _listed("Not compared", values["dropped"])
    return Table(
        title=f"{kind} {title}",
        headings=("arm", "images", "mean ms", "p50 ms", "p99 ms", "errors", "left to the primary"),
        rows=rows,
        note=f"Times are those of {_OF[kind]}. {not_compared + '.' if not_compared else ''}".strip(),
    )


def _rows(rounds: list[Counts], title: str, values: dict[str, Any]) -> list[dict[str, Any]]:
    """The latency of both arms as `compare` writes a metric."""
    rows: list[dict[str, Any]] = []
    for arm in ARMS:
        means = [mean for counts in rounds if (mean := counts.durations[arm].mean_ms) is not None]
        change = values["latency"] if arm == CANDIDATE else None
        rows.append(
            {
                "arm": f"{arm} of {title}",
                "metric": "mean_ms",
                "load": None,
                "value": values["arms"][arm]["mean_ms"],
                "smallest": min(means, default=None),
                "largest": max(means, default=None),
                "unanswered": False,
                "change": change and {"kind": "ratio", "level": CONFIDENCE, **change},
            }
        )
    return rows


def _plain(counts: Counts) -> dict[str, Any]:
    """A round's counts with text as keys."""
    return {
        "images": {f"{arm} {outcome}": count for (arm, outcome), count in counts.images.items()},
        "compared": counts.compared,
        "dropped": counts.dropped,
        "fallbacks": counts.fallbacks,
        "durations": {arm: {"count": of.count, "seconds": of.seconds} for arm, of in counts.durations.items()},
    }
