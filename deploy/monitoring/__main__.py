"""Write dashboard.json, rules.yaml and the tables of docs/monitoring.md, if they are not what the code makes."""

from pathlib import Path

from deploy.monitoring.dashboard import dashboard
from deploy.monitoring.page import page
from deploy.monitoring.rules import rules

ROOT = Path(__file__).parents[2]


def written() -> dict[Path, str]:
    """Each file that is made from the code, and what it must contain."""
    docs = ROOT / "docs" / "monitoring.md"
    made = {"dashboard.json": dashboard(), "rules.yaml": rules()}
    # The chart can only read files of its own folder.
    folders = (ROOT / "deploy" / "monitoring", ROOT / "deploy" / "helm" / "stridevit" / "files")
    return {
        **{folder / name: text for folder in folders for name, text in made.items()},
        docs: page(docs.read_text(encoding="utf-8")),
    }


def stale(files: dict[Path, str]) -> list[Path]:
    """Those that do not contain what they must."""
    return [file for file, text in files.items() if not file.exists() or file.read_text(encoding="utf-8") != text]


def main() -> None:
    """Write the files that are not what the code makes."""
    files = written()
    for file in stale(files):
        print(f"{file.relative_to(ROOT)}: written")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(files[file], encoding="utf-8")


if __name__ == "__main__":
    main()
