"""API tokens: secrets that people and robots log in with in place of a password.

The form is `ent_ID_SECRET`, letters and digits only, so that it can be pasted anywhere and scanners for leaked secrets
find it. The id finds the row. The secret has 256 random bits, so nobody can guess it and a plain SHA-256 is enough at
rest.
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
_ID, _SECRET = 12, 43
"""Characters, which hold 71 and 256 random bits."""
_FORM: Final = re.compile(rf"ent_([0-9A-Za-z]{{{_ID}}})_([0-9A-Za-z]{{{_SECRET}}})")
_USE_RECORDED_SECONDS: Final = 3600.0

Random = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class NewApiToken:
    """A new token. `text` is for its owner, who sees it once; the store gets `token` and `secret_hash`."""

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
    """Returns a new token, not stored yet. `now` and `expires` are seconds since 1970."""
    token_id, secret = _encode(random(9), _ID), _encode(random(32), _SECRET)
    token = ApiToken(token_id, account, purpose, note, now, expires, limits)
    return NewApiToken(token, f"ent_{token_id}_{secret}", _hash_secret(secret))


def is_well_formed(text: str) -> bool:
    """Returns whether `text` has the form of an API token."""
    return _FORM.fullmatch(text) is not None


def find(accounts: Accounts, text: str) -> ApiToken:
    """Returns the API token that `text` shows. Takes microseconds. Raises Unauthorized if the form or the secret is
    wrong, or if the token is unknown, revoked or expired."""
    parts = _FORM.fullmatch(text)
    if parts is None:
        raise Unauthorized("this is no API token")
    try:
        token, held = accounts.token(parts[1])
    except AccountUnknown:
        raise Unauthorized("there is no such API token") from None
    if not hmac.compare_digest(_hash_secret(parts[2]), held):
        raise Unauthorized("the API token has another secret")
    return token


def is_use_due(token: ApiToken, now: float) -> bool:
    """Returns whether the store should record a use now: once an hour is enough to see which tokens are in use."""
    return token.used is None or now - token.used >= _USE_RECORDED_SECONDS


def _hash_secret(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("ascii")).digest()


def _encode(raw: bytes, length: int) -> str:
    """Returns all of the bytes as letters and digits."""
    number, letters = int.from_bytes(raw, "big"), []
    for _ in range(length):
        number, letter = divmod(number, len(_LETTERS))
        letters.append(_LETTERS[letter])
    return "".join(letters)
