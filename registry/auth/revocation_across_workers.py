"""How a revocation of a right or credential takes effect on all workers, at their next request.

Workers are processes that share one database. A number in the database, the *epoch*, tells each worker that rights have
changed:

1. The worker that revokes something (disables an account, removes a grant, revokes an API token, …) increments the
   epoch in the same transaction (`storage.accounts.Accounts.epoch`).
2. Every worker gets the epoch at each request. The worker reads the database only if a counter in shared memory shows
   a commit since its last request (`storage.metadata.sqlite.cross_process_change_counter`).
3. Each worker caches credentials, each with its principal (the account with its rights). A principal contains the
   epoch at which its rights were read. A cached credential contains the epoch at which it was last checked.
   `registry.auth.authenticators.HeaderAuthenticator` uses a cached principal only if the principal's rights were
   read at the current epoch.
4. If the rights were read at an older epoch, the worker calls `CachedCredentialCheck.revalidate`. If the credential
   was last checked at an older epoch as well, `revalidate` checks the credential again.
5. If the credential is still valid, `principal_of` computes the rights again from the grants.

An *identity* is the result of a successful check of a credential: the account to which the credential belongs, and the
restrictions of the credential, such as the time at which it expires. Some identities depend on a *source outside the
database*: a line of the htpasswd file, or the settings of a token issuer or of the OpenID provider. A change of this
source does not increment the epoch. Such an identity therefore contains a *stamp*, a hash of its source. At each
request, the worker compares the stamp with a hash of the current source.
"""

from __future__ import annotations

from collections.abc import Callable

from registry.auth.authorization_header import INVALID_CREDENTIALS
from registry.auth.credential_cache import VerifiedCredential
from registry.auth.revocation import RevocationCheck
from registry.auth.rights.policy import Policy
from registry.auth.rights.principal import Principal
from storage.accounts import Accounts
from storage.errors import Unauthorized


class CachedCredentialCheck:
    """Checks whether a cached credential is still valid. `clock` returns seconds since 1970."""

    def __init__(self, accounts: Accounts, revocation_check: RevocationCheck, clock: Callable[[], float]) -> None:
        self._accounts = accounts
        self._revocation_check = revocation_check
        self._clock = clock

    def is_unexpired_and_unchanged(self, verified: VerifiedCredential) -> bool:
        """Returns True if the cached credential has not expired, and its source outside the database is unchanged. Does
        not compare epochs."""
        return verified.expires > self._clock() and self._revocation_check.is_stamp_current(verified.identity)

    def revalidate(self, verified: VerifiedCredential) -> bool:
        """Returns whether the cached credential is still valid. If its epoch is not the current epoch, checks the
        account, the API token and the signing key again, and updates the identity and the epoch in `verified`."""
        if not self.is_unexpired_and_unchanged(verified):
            return False
        epoch = self._accounts.epoch()
        if verified.epoch != epoch:
            try:
                verified.identity = self._revocation_check.check(verified.identity)
            except Unauthorized:
                return False
            verified.epoch = epoch
        return True


async def principal_of(policy: Policy, verified: VerifiedCredential) -> Principal:
    """Returns the principal of a verified credential. If `verified` has no principal, or a principal of an older epoch,
    makes a principal with the current rights and stores it in `verified`. Raises Unauthorized if the identity is not
    valid any more."""
    principal = verified.principal
    if principal is None or principal.epoch != policy.accounts.epoch():
        await policy.prepare(verified.identity)  # reads the grants, and lets other tasks run meanwhile
        try:
            # This call checks the identity again if the epoch has changed since the last check of the credential, or if
            # the source of the identity has changed. Such changes are possible during `prepare`, too.
            principal = verified.principal = policy.principal(verified.identity, checked_epoch=verified.epoch)
        except Unauthorized:
            raise Unauthorized(INVALID_CREDENTIALS) from None
    return principal
