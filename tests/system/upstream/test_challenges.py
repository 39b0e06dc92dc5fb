"""Tests of the parser for `WWW-Authenticate`, the header with which a registry states how to log in (RFC 9110)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.upstream.challenges import LoginChallenge, choose_challenge, parse_challenges
from tests.fakes.instruction_count import count_instructions

DOCKER_HUB_HEADER = (
    'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push"'
)


@pytest.mark.parametrize(
    ("text", "challenges"),
    [
        ("", []),
        (",, ,", []),
        ("Basic", [("basic", {})]),
        ('Basic realm="x"', [("basic", {"realm": "x"})]),
        ("BEARER Realm=abc", [("bearer", {"realm": "abc"})]),
        (
            DOCKER_HUB_HEADER,
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
def test_challenges(text: str, challenges: list[tuple[str, dict[str, str]]]) -> None:
    """The parser accepts parameters with and without quotes, and several challenges in one header. It ignores invalid
    parts."""
    assert [(each.scheme, dict(each.parameters)) for each in parse_challenges(text)] == challenges


@given(st.text(max_size=200))
def test_parser_accepts_any_text(text: str) -> None:
    """The parser raises no exception, whatever text an upstream sends."""
    parse_challenges(text)


# Headers WWW-Authenticate of 90 KB or more.
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
def test_too_long_header_is_ignored(field: str) -> None:
    """A header of more than 16 KiB is ignored. Parsing 95 KB would block the event loop for 200 ms."""
    assert parse_challenges(LONG_FIELDS[field]) == []


@pytest.mark.parametrize("field", LONG_FIELDS)
def test_header_of_maximum_length_is_parsed_quickly(field: str) -> None:
    """The parser needs few instructions for a header of 16 KiB, because it stops after 16 challenges."""
    with count_instructions() as count:
        assert len(parse_challenges(LONG_FIELDS[field][: 16 << 10])) <= 16
    assert count.total < 1_000_000


def test_bearer_is_chosen() -> None:
    """The client prefers Bearer to Basic. It chooses Basic only if it has a password, and ignores Bearer without a
    realm."""
    basic, bearer = LoginChallenge("basic"), LoginChallenge("bearer", {"realm": "x"})
    assert choose_challenge([basic, bearer], True) is bearer
    assert choose_challenge([basic], True) is basic
    assert choose_challenge([basic], False) is None
    assert choose_challenge([LoginChallenge("bearer"), basic], True) is basic
