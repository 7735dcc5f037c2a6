"""Write dashboard.json, rules.yaml and the tables of docs/monitoring.md, or compare them with the code (`--check`)."""

import sys
from pathlib import Path

from deploy.monitoring.dashboard import dashboard
from deploy.monitoring.page import page
from deploy.monitoring.rules import rules

ROOT = Path(__file__).parents[2]


def written() -> dict[Path, str]:
    """Each file that is made from the code, and what it must hold."""
    docs = ROOT / "docs" / "monitoring.md"
    made = rules()
    return {
        ROOT / "deploy" / "monitoring" / "dashboard.json": dashboard(),
        ROOT / "deploy" / "monitoring" / "rules.yaml": made,
        # The chart can only read files of its own folder.
        ROOT / "deploy" / "helm" / "stridevit" / "files" / "rules.yaml": made,
        docs: page(docs.read_text(encoding="utf-8")),
    }


def main(*, check: bool) -> None:
    """Write the files, or end with 1 if one of them is not what the code makes."""
    stale = {
        file: text for file, text in written().items() if not file.exists() or file.read_text(encoding="utf-8") != text
    }
    for file, text in stale.items():
        print(f"{file.relative_to(ROOT)}: {'differs from the code: make monitoring' if check else 'written'}")
        if not check:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    if check and stale:
        sys.exit(1)
    print("dashboard, rules and docs/monitoring.md are as the code makes them")


if __name__ == "__main__":
    main(check=sys.argv[1:] == ["--check"])
