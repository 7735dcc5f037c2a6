"""The generated pages by their names in docs/."""

from collections.abc import Callable
from typing import Final

from tests.documentation.reference.cli import cli_page
from tests.documentation.reference.formats import manifest_page, results_page
from tests.documentation.reference.http import http_page, metrics_page

PAGES: Final[dict[str, Callable[[], str]]] = {
    "http.md": http_page,
    "cli.md": cli_page,
    "manifest.md": manifest_page,
    "results-json.md": results_page,
    "metrics.md": metrics_page,
}
