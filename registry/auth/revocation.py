"""Whether what made a proof still stands: the account, its API token, its line in an htpasswd file, the
settings of the issuer or provider that says so."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from registry.auth.password.htpasswd import STAMP_PREFIX, HtpasswdFile
from registry.auth.rights.principal import Identity
from storage.access import AccountName, AccountUnknown, ApiToken
from storage.accounts import Accounts
from storage.errors import Unauthorized


class RevocationCheck:
    """`stamps`: those of the issuers and of the OpenID provider that are set up."""

    def __init__(self, accounts: Accounts, htpasswd: HtpasswdFile | None = None, stamps: Collection[str] = ()) -> None:
        self._accounts = accounts
        self._htpasswd = htpasswd
        self._stamps = frozenset(stamps)

    def check(self, proof: Identity) -> Identity:
        """The proof, with what its API token is limited to, and ending no later. What it says has to hold now,
        whatever was so when it was made; its own expiry and its signature are not looked at. Takes some ten
        microseconds; the outcome stays the same while the store's epoch and `is_stamp_current` do. Raises
        Unauthorized."""
        if proof.name is None:
            return proof
        if proof.version is not None:
            self._check_account(proof)
        if not self.is_stamp_current(proof):
            raise Unauthorized("what was proved does not hold any more")
        if proof.version is None and (proof.stamp is None or self._is_stored(proof.name)):
            raise Unauthorized("what was proved does not hold any more")
        if proof.token is None:
            return proof
        token = self._token(proof)
        expires = min((end for end in (proof.expires, token.expires) if end is not None), default=None)
        return replace(proof, limits=token.limits, expires=expires)

    def is_stamp_current(self, proof: Identity) -> bool:
        """Whether its stamp is still the one of now: of what is not in the store, so no epoch tells of it. Takes two
        microseconds for a line of an htpasswd file, nothing for other proofs."""
        if proof.stamp is None or proof.name is None:
            return True
        if proof.stamp.startswith(f"{STAMP_PREFIX}:"):
            return self._htpasswd is not None and self._htpasswd.stamp(proof.name) == proof.stamp
        return proof.stamp in self._stamps

    def _check_account(self, proof: Identity) -> None:
        assert proof.name is not None
        try:
            account = self._accounts.account(str.__new__(AccountName, proof.name))
        except AccountUnknown:
            raise Unauthorized("the account is gone") from None
        if not account.enabled or account.version != proof.version:
            raise Unauthorized("the account has changed")

    def _is_stored(self, name: str) -> bool:
        """An account of the store has precedence over one of the same name elsewhere, disabled or not."""
        try:
            self._accounts.account(str.__new__(AccountName, name))
        except AccountUnknown:
            return False
        return True

    def _token(self, proof: Identity) -> ApiToken:
        assert proof.token is not None
        try:
            token, _ = self._accounts.token(proof.token)
        except AccountUnknown:
            raise Unauthorized("the API token is gone") from None
        if token.account != proof.name:
            raise Unauthorized("the API token is another account's")
        return token
