"""Addresses of repositories, and what must not be one."""

import pytest
from pydantic import ValidationError

from service.remote.address import is_address, parse_address
from service.settings import Settings


@pytest.mark.parametrize(
    ("text", "scheme", "place", "path"),
    [
        ("s3://bucket", "s3", "bucket", ""),
        ("s3://my.bucket-1/some/models/", "s3", "my.bucket-1", "some/models"),
        ("gs://bucket/models", "gs", "bucket", "models"),
        ("HTTPS://models.example.com:8443/a b/models", "https", "models.example.com:8443", "a b/models"),
        ("https://[2001:db8::1]/models", "https", "[2001:db8::1]", "models"),
        ("http://127.0.0.1:9000", "http", "127.0.0.1:9000", ""),
        ("http://localhost/models", "http", "localhost", "models"),
        ("http://[::1]:80/models", "http", "[::1]:80", "models"),
    ],
)
def test_addresses(text: str, scheme: str, place: str, path: str) -> None:
    address = parse_address(text)
    assert (address.scheme, address.place, address.path) == (scheme, place, path)
    assert is_address(text)
    assert "/" not in address.folder_name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ftp://host/models", r"unknown kind of repository ftp://: use a folder, s3://, gs:// or https://"),
        ("file:///etc", "unknown kind of repository file://"),
        ("http://example.com/models", "http:// would let anybody"),
        ("http://localhost.example.com/models", "http:// would let anybody"),
        ("s3://", "names no bucket or host"),
        ("https:///models", "names no bucket or host"),
        ("s3://key:sesame@bucket/models", "takes its credentials from the environment"),
        ("s3://bucket:9000/models", "AWS_ENDPOINT_URL"),
        ("https://host/models?token=sesame", r"must not contain \?"),
        ("https://host/models#sesame", r"must not contain \?"),
        ("https://host/../models", "an odd character"),
        ("https://host/a//b", "an odd character"),
        ("https://host/%2e%2e/models", "an odd character"),
        ("https://sesame:x@ho st/", "names no bucket or host"),
    ],
)
def test_what_is_no_address_is_said_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_address(text)
    assert "\n" not in str(caught.value)
    assert "sesame" not in str(caught.value)
    with pytest.raises(ValidationError) as refused:
        Settings(repository=text)
    assert "sesame" not in str(refused.value)


def test_credentials_are_in_no_text_of_an_address() -> None:
    address = parse_address("https://me:open%20sesame@host/models")
    assert (address.user, address.password) == ("me", "open sesame")
    assert str(address) == "https://***@host/models"
    settings = Settings(repository=address)
    assert "sesame" not in str(address) + repr(address) + address.url + address.folder_name + repr(settings)


def test_credentials_do_not_change_the_folder_in_the_cache() -> None:
    plain, other = parse_address("https://host/models"), parse_address("https://me:x@host/models")
    assert plain.folder_name == other.folder_name
    assert plain.folder_name != parse_address("https://host/models2").folder_name


@pytest.mark.parametrize("text", ["models", "/srv/models", "./s3:/x", "s3:/bucket"])
def test_a_path_is_no_address(text: str) -> None:
    assert not is_address(text)
    assert str(Settings(repository=text).repository) == text.removeprefix("./")
