"""`RevocationCheck`: checks whether the identity that a credential proved earlier is still valid. An identity is an
account, with the limits of the credential.

The check reads the account, the API token and the keys that sign bearer tokens from the store. An account in the store
has a *version*, a number that increases when the account is disabled or enabled, or when its password or its admin
right changes. An identity contains the version that its account had when the credential was verified.

Some identities depend on a *source outside the store*: the account's line in the htpasswd file, or the settings of a
token issuer or of the OpenID provider. Such an identity has a *stamp*, a hash of its source. The check compares the
stamp with a hash of the source as it is now.

`registry.auth.revocation_across_workers` describes when this check runs, and how a worker learns that another worker
has revoked a credential.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from registry.auth.password.htpasswd import STAMP_PREFIX, HtpasswdFile
from registry.auth.rights.principal import Identity
from registry.auth.token.signing_keys import SigningKeys
from storage.access import AccountName, AccountUnknown, ApiToken
from storage.accounts import Accounts
from storage.errors import Unauthorized


class RevocationCheck:
    """Checks identities. `stamps` are the stamps of the issuers and of the OpenID provider in the current settings.
    `htpasswd` is None if the settings name no htpasswd file. `keys` are the keys that sign bearer tokens. If `keys` is
    None, the check refuses every identity that a bearer token of this registry has proved."""

    def __init__(
        self,
        accounts: Accounts,
        htpasswd: HtpasswdFile | None = None,
        stamps: Collection[str] = (),
        keys: SigningKeys | None = None,
    ) -> None:
        self._accounts = accounts
        self._htpasswd = htpasswd
        self._stamps = frozenset(stamps)
        self._keys = keys

    def check(self, identity: Identity) -> Identity:
        """Returns the identity. If the identity comes from an API token, the result has the token's current limits, and
        expires when the identity or the token expires, whichever is earlier. Raises Unauthorized if the identity is not
        valid any more. Does not check whether the identity has expired.

        Takes about ten microseconds. The result stays right until `is_stamp_current` returns False or the store's
        *epoch* increases. The epoch is a number that increases when an account, a grant or a signing key changes, or
        when an API token is revoked.
        """
        if identity.key_id is not None and (self._keys is None or self._keys.find(identity.key_id) is None):
            raise Unauthorized("the key that signed the token is not accepted any more")
        if identity.name is None:
            return identity
        if identity.version is not None:
            self._check_account(identity)
        if not self.is_stamp_current(identity):
            raise Unauthorized("the htpasswd line or the settings on which the login depends have changed")
        # An identity without a version is for an account in the htpasswd file. Such an identity is invalid if the store
        # has an account of the same name. Without a stamp it is invalid as well, because its line in the htpasswd file
        # cannot be checked.
        if identity.version is None and (identity.stamp is None or self._is_stored(identity.name)):
            raise Unauthorized("an account in the store has replaced the htpasswd account of the same name")
        if identity.token is None:
            return identity
        token = self._token(identity)
        expires = min((expiry for expiry in (identity.expires, token.expires) if expiry is not None), default=None)
        return replace(identity, limits=token.limits, expires=expires)

    def is_stamp_current(self, identity: Identity) -> bool:
        """Returns whether the identity's source outside the store still has the stamp of the identity. Returns True for
        an identity without a stamp. For an account in the htpasswd file, calls `stat` on the file, which takes two
        microseconds."""
        if identity.stamp is None or identity.name is None:
            return True
        if identity.stamp.startswith(f"{STAMP_PREFIX}:"):
            return self._htpasswd is not None and self._htpasswd.stamp(identity.name) == identity.stamp
        return identity.stamp in self._stamps

    def _check_account(self, identity: Identity) -> None:
        """Raises Unauthorized if the account was removed from the store or disabled, or if its version has changed."""
        assert identity.name is not None
        try:
            account = self._accounts.account(_trusted_name(identity.name))
        except AccountUnknown:
            raise Unauthorized("the account was removed") from None
        if not account.enabled or account.version != identity.version:
            raise Unauthorized("the account was disabled, or its password or admin right was changed")

    def _is_stored(self, name: str) -> bool:
        """Returns whether the store has an account of this name. Such an account, even a disabled one, replaces an
        account of the same name in the htpasswd file."""
        try:
            self._accounts.account(_trusted_name(name))
        except AccountUnknown:
            return False
        return True

    def _token(self, identity: Identity) -> ApiToken:
        """Returns the identity's API token from the store. Raises Unauthorized if the token was revoked or has
        expired, or belongs to another account."""
        assert identity.token is not None
        try:
            token, _ = self._accounts.token(identity.token)
        except AccountUnknown:  # `Accounts.token` raises this error also for an unknown or expired token
            raise Unauthorized("the API token was revoked, or has expired") from None
        if token.account != identity.name:
            raise Unauthorized("the API token belongs to another account")
        return token


def _trusted_name(name: str) -> AccountName:
    """Returns `name` as an `AccountName`, without a check of its characters: a check takes longer than looking up the
    account. The name comes from an identity, so its characters were checked before."""
    return str.__new__(AccountName, name)
