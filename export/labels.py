"""Names of classes, from a file."""

from pathlib import Path

from export.graph import ExportError


def read_labels(path: Path) -> tuple[str, ...]:
    """Class names, one per line. Raises ExportError for a file that is unreadable, empty or has an empty line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{path} cannot be read as labels, one per line in UTF-8 ({error})") from error
    labels = tuple(line.strip() for line in lines)
    if not any(labels):
        raise ExportError(f"{path} holds no labels: write one per line, in the order of the model's outputs")
    if "" in labels:
        raise ExportError(f"{path}: line {labels.index('') + 1} is empty: write one label per line")
    return labels
