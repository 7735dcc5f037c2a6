"""The generated parts of docs/monitoring.md: what stands between `<!-- NAME: ... -->` and `<!-- end of NAME -->`."""

import re
from collections.abc import Iterable

from deploy.monitoring.alerts import ALERTS
from deploy.monitoring.panels import PANELS


def page(text: str) -> str:
    """The page with its generated parts updated. Raises ValueError if a part is missing."""
    for name, part in (("panels", _panels()), ("alerts", _alerts())):
        start, end = re.search(rf"<!-- {name}:.*\n", text), f"<!-- end of {name} -->"
        if start is None or end not in text:
            raise ValueError(f"docs/monitoring.md has no part {name!r}: <!-- {name}: ... --> to {end}")
        text = f"{text[: start.end()]}\n{part}\n\n{text[text.index(end) :]}"
    return text


def _panels() -> str:
    rows = ((panel.title, f"`{_in_a_cell(panel.expression)}`", panel.meaning) for panel in PANELS)
    return _table(("panel", "query", "what it says"), rows)


def _alerts() -> str:
    rows = (
        (f"`{one.name}`", one.severity, f"`{_in_a_cell(one.expression)}`", one.lasting, one.action) for one in ALERTS
    )
    return _table(("alert", "severity", "fires if", "for", "what to do"), rows)


def _in_a_cell(expression: str) -> str:
    return expression.replace("|", "\\|")


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
