"""Whoever watches a client learns once that it has left."""

from service.http.client import Client


def test_it_is_said_when_the_client_leaves() -> None:
    client, left = Client(), list[str]()
    with client.watched(lambda: left.append("left")):
        assert left == []
        client.leave()
    assert left == ["left"]


def test_it_is_said_at_once_if_the_client_has_left_before() -> None:
    client, left = Client(), list[str]()
    client.leave()
    with client.watched(lambda: left.append("left")):
        assert left == ["left"]


def test_it_is_not_said_after_the_block() -> None:
    client, left = Client(), list[str]()
    with client.watched(lambda: left.append("left")):
        pass
    client.leave()
    assert left == []
