"""Reads claims in the tokens of trusted issuers and of the OpenID provider. A *claim* is a named value in a token (JWT,
RFC 7519).

`settings_stamp` hashes the settings of an issuer or of the provider. After a change of these settings, the registry
refuses the sessions and tokens of earlier logins.
"""

from __future__ import annotations

import hashlib
from typing import Final

from pydantic import BaseModel

from storage.access import AccountInvalid, AccountName

MAX_CLAIM_GROUPS: Final = 100
"""The largest number of groups that are read from one claim. Further groups are ignored."""
_MAX_CLAIM_TEXTS: Final = 10 * MAX_CLAIM_GROUPS
"""The largest number of texts in one claim that are tried as group names. Further texts are ignored, so that a claim
with many invalid names takes little time."""


def claim_values(claim: object) -> set[str]:
    """Returns the values of a claim as texts. A text, an integer or a boolean gives one value; a boolean becomes `true`
    or `false`, as in the settings. A list gives all texts in it. Returns an empty set for a claim of any other type."""
    if isinstance(claim, bool):
        return {str(claim).lower()}
    if isinstance(claim, str | int):
        return {str(claim)}
    return {text for text in claim if isinstance(text, str)} if isinstance(claim, list) else set()


def groups_from_claim(claim: object) -> tuple[str, ...]:
    """Returns the groups that a claim names, in alphabetical order. Leaves out texts that are not valid group names
    (`AccountName`: groups are named by the same rules as accounts), and groups after the first `MAX_CLAIM_GROUPS`."""
    groups = []
    for name in sorted(claim_values(claim))[:_MAX_CLAIM_TEXTS]:
        try:
            groups.append(AccountName(name))
        except AccountInvalid:
            continue
    return tuple(groups[:MAX_CLAIM_GROUPS])


def settings_stamp(source: str, settings: BaseModel) -> str:
    """Returns a stamp: `source` and a hash of `settings`. `source` is `issuer` for the settings of a token issuer, and
    `openid` for those of the OpenID provider.

    The session or bearer token of an account that logs in under these settings contains the stamp. After a change of
    the settings, that stamp differs from the current one, and the registry refuses the session or token.
    """
    return f"{source}:{hashlib.blake2b(settings.model_dump_json().encode(), digest_size=12).hexdigest()}"
