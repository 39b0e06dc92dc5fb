"""How a revoked right or credential takes effect on all workers, with the next request.

Workers are processes that share one database. They send each other no messages. Instead, each request compares two
numbers:

1. The worker that revokes something (disables an account, removes a grant, revokes an API token, …) increments the
   *epoch*, a number in the database, in the same transaction (`storage.accounts.Accounts.epoch`).
2. Every other worker reads the epoch at each request. This takes microseconds:
   `storage.metadata.sqlite.cross_process_change_counter` shows from shared memory whether anything was committed since
   the last request, and only then is the number read.
3. A cached credential and its principal (the account with its rights) have the epoch under which they were made.
   `registry.auth.authenticators.HeaderAuthenticator` uses a cached principal only if its epoch is the current one.
4. Otherwise `CachedCredentialCheck.is_valid` in this module checks the credential again, and `principal_of` computes
   its rights anew.

Changes outside the database do not change the epoch: a line of the htpasswd file, the settings of a token issuer or of
the OpenID provider. An identity from such a source has a *stamp*, a hash of that source, which is compared at each
request.
"""

from __future__ import annotations

from collections.abc import Callable

from registry.auth.credential_cache import VerifiedCredential
from registry.auth.revocation import RevocationCheck
from registry.auth.rights.policy import Policy
from registry.auth.rights.principal import Principal
from registry.auth.token.bearer_tokens import BearerTokens
from storage.accounts import Accounts
from storage.errors import Unauthorized


class CachedCredentialCheck:
    """Checks whether a cached credential is still valid. `clock` returns seconds since 1970."""

    def __init__(
        self,
        accounts: Accounts,
        bearer_tokens: BearerTokens,
        revocation_check: RevocationCheck,
        clock: Callable[[], float],
    ) -> None:
        self._accounts = accounts
        self._bearer_tokens = bearer_tokens
        self._revocation_check = revocation_check
        self._clock = clock

    def is_current(self, verified: VerifiedCredential) -> bool:
        """Returns whether a cached credential has not expired, and its source outside the database is unchanged. Does
        not read the epoch."""
        return verified.until > self._clock() and self._revocation_check.is_stamp_current(verified.identity)

    def is_valid(self, verified: VerifiedCredential) -> bool:
        """Returns whether a cached credential is still valid. If the epoch has changed, checks the account, the API
        token and the signing key again, and updates the credential's identity and epoch."""
        if not self.is_current(verified):
            return False
        epoch = self._accounts.epoch()
        if verified.epoch != epoch:
            if verified.key_id is not None and not self._bearer_tokens.is_key_accepted(verified.key_id):
                return False
            try:
                verified.identity = self._revocation_check.check(verified.identity)
            except Unauthorized:
                return False
            verified.epoch = epoch
        return True


async def principal_of(policy: Policy, verified: VerifiedCredential) -> Principal:
    """Returns the principal of a verified credential: the cached one if the epoch is the same, or else a new one with
    the current rights, which replaces the cached one. Raises Unauthorized if the identity is not valid any more."""
    principal = verified.principal
    if principal is None or principal.epoch != policy.accounts.epoch():
        await policy.prepare(verified.identity)
        principal = verified.principal = policy.principal(verified.identity, checked_at=verified.epoch)
    return principal
