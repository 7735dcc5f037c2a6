"""The client's answers have the members that the service documents, and of the same types."""

from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter

from service import comparison
from service.http import problems, v1_schemas
from service.manifest import AccuracySummary
from service.models import family
from stridevit import answers

UNUSED: Mapping[type[BaseModel], set[str]] = {
    answers.Problem: {"type", "title", "instance"},
    answers.Classification: {"requested"},
}
"""What the client leaves out: it repeats `code`, or what the caller has asked for."""

PAIRS = [
    (answers.Problem, problems.Problem),
    (answers.Prediction, v1_schemas.Prediction),
    (answers.ImageResult, v1_schemas.ImageResult),
    (answers.Skipped, family.Skipped),
    (answers.Choice, family.Choice),
    (answers.Classification, v1_schemas.Classification),
    (answers.Accuracy, AccuracySummary),
    (answers.Model, v1_schemas.ModelSummary),
    (answers.Models, v1_schemas.ModelList),
    (answers.Agreement, comparison.Agreement),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_members_and_their_types_are_those_of_the_service(ours: type[BaseModel], theirs: Any) -> None:
    assert members(ours) == {
        name: kind for name, kind in members(theirs).items() if name not in UNUSED.get(ours, set())
    }


def members(schema: Any) -> dict[str, set[str]]:
    """The JSON types of each member, without null: in which cases a member is missing is said in words."""
    document = TypeAdapter(schema).json_schema(mode="serialization")
    return {name: kinds(member, document) - {"null"} for name, member in document["properties"].items()}


def kinds(member: Mapping[str, Any], document: Mapping[str, Any]) -> set[str]:
    """The JSON types that a schema allows, references followed."""
    if reference := member.get("$ref"):
        return kinds(document["$defs"][reference.rpartition("/")[2]], document)
    if alternatives := member.get("anyOf"):
        return set().union(*(kinds(alternative, document) for alternative in alternatives))
    return {member["type"]}
