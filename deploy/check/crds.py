"""Checks custom resources against the schemas of their definitions, strictly: no unknown fields.

    python -m deploy.check.crds FILE...                  check manifests
    python -m deploy.check.crds --import DEFINITION...   write the schemas of definitions (YAML) to schemas/

Rules in CEL (`x-kubernetes-validations`) are not evaluated: only an API server does that.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from deploy.check.fault import Document, documents, title

FOLDER = Path(__file__).parent / "schemas"
_GROUPS_OF_KUBERNETES = ("", "apps", "autoscaling", "batch", "policy")

_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"},
        "namespace": {"type": "string"},
        "labels": _STRINGS,
        "annotations": _STRINGS,
    },
}


def is_custom(document: Document) -> bool:
    """Whether a manifest is of a kind that is not built into Kubernetes."""
    group = str(document["apiVersion"]).rpartition("/")[0]
    return group not in _GROUPS_OF_KUBERNETES and not group.endswith(".k8s.io")


def findings(manifests: Iterable[Document]) -> Iterator[str]:
    """What is wrong with custom resources; manifests of other kinds are left out."""
    for document in filter(is_custom, manifests):
        file = _file(str(document["apiVersion"]), str(document["kind"]))
        if not file.exists():
            yield f"{title(document)}: there is no schema of {document['apiVersion']} in {FOLDER.name}/"
            continue
        for error in _validator(file).iter_errors(document):
            place = ".".join(map(str, error.path))
            yield f"{title(document)}: {place or 'top level'}: {error.message[:200]}"


def _file(version: str, kind: str) -> Path:
    return FOLDER / f"{version.replace('/', '_')}_{kind}.json"


@cache
def _validator(file: Path) -> jsonschema.Draft202012Validator:
    schema = strict(json.loads(file.read_text(encoding="utf-8")))
    schema["properties"]["metadata"] = _METADATA
    for name in ("apiVersion", "kind"):
        schema["properties"][name] = {"type": "string"}
    schema["required"] = sorted({*schema.get("required", ()), "apiVersion", "kind", "metadata"})
    return jsonschema.Draft202012Validator(schema)


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema of Kubernetes as JSON Schema that refuses unknown fields, as `kubectl apply` does."""
    made = {key: value for key, value in schema.items() if not key.startswith("x-") and key != "nullable"}
    if "properties" in schema:
        made["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            made[key] = strict(schema[key])
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    if schema.get("nullable") and "type" in made:
        types = made["type"]
        made["type"] = [*(types if isinstance(types, list) else [types]), "null"]
    return made


_TEXT = {"description", "example", "title", "default", "x-kubernetes-validations"}


def _without_text(schema: dict[str, Any]) -> dict[str, Any]:
    """The part of a schema that validates; descriptions are nine tenths of a definition."""
    made = {key: value for key, value in schema.items() if key not in _TEXT}
    if "properties" in schema:
        made["properties"] = {name: _without_text(part) for name, part in schema["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            made[key] = _without_text(schema[key])
    return made


def take_over(definition: Document) -> Iterator[Path]:
    """Write the schema of each version of a CustomResourceDefinition."""
    spec = definition["spec"]
    for version in spec["versions"]:
        file = _file(f"{spec['group']}/{version['name']}", spec["names"]["kind"])
        schema = _without_text(version["schema"]["openAPIV3Schema"])
        file.write_text(json.dumps(schema, separators=(",", ":"), sort_keys=True) + "\n", encoding="utf-8")
        yield file


def main(arguments: list[str]) -> None:
    """Check files, or take definitions over; ends with 1 if anything is wrong."""
    taking, names = arguments[:1] == ["--import"], [name for name in arguments if name != "--import"]
    found = False
    for name in names:
        for document in documents(Path(name).read_text(encoding="utf-8")):
            if taking:
                print(*take_over(document), sep="\n")
            elif is_custom(document):
                lines = list(findings([document]))
                found = found or bool(lines)
                print("\n".join(lines) or f"{title(document)}: ok")
    sys.exit(found)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, yaml.YAMLError) as error:
        sys.exit(str(error))
