"""Settings from arguments, the environment and a file."""

import tomllib
from pathlib import Path

import pytest

from service.settings import ENV_PREFIX, GROUPS, Settings

HASH = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(ENV_PREFIX + name.upper(), raising=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Where a test may write its settings."""
    return tmp_path / "settings.toml"


def test_the_environment_sets_what_arguments_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRIDEVIT_PORT", "9000")
    monkeypatch.setenv("STRIDEVIT_MODELS", "a, b,")
    monkeypatch.setenv("STRIDEVIT_REPOSITORY", "/models")
    settings = Settings(port=9001)
    assert (settings.port, settings.models, settings.repository) == (9001, ("a", "b"), Path("/models"))


@pytest.mark.parametrize("named_in", ["argument", "environment"])
def test_arguments_override_the_environment_which_overrides_the_file_and_defaults(
    named_in: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (
        "max_batch = 2",
        "max_images_per_request = 2",
        "max_pending_images = 2",
        'models = ["a", "b"]',
        "tf32 = true",
    )
    config.write_text("\n".join(lines))
    monkeypatch.setenv("STRIDEVIT_MAX_BATCH", "3")
    monkeypatch.setenv("STRIDEVIT_MAX_IMAGES_PER_REQUEST", "1")
    if named_in == "environment":
        monkeypatch.setenv("STRIDEVIT_CONFIG", str(config))
        settings = Settings(max_batch=4)
    else:
        settings = Settings(max_batch=4, config=config)
    assert (settings.max_batch, settings.max_images_per_request, settings.max_pending_images) == (4, 1, 2)
    assert (settings.models, settings.tf32, settings.versions_to_serve) == (("a", "b"), True, 1)


def test_an_argument_resets_the_file_that_the_environment_names(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text("port = 1\n")
    monkeypatch.setenv("STRIDEVIT_CONFIG", str(config))
    assert Settings(config=None).port == Settings.model_fields["port"].default


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.setenv(ENV_PREFIX + name.upper(), "")
    assert Settings() == Settings.model_construct()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "-1"),
        ("max_batch", "0"),
        ("max_pixels", "many"),
        ("poll_seconds", "-1"),
        ("body_timeout_seconds", "inf"),
        ("versions_to_serve", "0"),
        ("deadline_margin", "0"),
        ("step_up_headroom", "1.1"),
        ("log_level", "loud"),
        ("log_requests", "some"),
        ("otlp_endpoint", "collector:4318"),
        ("api_key_hashes", HASH + ",abc"),
        ("admin_key_hash", HASH[:-1]),
        ("trusted_proxies", "proxy.example.com"),
        ("trusted_proxies", "10.0.0.1/8"),
        ("cors_origins", "example.com"),
        ("cors_origins", "https://example.com/"),
    ],
)
def test_an_invalid_value_is_an_error(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"STRIDEVIT_{name.upper()}", value)
    with pytest.raises(ValueError, match=name):
        Settings()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_images_per_request": 3, "max_pending_images": 2}, "could never be admitted"),
        ({"max_body_bytes": 3, "max_pending_bytes": 2}, "could never be admitted"),
        ({"max_images_per_request": 76, "max_pending_images": 100}, "the 75 of max_pending_images"),
        ({"max_body_bytes": 80 << 20, "max_pending_bytes": 100 << 20}, "that large_bodies_fraction .0.75. leaves"),
        ({"default_deadline_ms": 3, "max_deadline_ms": 2}, "default_deadline_ms .3. exceeds max_deadline_ms"),
    ],
)
def test_limits_that_contradict_each_other_are_an_error(limits: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.model_validate(limits)


def test_addresses_networks_and_origins_are_taken_as_they_are() -> None:
    settings = Settings.model_validate(
        {"trusted_proxies": "10.0.0.0/8,::1,*", "cors_origins": "*,https://example.com,http://localhost:3000"}
    )
    assert settings.trusted_proxies == ("10.0.0.0/8", "::1", "*")
    assert settings.cors_origins == ("*", "https://example.com", "http://localhost:3000")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_bacth = 1", r"settings\.toml: unknown setting 'max_bacth': did you mean 'max_batch'\?"),
        ("max-batch = 1", "unknown setting 'max-batch': did you mean 'max_batch'"),
        ("config = 'other.toml'", "unknown setting 'config'"),
        ("[network]\nport = 1", r"unknown table \[network\]"),
        ("port =", r"settings\.toml is not TOML"),
    ],
)
def test_a_file_with_anything_but_settings_is_an_error_that_names_it(text: str, message: str, config: Path) -> None:
    config.write_text(text)
    with pytest.raises(ValueError, match=message):
        Settings(config=config)


def test_a_missing_file_is_an_error(config: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the settings file .*settings\.toml"):
        Settings(config=config)


def test_an_unknown_argument_is_an_error() -> None:
    with pytest.raises(ValueError, match="max_bacth"):
        Settings.model_validate({"max_bacth": 1})


def test_settings_are_frozen() -> None:
    settings = Settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1  # type: ignore[misc]


def test_hashes_are_read_in_either_case() -> None:
    assert Settings(admin_key_hash=HASH.upper()).admin_key_hash == HASH


def test_hashes_appear_neither_in_the_settings_nor_in_an_error(config: Path) -> None:
    settings = Settings(api_key_hashes=(HASH,), admin_key_hash=HASH)
    assert HASH not in repr(settings) + str(settings)
    wrong = "my-secret-key"
    config.write_text(f'port = -1\nadmin_key_hash = "{HASH}"\napi_key_hashes = ["{HASH}", "{wrong}"]\n')
    with pytest.raises(ValueError, match="api_key_hashes") as raised:
        Settings(config=config)
    assert HASH not in str(raised.value)
    assert wrong not in str(raised.value)


def test_every_setting_is_described_with_its_unit() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description[0].isupper() or field.description[0] == "`", name
        assert field.description.endswith("."), name
        for ending, unit in (("_ms", "milliseconds"), ("_seconds", "seconds"), ("_bytes", "bytes"), ("_pixels", "pix")):
            if name.endswith(ending):
                assert unit in field.description.lower(), name


def test_the_groups_begin_with_settings_in_the_order_of_their_declaration() -> None:
    assert [name for name in Settings.model_fields if name in GROUPS] == list(GROUPS)
    assert next(iter(GROUPS)) == next(iter(Settings.model_fields))


def test_all_defaults_can_be_written_into_a_file(config: Path) -> None:
    lines = []
    for name, field in Settings.model_fields.items():
        value = list(field.default) if isinstance(field.default, tuple) else field.default
        if value is not None:
            lines.append(
                f"{name} = {str(value).lower() if isinstance(value, bool | int | float) else repr(str(value))}"
            )
    lines = [line.replace("'[]'", "[]") for line in lines]
    assert tomllib.loads("\n".join(lines))
    config.write_text("\n".join(lines))
    assert Settings(config=config) == Settings().model_copy(update={"config": config})
