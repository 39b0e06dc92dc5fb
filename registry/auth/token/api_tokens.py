"""API tokens: secrets with which people and robots (accounts for programs) log in instead of a password.

An API token is a text `ent_ID_SECRET`. The prefix `ent_` lets scanners for leaked secrets find it. `ID` is the key of
the token's row in the store. The store keeps only the hash of `SECRET` (`stored_secrets`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from registry.auth.token.stored_secrets import has_hash, hash_secret
from storage.access import AccountName, AccountUnknown, ApiToken, TokenLimit, TokenPurpose
from storage.accounts import Accounts
from storage.errors import Unauthorized
from storage.future_times import CLOCK_MARGIN_SECONDS

_BASE62_DIGITS: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""The digits of ids and secrets."""
_ID_LENGTH, _SECRET_LENGTH = 12, 43
"""Number of digits of an id (enough for 71 bits) and of a secret (enough for 256 bits)."""
_TOKEN_FORM: Final = re.compile(rf"ent_([0-9A-Za-z]{{{_ID_LENGTH}}})_([0-9A-Za-z]{{{_SECRET_LENGTH}}})")
"""The text of an API token. The groups are the id and the secret."""
_USE_RECORD_SECONDS: Final = 3600.0
"""Shortest time in seconds between two records of a token's last use. It is short enough to see which tokens are in
use."""

MakeRandomBytes = Callable[[int], bytes]
"""A function that returns the given number of random bytes."""


@dataclass(frozen=True, slots=True)
class NewApiToken:
    """A new API token. `text`: the text that the user gets once; it contains the secret and must not be stored. `token`
    and `secret_hash`: what the caller stores."""

    token: ApiToken
    text: str = field(repr=False)
    secret_hash: bytes = field(repr=False)


def make(
    account: AccountName,
    *,
    now: float,
    purpose: TokenPurpose = "personal",
    note: str = "",
    expires: float | None = None,
    limits: tuple[TokenLimit, ...] | None = None,
    random: MakeRandomBytes = os.urandom,
) -> NewApiToken:
    """Makes a new API token for `account`. The caller must store the token.

    - `now`, `expires`: seconds since 1970. `expires` is None if the token never expires.
    - `purpose`: `personal` for a token that a person created; `login` for a refresh token, which `docker login` gets
      from `/token` and later sends instead of the password.
    - `limits`: the token allows an action only if both `limits` and the rights of the account allow it. None: the token
      allows everything that the account may do.
    """
    token_id, secret = _encode(random(9), _ID_LENGTH), _encode(random(32), _SECRET_LENGTH)
    token = ApiToken(token_id, account, purpose, note, now, expires, limits)
    return NewApiToken(token, f"ent_{token_id}_{secret}", hash_secret(secret))


def is_well_formed(text: str) -> bool:
    """Returns whether `text` has the form of an API token. Does not check whether the store has such a token."""
    return _TOKEN_FORM.fullmatch(text) is not None


def find(accounts: Accounts, text: str) -> ApiToken:
    """Returns the stored API token for the text that a client sent. Takes microseconds. Raises Unauthorized if `text`
    is not well formed, if its secret is wrong, or if the token is unknown, revoked or expired."""
    parts = _TOKEN_FORM.fullmatch(text)
    if parts is None:
        raise Unauthorized("this is not an API token")
    try:
        token, secret_hash = accounts.token(parts[1])
    except AccountUnknown:  # the token does not exist, was revoked or has expired
        raise Unauthorized("there is no such API token") from None
    if not has_hash(parts[2], secret_hash):
        raise Unauthorized("the secret of the API token is wrong")
    return token


def should_record_use(token: ApiToken, now: float) -> bool:
    """Returns whether the store should record a use of the token at the time `now` (seconds since 1970). Returns False
    if the last recorded use is less than an hour ago. Returns True if it is in the future, because the clock was then
    set back."""
    return token.used is None or not -CLOCK_MARGIN_SECONDS <= now - token.used < _USE_RECORD_SECONDS


def _encode(random_bytes: bytes, length: int) -> str:
    """Converts `random_bytes` to a number, and returns the last `length` digits of the number in base 62, in reverse
    order."""
    number, digits = int.from_bytes(random_bytes, "big"), []
    for _ in range(length):
        number, value = divmod(number, len(_BASE62_DIGITS))
        digits.append(_BASE62_DIGITS[value])
    return "".join(digits)
