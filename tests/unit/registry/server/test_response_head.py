"""The head of a response, and which headers an application may send."""

from __future__ import annotations

import string

from registry.server.http1.response_head import check_response_headers

TOKEN_BYTES = {*b"!#$%&'*+-.^_`|~", *string.ascii_letters.encode(), *string.digits.encode()}
"""The bytes that the name of a header may have (RFC 9110, 5.6.2)."""
VALUE_BYTES = {*b"\t", *range(32, 127), *range(128, 256)}
"""The bytes that the value of a header may have (RFC 9110, 5.5)."""


def is_accepted(name: bytes, value: bytes) -> bool:
    try:
        check_response_headers([(b"content-length", b"0"), (name, value)])
    except RuntimeError:
        return False
    return True


def test_bytes_of_names_and_values() -> None:
    """The name of a header may have the bytes of a token, and its value all bytes except control characters."""
    for byte in range(256):
        assert is_accepted(b"x" + bytes([byte]), b"a") == (byte in TOKEN_BYTES), byte
        assert is_accepted(b"x", b"a" + bytes([byte])) == (byte in VALUE_BYTES), byte
