"""Checks whether an identity is still valid: its account, its API token, its line in the htpasswd file, and the
settings of its issuer or provider.

A worker notices a change by another worker because the accounts' epoch is read again after every commit
(`storage.metadata.sqlite.cross_process_change_counter`).
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
    """Checks identities. `stamps` are those of the issuers and of the OpenID provider in the settings."""

    def __init__(self, accounts: Accounts, htpasswd: HtpasswdFile | None = None, stamps: Collection[str] = ()) -> None:
        self._accounts = accounts
        self._htpasswd = htpasswd
        self._stamps = frozenset(stamps)

    def check(self, identity: Identity) -> Identity:
        """Returns the identity with the current limits of its API token, and expiring no later than that. Does not look
        at the identity's own expiry. Takes some ten microseconds.

        The result holds as long as the store's epoch and `is_stamp_current` stay the same. Raises Unauthorized if the
        identity is not valid any more.
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
        """Returns whether the identity's stamp is still the current one. A stamp stands for what is not in the store,
        whose epoch does not change with it. Takes two microseconds for a line of an htpasswd file, nothing for other
        identities."""
        if identity.stamp is None or identity.name is None:
            return True
        if identity.stamp.startswith(f"{STAMP_PREFIX}:"):
            return self._htpasswd is not None and self._htpasswd.stamp(identity.name) == identity.stamp
        return identity.stamp in self._stamps

    def _check_account(self, identity: Identity) -> None:
        assert identity.name is not None
        try:
            account = self._accounts.account(str.__new__(AccountName, identity.name))
        except AccountUnknown:
            raise Unauthorized("the account is gone") from None
        if not account.enabled or account.version != identity.version:
            raise Unauthorized("the account has changed")

    def _is_stored(self, name: str) -> bool:
        """Returns whether the store has an account of that name. Enabled or not, it has precedence over one from
        elsewhere."""
        try:
            self._accounts.account(str.__new__(AccountName, name))
        except AccountUnknown:
            return False
        return True

    def _token(self, identity: Identity) -> ApiToken:
        assert identity.token is not None
        try:
            token, _ = self._accounts.token(identity.token)
        except AccountUnknown:
            raise Unauthorized("the API token is gone") from None
        if token.account != identity.name:
            raise Unauthorized("the API token is another account's")
        return token
