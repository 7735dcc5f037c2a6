"""What the service documents, the client can read: every member, with every type that it may have."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
from pydantic import BaseModel, TypeAdapter

from service import comparison
from service.http import problems, v1_schemas
from service.manifest import AccuracySummary
from service.models import family
from stridevit import answers


class Pair(NamedTuple):
    """A class of the client's and what the service documents for it, with all differences that are allowed."""

    client: type[BaseModel]
    service: Any
    unread: frozenset[str] = frozenset()
    """Members that the client leaves out: they repeat `code`, what the caller has asked for, or what the class says."""
    unsent: frozenset[str] = frozenset()
    """Members that are not from here: the client puts them together, or another event has them."""


PAIRS = [
    Pair(answers.Problem, problems.Problem, unread=frozenset({"type", "title"})),
    Pair(answers.Prediction, v1_schemas.Prediction),
    Pair(answers.ImageResult, v1_schemas.ImageResult),
    Pair(answers.Skipped, family.Skipped),
    Pair(answers.Choice, family.Choice),
    Pair(answers.Classification, v1_schemas.Classification, unread=frozenset({"requested"})),
    Pair(answers.Accuracy, AccuracySummary),
    Pair(answers.Model, v1_schemas.ModelSummary),
    Pair(answers.Models, v1_schemas.ModelList),
    Pair(answers.Picture, v1_schemas.PictureEvent, unread=frozenset({"event"})),
    Pair(answers.ModelAnswer, v1_schemas.AnswerEvent, unread=frozenset({"event"}), unsent=frozenset({"problem"})),
    Pair(
        answers.ModelAnswer,
        v1_schemas.ErrorEvent,
        unread=frozenset({"event"}),
        unsent=frozenset({"version", "predictions", "timings_ms"}),
    ),
    Pair(answers.Agreement, comparison.Agreement),
    Pair(
        answers.Comparison,
        v1_schemas.EndEvent,
        unread=frozenset({"event"}),
        unsent=frozenset({"pictures", "answers"}),
    ),
]
_NAMES = {pair.service.__name__: pair.client.__name__ for pair in PAIRS}
"""The client's names of the service's classes."""


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.client.__name__}-{pair.service.__name__}")
def test_the_client_reads_what_the_service_documents(pair: Pair) -> None:
    ours, theirs = members(pair.client), members(pair.service)
    assert pair.unsent <= ours.keys()
    assert pair.unread <= theirs.keys()
    assert ours.keys() - pair.unsent == theirs.keys() - pair.unread
    for name in ours.keys() - pair.unsent:
        assert theirs[name] <= ours[name], name
    assert required(pair.client) - pair.unsent <= required(pair.service)


def members(schema: Any) -> dict[str, set[str]]:
    """The JSON types that each member may have."""
    document = TypeAdapter(schema).json_schema(mode="serialization")
    return {name: kinds(member, document) for name, member in document["properties"].items()}


def required(schema: Any) -> set[str]:
    """The members without a default: others are missing, rather than null, in some answers."""
    return set(TypeAdapter(schema).json_schema(mode="validation").get("required", ()))


def kinds(member: Mapping[str, Any], document: Mapping[str, Any]) -> set[str]:
    """The JSON types that a schema allows, such as `null` and `array[Prediction]`; classes by the client's names."""
    if reference := member.get("$ref"):
        name = reference.rpartition("/")[2]
        found = document["$defs"][name]
        return {_NAMES.get(name, name)} if "properties" in found else kinds(found, document)
    if alternatives := member.get("anyOf"):
        return set().union(*(kinds(alternative, document) for alternative in alternatives))
    match member["type"]:
        case "array":
            return {f"array[{kind}]" for kind in kinds(member["items"], document)}
        case "object":
            return {f"object[{kind}]" for kind in kinds(member["additionalProperties"], document)}
        case "number":
            return {"number", "integer"}
        case str(name):
            return {name}
    raise AssertionError(f"the type of {member} is not a name")
