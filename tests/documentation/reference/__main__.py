"""`make reference`: write what is generated in docs/, pages and pictures; `stridevit settings` prints settings.md."""

from tests.documentation.figures import PICTURES
from tests.documentation.reference.pages import PAGES
from tests.processes import ROOT


def main() -> None:
    """Write pages and pictures."""
    for name, draw in PICTURES.items():
        (ROOT / "docs" / "pictures" / name).write_text(draw(), encoding="utf-8")
    for name, make in PAGES.items():
        (ROOT / "docs" / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
