"""`WWW-Authenticate` is parsed as RFC 9110 defines it, and as registries write it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.upstream.challenges import LoginChallenge, choose_challenge, parse_challenges
from tests.fakes.instruction_count import count_instructions

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
    """Schemes, parameters with and without quotes, and several challenges in one field are parsed."""
    assert [(each.scheme, dict(each.parameters)) for each in parse_challenges(text)] == found


@given(st.text(max_size=200))
def test_any_text_is_read(text: str) -> None:
    """No text of an upstream breaks the parser or keeps it busy."""
    parse_challenges(text)


LONG_FIELDS = {
    "parameters": 'Bearer realm="x"' + ',a="b"' * 16000,
    "challenges": "Basic," * 16000,
    "escapes": 'Bearer realm="' + '\\\\"' * 30000,
    "no end": "Bearer " + 'a="' * 30000,
    "token": "a" * 95000,
    "token68": "Basic " + "a" * 95000 + "==x",
    "spaces": "Basic" + " " * 95000 + "!",
}


@pytest.mark.parametrize("field", LONG_FIELDS)
def test_a_long_field_is_not_read(field: str) -> None:
    """A field above 16 KiB names no challenge: parsing 95 KB took 200 ms of the event loop."""
    assert parse_challenges(LONG_FIELDS[field]) == []


@pytest.mark.parametrize("field", LONG_FIELDS)
def test_a_field_of_the_greatest_length(field: str) -> None:
    """A field of the greatest length is parsed quickly, up to 16 challenges."""
    with count_instructions() as count:
        assert len(parse_challenges(LONG_FIELDS[field][: 16 << 10])) <= 16
    assert count.total < 1_000_000


def test_bearer_is_chosen() -> None:
    """Bearer is chosen before Basic; Basic only with a password; Bearer without a realm is ignored."""
    basic, bearer = LoginChallenge("basic"), LoginChallenge("bearer", {"realm": "x"})
    assert choose_challenge([basic, bearer], True) is bearer
    assert choose_challenge([basic], True) is basic
    assert choose_challenge([basic], False) is None
    assert choose_challenge([LoginChallenge("bearer"), basic], True) is basic
