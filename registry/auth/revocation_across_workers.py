"""How a revocation of a right or credential takes effect on all workers, at their next request.

Workers are processes that share one database. They do not send each other messages about revocations. A number in the
database, the *epoch*, tells each worker that rights have changed:

1. The worker that revokes something (disables an account, removes a grant, revokes an API token, …) increments the
   epoch in the same transaction (`storage.accounts.Accounts.epoch`).
2. Every worker gets the epoch at each request. This takes microseconds, because the worker reads the database only if
   something was committed since its last request. A counter in shared memory tells the worker whether there was a
   commit (`storage.metadata.sqlite.cross_process_change_counter`).
3. A cached credential and its principal (the account with its rights) contain the epoch at which they were last
   checked. `registry.auth.authenticators.HeaderAuthenticator` uses a cached principal only if its epoch is the current
   one.
4. If the epoch of the cached principal is older, `CachedCredentialCheck.revalidate` in this module checks the
   credential again, and `principal_of` computes the rights again from the grants.

An *identity* is the account that a credential has proved, with the limits of the credential. Identities can also come
from outside the database: from the htpasswd file, a token issuer or the OpenID provider. A change of that file, or of
the settings of the other two, does not increment the epoch. An identity from such a source contains a *stamp*, a hash
of the source. At each request, the worker compares the stamp with a hash of the source as it is now.
"""

from __future__ import annotations

from collections.abc import Callable

from registry.auth.authorization_header import REFUSED
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

    def is_current(self, verified: VerifiedCredential) -> bool:
        """Returns whether the cached credential has not expired, and its source outside the database is unchanged. Does
        not check whether the epoch has changed; `revalidate` does."""
        return verified.until > self._clock() and self._revocation_check.is_stamp_current(verified.identity)

    def revalidate(self, verified: VerifiedCredential) -> bool:
        """Returns whether the cached credential is still valid. If the epoch has changed since the last check, checks
        the account, the API token and the signing key again, and updates the identity and the epoch in `verified`."""
        if not self.is_current(verified):
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
    """Returns the principal of a verified credential. If no principal is cached, or the epoch has changed since it was
    made, makes a new one with the current rights and caches it. Raises Unauthorized if the identity is not valid any
    more."""
    principal = verified.principal
    if principal is None or principal.epoch != policy.accounts.epoch():
        await policy.prepare(verified.identity)
        try:
            # Checks the identity again if the epoch has changed since the last check, which includes changes during
            # `prepare`.
            principal = verified.principal = policy.principal(verified.identity, checked_at=verified.epoch)
        except Unauthorized:
            raise Unauthorized(REFUSED) from None
    return principal
