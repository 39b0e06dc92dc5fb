"""The types of the settings' fields."""

from __future__ import annotations

import re

import pytest

from registry.config.field_types import split_commas, split_http_url


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
