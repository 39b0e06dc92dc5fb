"""Reads *claims*, the named values in a token (JWT, RFC 7519), from the tokens of trusted issuers and of the OpenID
provider. Hashes the settings of an issuer or of the provider (`settings_stamp`).
"""

from __future__ import annotations

import hashlib
from typing import Final

from pydantic import BaseModel

from storage.access import AccountInvalid, AccountName

MAX_CLAIM_GROUPS: Final = 100
"""The largest number of groups that are read from one claim. Further groups are ignored."""
_MAX_CLAIM_TEXTS: Final = 10 * MAX_CLAIM_GROUPS
"""The largest number of strings in one claim that are checked as group names. Further strings are ignored. This bounds
the time that a claim with many invalid names takes."""


def claim_values(claim: object) -> set[str]:
    """Returns the values of a claim as strings. The result depends on the type of the claim:

    - A boolean: `true` or `false`.
    - A string or an integer: this one value.
    - A list: all strings in the list.
    - Any other type: an empty set."""
    if isinstance(claim, bool):
        return {str(claim).lower()}
    if isinstance(claim, str | int):
        return {str(claim)}
    return {text for text in claim if isinstance(text, str)} if isinstance(claim, list) else set()


def groups_from_claim(claim: object) -> tuple[str, ...]:
    """Returns the groups that a claim names, in alphabetical order. Leaves out strings that are not valid group names
    (by the rules of `AccountName`), and groups after the first `MAX_CLAIM_GROUPS`."""
    groups = []
    for name in sorted(claim_values(claim))[:_MAX_CLAIM_TEXTS]:
        try:
            groups.append(AccountName(name))
        except AccountInvalid:
            continue
    return tuple(groups[:MAX_CLAIM_GROUPS])


def settings_stamp(source: str, settings: BaseModel) -> str:
    """Returns a stamp: a text that contains `source` and a hash of `settings`. `source`: `issuer` for a token issuer,
    `openid` for the OpenID provider.

    Sessions and bearer tokens contain the stamp from the time of the login. The stamp changes when the settings change.
    The registry then refuses the sessions and tokens that contain the old stamp.
    """
    return f"{source}:{hashlib.blake2b(settings.model_dump_json().encode(), digest_size=12).hexdigest()}"
