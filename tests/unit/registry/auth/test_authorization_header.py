"""The parser of the Authorization header."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.auth.authorization_header import Basic, Bearer, parse_authorization
from storage.errors import Unauthorized


def encoded(text: str | bytes) -> bytes:
    return base64.b64encode(text.encode() if isinstance(text, str) else text)


def test_a_request_without_the_header_has_no_credential() -> None:
    """A request without the Authorization header has no credential. This is not an error."""
    assert parse_authorization([]) is None


@pytest.mark.parametrize(
    ("value", "credential"),
    [
        (b"Basic " + encoded("alice:secret"), Basic("alice", "secret")),
        (b"basic " + encoded("alice:se:cr:et:"), Basic("alice", "se:cr:et:")),
        (b"BASIC   " + encoded("älice:ключ 🔑"), Basic("älice", "ключ 🔑")),
        (b"Basic " + encoded(":"), Basic("", "")),
        (b"Bearer a.b-c_d~e+f/g==", Bearer("a.b-c_d~e+f/g==")),
        (b"bearer  x ", Bearer("x")),
    ],
)
def test_valid_headers_are_parsed(value: bytes, credential: Basic | Bearer) -> None:
    """The case of the scheme does not matter. A password may contain colons, spaces and any letters. `repr` shows
    neither the password nor the token, so that they get into no log."""
    parsed = parse_authorization([value])
    assert parsed == credential
    assert repr(parsed) == (f"Basic(user={credential.user!r})" if isinstance(credential, Basic) else "Bearer()")


@pytest.mark.parametrize(
    "values",
    [
        [b""],
        [b"Basic"],
        [b"Basic "],
        [b"Basic !!!"],
        [b"Basic " + encoded("no colon")],
        [b"Basic " + encoded(b"alice:\xff\xfe")],
        [b"Basic " + encoded("alice:pass\x00word")],
        [b"Basic " + encoded("al\nice:password")],
        [b"Basic " + encoded("alice:password").rstrip(b"=") + b"\xe9"],
        [b"Basic " + encoded("a:b") + b" " + encoded("c:d")],
        [b"Bearer"],
        [b"Bearer a b"],
        [b"Bearer \xe9"],
        [b"Bearer a,b"],
        [b"Digest username=alice"],
        [b"Bearer a", b"Bearer a"],
        [b"Bearer " + b"a" * 40_000],
    ],
)
def test_a_malformed_header_is_refused(values: list[bytes]) -> None:
    """A malformed header is refused with the same text as a wrong password."""
    with pytest.raises(Unauthorized) as error:
        parse_authorization(values)
    assert error.value.message == "the credentials are not valid"


@given(st.lists(st.binary(max_size=60) | st.binary(max_size=40).map(lambda raw: b"Basic " + encoded(raw)), max_size=2))
def test_any_bytes_are_parsed_or_refused(values: list[bytes]) -> None:
    """For any bytes, the parser returns a credential or None, or raises Unauthorized."""
    try:
        credential = parse_authorization(values)
    except Unauthorized:
        return
    assert credential is None or isinstance(credential, Basic | Bearer)
