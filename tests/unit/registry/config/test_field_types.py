"""The types of the settings' fields."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from registry.config.field_types import split_commas, split_http_url
from registry.config.settings_sources import ConfigError, load_settings


@pytest.mark.parametrize(
    ("value", "parts"), [("a, b,,c ", ["a", "b", "c"]), ("", []), (["a,b"], ["a,b"]), (None, None), (3, 3)]
)
def test_text_is_split_at_commas(value: object, parts: object) -> None:
    """Text is split at commas. Values of other types are passed on unchanged, so that the model can check them."""
    assert split_commas(value) == parts


@pytest.mark.parametrize(
    "value", ["ftp://a", "a", "http://", "http://a:0", "http://a:x", "http://a:70000", "http://[a"]
)
def test_an_invalid_address_is_refused(value: str) -> None:
    """The error repeats the value and shows an example of a valid address."""
    with pytest.raises(ValueError, match=rf"^{re.escape(repr(value))} is not an address like https://example\.com$"):
        split_http_url(value, "https://example.com")


def test_queries_and_fragments() -> None:
    """A URL may have a query and a fragment, unless the caller forbids them."""
    parts = split_http_url("https://a:8443/b?c#d", "https://example.com")
    assert (parts.hostname, parts.port, parts.path, parts.query, parts.fragment) == ("a", 8443, "/b", "c", "d")
    with pytest.raises(ValueError, match=r"'https://a\?c' is not an address"):
        split_http_url("https://a?c", "https://example.com", allow_query=False)
    with pytest.raises(ValueError, match="'https://a#d' is not an address"):
        split_http_url("https://a#d", "https://example.com", allow_fragment=False)


@pytest.mark.parametrize("duration", ["1000001d", "9999999d", "9" * 400 + "d"])
@pytest.mark.parametrize("name", ["gc.grace", "auth.refresh_ttl", "events.keep"])
def test_a_duration_is_bounded(tmp_path: Path, name: str, duration: str) -> None:
    """A duration has at most a million days. With a longer one, the end of the duration could have no date."""
    group, _, key = name.partition(".")
    file = tmp_path / "entrepot.toml"
    file.write_text(f'[{group}]\n{key} = "1000000d"\n')
    load_settings({}, file)
    file.write_text(f'[{group}]\n{key} = "{duration}"\n')
    with pytest.raises(ConfigError, match=key):
        load_settings({}, file)


@pytest.mark.parametrize("host", ["registry.例子.com", "registry.exa mple.com", 'registry".example.com', "a\\b", "a,b"])
@pytest.mark.slow
def test_the_public_host_is_ascii(tmp_path: Path, host: str) -> None:
    """The host of `public_url` has only characters that a URL can have, so an internationalized name needs its ASCII
    form."""
    file = tmp_path / "entrepot.toml"
    file.write_text(f"public_url = 'https://{host}'\n")
    with pytest.raises(ConfigError, match="public_url") as error:
        load_settings({}, file)
    assert "xn--" in str(error.value) or "is not an address" in str(error.value)
    for valid in ("registry.xn--fsqu00a.com:5000", "127.0.0.1", "[::1]:5000", "my_host", "host:"):
        file.write_text(f'public_url = "https://{valid}"\n')
        assert load_settings({}, file).settings.public_url == f"https://{valid}".removesuffix(":")
