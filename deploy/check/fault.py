"""What a check finds."""

from collections.abc import Iterable, Iterator
from typing import Any

import yaml

Document = dict[str, Any]


class Fault(Exception):
    """A check found something; the message is one line for each finding."""

    @classmethod
    def of(cls, findings: Iterable[str]) -> None:
        """Raise it if there are any findings."""
        if lines := list(findings):
            raise cls("\n".join(lines))


def documents(text: str) -> Iterator[Document]:
    """The documents of a YAML file with several."""
    return (document for document in yaml.safe_load_all(text) if document)


def title(document: Document) -> str:
    """How a message names a document."""
    return f"{document.get('kind')}/{document.get('metadata', {}).get('name')}"
