"""`RevocationCheck`: checks whether an identity that a credential once proved is still valid.

It looks at the identity's account and API token in the store, at its line in the htpasswd file, and at the settings of
the token issuer or OpenID provider that proved it. `registry.auth.revocation_across_workers` says when this check runs,
and how a worker notices what another worker revoked.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from registry.auth.password.htpasswd import STAMP_PREFIX, HtpasswdFile
from registry.auth.rights.principal import Identity
from storage.access import AccountName, AccountUnknown, ApiToken
from storage.accounts import Accounts
from storage.errors import Unauthorized


class RevocationCheck:
    """Checks identities. A *stamp* is a hash of the source outside the store that proved an identity. `stamps` are the
    stamps of the issuers and of the OpenID provider in the current settings."""

    def __init__(self, accounts: Accounts, htpasswd: HtpasswdFile | None = None, stamps: Collection[str] = ()) -> None:
        self._accounts = accounts
        self._htpasswd = htpasswd
        self._stamps = frozenset(stamps)

    def check(self, identity: Identity) -> Identity:
        """Returns the identity with the current limits of its API token, and with the token's expiry time if that is
        earlier. Raises Unauthorized if the identity is not valid any more. Does not check whether it has expired.

        Takes about ten microseconds. The result stays valid until the store's epoch changes (the number that every
        change of accounts, grants, tokens and keys increases), or until `is_stamp_current` returns False.
        """
        if identity.name is None:
            return identity
        if identity.version is not None:
            self._check_account(identity)
        if not self.is_stamp_current(identity):
            raise Unauthorized("the credential is not valid any more")
        if identity.version is None and (identity.stamp is None or self._is_stored(identity.name)):
            raise Unauthorized("the credential is not valid any more")
        if identity.token is None:
            return identity
        token = self._token(identity)
        expires = min((end for end in (identity.expires, token.expires) if end is not None), default=None)
        return replace(identity, limits=token.limits, expires=expires)

    def is_stamp_current(self, identity: Identity) -> bool:
        """Returns whether the source that the identity's stamp was made from is unchanged. True for an identity without
        a stamp. Takes two microseconds for a line of an htpasswd file, which needs a stat of the file, and no
        measurable time for other identities."""
        if identity.stamp is None or identity.name is None:
            return True
        if identity.stamp.startswith(f"{STAMP_PREFIX}:"):
            return self._htpasswd is not None and self._htpasswd.stamp(identity.name) == identity.stamp
        return identity.stamp in self._stamps

    def _check_account(self, identity: Identity) -> None:
        """Raises Unauthorized if the account in the store was removed, disabled or changed."""
        assert identity.name is not None
        try:
            account = self._accounts.account(str.__new__(AccountName, identity.name))
        except AccountUnknown:
            raise Unauthorized("the account is gone") from None
        if not account.enabled or account.version != identity.version:
            raise Unauthorized("the account has changed")

    def _is_stored(self, name: str) -> bool:
        """Returns whether the store has an account of this name. Such an account, even a disabled one, replaces an
        account of the same name in the htpasswd file."""
        try:
            self._accounts.account(str.__new__(AccountName, name))
        except AccountUnknown:
            return False
        return True

    def _token(self, identity: Identity) -> ApiToken:
        """Returns the identity's API token from the store. Raises Unauthorized if it was revoked or has expired."""
        assert identity.token is not None
        try:
            token, _ = self._accounts.token(identity.token)
        except AccountUnknown:
            raise Unauthorized("the API token is gone") from None
        if token.account != identity.name:
            raise Unauthorized("the API token is another account's")
        return token
