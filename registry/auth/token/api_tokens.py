"""API tokens: secrets that people and robots (accounts for programs) use to log in instead of a password.

An API token is a text `ent_ID_SECRET`. The prefix lets scanners for leaked secrets find it. `ID` is the key of the
token's row in the store. `SECRET` has 256 random bits, so nobody can guess it, and the store keeps its SHA-256 without
a salt.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

from storage.access import AccountName, AccountUnknown, ApiToken, TokenLimit
from storage.accounts import Accounts
from storage.errors import Unauthorized

_LETTERS: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""The digits of base 62, which ids and secrets are written in."""
_ID_LETTERS, _SECRET_LETTERS = 12, 43
"""The lengths of the id and the secret, which hold 71 and 256 random bits."""
_TOKEN_FORM: Final = re.compile(rf"ent_([0-9A-Za-z]{{{_ID_LETTERS}}})_([0-9A-Za-z]{{{_SECRET_LETTERS}}})")
_USE_RECORD_SECONDS: Final = 3600.0
"""The time between two records of a token's use. An hour is enough to see which tokens are in use."""

Random = Callable[[int], bytes]
"""Returns as many random bytes as its argument says."""


@dataclass(frozen=True, slots=True)
class NewApiToken:
    """A new API token. `text` is the whole token, which its user sees once. The store gets `token` and
    `secret_hash`."""

    token: ApiToken
    text: str = field(repr=False)
    secret_hash: bytes = field(repr=False)


def make(
    account: AccountName,
    *,
    now: float,
    purpose: Literal["personal", "login"] = "personal",
    note: str = "",
    expires: float | None = None,
    limits: tuple[TokenLimit, ...] | None = None,
    random: Random = os.urandom,
) -> NewApiToken:
    """Returns a new API token, which the caller must store. `purpose` is `personal` for a token that a user makes, and
    `login` for a refresh token of `docker login`. `now` and `expires` are in seconds since 1970."""
    token_id, secret = _encode(random(9), _ID_LETTERS), _encode(random(32), _SECRET_LETTERS)
    token = ApiToken(token_id, account, purpose, note, now, expires, limits)
    return NewApiToken(token, f"ent_{token_id}_{secret}", _hash_secret(secret))


def is_well_formed(text: str) -> bool:
    """Returns whether `text` has the form of an API token. Does not look at the store."""
    return _TOKEN_FORM.fullmatch(text) is not None


def find(accounts: Accounts, text: str) -> ApiToken:
    """Returns the stored API token for the text that a client sent. Takes microseconds. Raises Unauthorized if the form
    or the secret is wrong, or if the token is unknown, revoked or expired."""
    parts = _TOKEN_FORM.fullmatch(text)
    if parts is None:
        raise Unauthorized("this is no API token")
    try:
        token, secret_hash = accounts.token(parts[1])
    except AccountUnknown:
        raise Unauthorized("there is no such API token") from None
    if not hmac.compare_digest(_hash_secret(parts[2]), secret_hash):
        raise Unauthorized("the API token has another secret")
    return token


def is_use_due(token: ApiToken, now: float) -> bool:
    """Returns whether the store should record that the token was used at `now`, in seconds since 1970."""
    return token.used is None or now - token.used >= _USE_RECORD_SECONDS


def _hash_secret(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("ascii")).digest()


def _encode(raw: bytes, length: int) -> str:
    """Returns the bytes as a number in base 62, with `length` digits and the lowest digit first."""
    number, letters = int.from_bytes(raw, "big"), []
    for _ in range(length):
        number, letter = divmod(number, len(_LETTERS))
        letters.append(_LETTERS[letter])
    return "".join(letters)
