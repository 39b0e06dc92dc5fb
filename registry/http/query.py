"""Parses the query string of a request, and refuses input that another parser could read differently.

Sources: RFC 3986, 2.1 (percent-encoding); the `application/x-www-form-urlencoded` format for '+' and '&'.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote_to_bytes

from registry.request import RequestInvalid
from storage.names import shown

MAX_PARAMETERS: Final = 1000
"""Largest number of parameters in a query. Clients send up to a hundred. Parsing ten thousand parameters would block
the event loop for 30 ms."""
MAX_NUMBER: Final = 10**18 - 1
"""Largest number that a client can send, such as an id, a position or an amount. SQLite can store it: the limit of
SQLite is 2^63 - 1."""
_MAX_NUMBER_DIGITS: Final = 18
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


def percent_decode(raw: bytes, what: str) -> str:
    """Returns `raw` percent-decoded. `what` is the name of the text in error messages, such as "the path". Raises
    RequestInvalid for a '%' without two hex digits, bytes that are not UTF-8, and a NUL character."""
    if _BAD_ESCAPE.search(raw):
        raise RequestInvalid(f"{what} has a '%' that is not followed by two hex digits")
    try:
        text = unquote_to_bytes(raw).decode("utf-8")
    except UnicodeDecodeError:
        raise RequestInvalid(f"{what} is not UTF-8") from None
    if "\0" in text:
        raise RequestInvalid(f"{what} contains a NUL character")
    return text


def parse_number(text: str, problem: str) -> int:
    """Returns the number that `text` states in ASCII digits. If `text` is anything else, or has more digits than
    `MAX_NUMBER`, raises RequestInvalid with the message `problem`."""
    if not text.isascii() or not text.isdigit() or len(text) > _MAX_NUMBER_DIGITS:
        raise RequestInvalid(problem)
    return int(text)


def check_parameter_count(raw: bytes) -> None:
    """Raises RequestInvalid for a query string with more than `MAX_PARAMETERS` parameters."""
    if raw.count(b"&") >= MAX_PARAMETERS:
        raise RequestInvalid(f"the query has more than {MAX_PARAMETERS} parameters; send fewer")


class Query:
    """The parameters of a query string."""

    __slots__ = ("_values",)

    def __init__(self, raw: bytes) -> None:
        """Parses `raw`, the text after the '?'. Raises RequestInvalid if `raw` cannot be parsed or has too many
        parameters."""
        self._values: dict[str, list[str]] = {}
        check_parameter_count(raw)
        for pair in raw.split(b"&") if raw else ():
            if pair:
                name, _, value = pair.replace(b"+", b" ").partition(b"=")
                self._values.setdefault(percent_decode(name, "the query"), []).append(
                    percent_decode(value, "the query")
                )

    def all(self, name: str) -> list[str]:
        """Returns all values of a parameter, in the order of the query. Returns an empty list if the query does not
        have the parameter."""
        return self._values.get(name, [])

    def one(self, name: str) -> str | None:
        """Returns the value of a parameter. Returns None if the query does not have the parameter. Raises
        RequestInvalid if the query has the parameter more than once."""
        values = self._values.get(name)
        if values is None:
            return None
        if len(values) > 1:
            raise RequestInvalid(f"the query gives {shown(name)} {len(values)} times; give it only once")
        return values[0]
