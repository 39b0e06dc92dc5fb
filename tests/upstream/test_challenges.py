"""`WWW-Authenticate` is read as RFC 9110 writes it, and as registries do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.upstream.challenges import Challenge, choose, parse_challenges

HUB = 'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push"'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        (",, ,", []),
        ("Basic", [("basic", {})]),
        ('Basic realm="x"', [("basic", {"realm": "x"})]),
        ("BEARER Realm=abc", [("bearer", {"realm": "abc"})]),
        (
            HUB,
            [
                (
                    "bearer",
                    {
                        "realm": "https://auth.docker.io/token",
                        "service": "registry.docker.io",
                        "scope": "repository:a/b:pull,push",
                    },
                )
            ],
        ),
        (
            'Basic realm="a, Bearer realm=\\"b\\"", Bearer realm = "c" , error="x"',
            [("basic", {"realm": 'a, Bearer realm="b"'}), ("bearer", {"realm": "c", "error": "x"})],
        ),
        ("Negotiate, Basic realm=x", [("negotiate", {}), ("basic", {"realm": "x"})]),
        ("Negotiate a8742100==, Bearer realm=x", [("negotiate", {}), ("bearer", {"realm": "x"})]),
        ('Bearer realm="unclosed', [("bearer", {})]),
        ('Bearer realm="a",realm="b"', [("bearer", {"realm": "a"})]),
    ],
)
def test_challenges(text: str, found: list[tuple[str, dict[str, str]]]) -> None:
    """Schemes, parameters with and without quotes, several in one field."""
    assert [(each.scheme, dict(each.parameters)) for each in parse_challenges(text)] == found


@given(st.text(max_size=200))
def test_any_text_is_read(text: str) -> None:
    """Nothing an upstream writes breaks the reading or keeps it busy."""
    parse_challenges(text)


def test_bearer_is_chosen() -> None:
    """Before Basic; Basic only where there is a password; Bearer without a realm is none."""
    basic, bearer = Challenge("basic"), Challenge("bearer", {"realm": "x"})
    assert choose([basic, bearer], True) is bearer
    assert choose([basic], True) is basic
    assert choose([basic], False) is None
    assert choose([Challenge("bearer"), basic], True) is basic
