"""What issuers and the OpenID provider have in common: claims about groups, and stamps of their settings."""

from __future__ import annotations

import hashlib
from typing import Final

from pydantic import BaseModel

from storage.access import AccountInvalid, AccountName

MAX_CLAIM_GROUPS: Final = 100
"""Groups of a claim that count; the others are ignored."""


def claim_values(claim: object) -> set[str]:
    """Returns a claim's value, or each of its values, as settings write them."""
    if isinstance(claim, bool):
        return {str(claim).lower()}
    if isinstance(claim, str | int):
        return {str(claim)}
    return {each for each in claim if isinstance(each, str)} if isinstance(claim, list) else set()


def groups_from_claim(claim: object) -> tuple[str, ...]:
    """Returns the groups that a claim names, without those that are no valid names."""
    found = []
    for each in sorted(claim_values(claim))[: 10 * MAX_CLAIM_GROUPS]:
        try:
            found.append(AccountName(each))
        except AccountInvalid:
            continue
    return tuple(found[:MAX_CLAIM_GROUPS])


def settings_stamp(source: str, settings: BaseModel) -> str:
    """Returns a stamp that changes with the settings: an identity that was proved under other settings does not count.
    `source` is `issuer` or `openid`."""
    return f"{source}:{hashlib.blake2b(settings.model_dump_json().encode(), digest_size=12).hexdigest()}"
