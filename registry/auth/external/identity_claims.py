"""Functions that trusted token issuers and the OpenID provider share: reading claims, and hashing their settings.

A claim is a named value in a token (JWT, RFC 7519).
"""

from __future__ import annotations

import hashlib
from typing import Final

from pydantic import BaseModel

from storage.access import AccountInvalid, AccountName

MAX_CLAIM_GROUPS: Final = 100
"""The most groups that are taken from one claim. Further groups are ignored."""


def claim_values(claim: object) -> set[str]:
    """Returns the values of a claim as texts: its single value, or the texts in its list. Booleans become `true` and
    `false`, as settings write them. Returns an empty set for a claim of another type."""
    if isinstance(claim, bool):
        return {str(claim).lower()}
    if isinstance(claim, str | int):
        return {str(claim)}
    return {each for each in claim if isinstance(each, str)} if isinstance(claim, list) else set()


def groups_from_claim(claim: object) -> tuple[str, ...]:
    """Returns the groups that a claim names, in alphabetical order. Leaves out texts that are no valid group names."""
    found = []
    for each in sorted(claim_values(claim))[: 10 * MAX_CLAIM_GROUPS]:
        try:
            found.append(AccountName(each))
        except AccountInvalid:
            continue
    return tuple(found[:MAX_CLAIM_GROUPS])


def settings_stamp(source: str, settings: BaseModel) -> str:
    """Returns a stamp: a hash of the settings of an issuer (`source` is `issuer`) or of the OpenID provider (`openid`).
    An identity holds the stamp of the settings under which it logged in, and is refused once the settings differ."""
    return f"{source}:{hashlib.blake2b(settings.model_dump_json().encode(), digest_size=12).hexdigest()}"
