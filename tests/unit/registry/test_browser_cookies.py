"""Tests of the function that reads a cookie from the headers of a request."""

from __future__ import annotations

import pytest

from registry.admin.cookies import cookie_value


def value_in(*headers: str) -> str:
    """Returns the value of the cookie `a` in a request with these Cookie headers."""
    return cookie_value({"headers": [(b"host", b"x"), *((b"cookie", text.encode("latin-1")) for text in headers)]}, "a")


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("a=1", "1"),
        ("b=2; a=1;c=3", "1"),
        (" a = 1 ", "1"),
        ("a=1=2", "1=2"),
        ('a="1"', "1"),
        ('a=""', ""),
        ('a="', '"'),
        ("a", ""),
        ("aa=1; ba=2", ""),
        (";;=;a=1;", "1"),
        ("a=1; a=2", "2"),
        ("", ""),
        ("a=\xff", "\xff"),
    ],
)
def test_cookie_value(header: str, value: str) -> None:
    """The value of a cookie is the text after the first `=`, without spaces and quotes around it. The last cookie of a
    name counts."""
    assert value_in(header) == value


def test_cookie_in_one_of_several_headers() -> None:
    """A cookie is found in any of several Cookie headers, as HTTP/2 proxies send them."""
    assert value_in("b=1", "a=2", "c=3") == "2"
    assert value_in() == ""


def test_escapes_in_a_cookie_are_not_resolved() -> None:
    """Backslashes in a cookie are ordinary characters. The standard library resolves such escapes in quadratic time."""
    escapes = "\\\\" * 15_000
    assert value_in(f'a="{escapes}"') == escapes
