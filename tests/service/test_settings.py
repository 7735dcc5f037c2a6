"""Settings from the environment and from arguments."""

from pathlib import Path

import pytest

from service.settings import Settings


def test_the_environment_sets_what_arguments_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRIDEVIT_PORT", "9000")
    monkeypatch.setenv("STRIDEVIT_MODELS", "a, b,")
    monkeypatch.setenv("STRIDEVIT_REPOSITORY", "/models")
    settings = Settings(port=9001)
    assert (settings.port, settings.models, settings.repository) == (9001, ("a", "b"), Path("/models"))


@pytest.mark.parametrize(("name", "value"), [("PORT", "-1"), ("MAX_BATCH", "0"), ("MAX_PIXELS", "many")])
def test_a_value_out_of_range_is_an_error(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"STRIDEVIT_{name}", value)
    with pytest.raises(ValueError, match=name.lower()):
        Settings()


def test_a_limit_that_no_request_could_meet_is_an_error() -> None:
    with pytest.raises(ValueError, match="could never be admitted"):
        Settings(max_images=3, max_pending=2)
