"""Whoever watches a client is told once that it has left."""

from service.http.client import Client


def test_the_watcher_is_told_when_the_client_leaves() -> None:
    client, left = Client(), list[str]()
    with client.watched(lambda: left.append("left")):
        assert left == []
        client.leave()
        client.leave()
    assert left == ["left"]


def test_the_watcher_is_told_at_once_if_the_client_has_left_before() -> None:
    client, left = Client(), list[str]()
    client.leave()
    with client.watched(lambda: left.append("left")):
        assert left == ["left"]


def test_the_watcher_is_not_told_after_the_block() -> None:
    client, left = Client(), list[str]()
    with client.watched(lambda: left.append("left")):
        pass
    client.leave()
    assert left == []
