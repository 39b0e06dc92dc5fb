"""What an account may do through the management API. A refusal depends on who asks, never on what exists."""

from __future__ import annotations

from dataclasses import dataclass

from registry.auth.rights.principal import Principal
from storage.access import AccountName, AccountUnknown, Action, ApiToken
from storage.errors import Denied, Unauthorized
from storage.patterns import NO_NAMES, NamePattern, NameSet


@dataclass(frozen=True, slots=True)
class ManagementRights:
    """The rights of one caller.

    - `name` is the account; None for a caller without one.
    - `admin` allows everything; the credential has no limits.
    - `is_person` means that a person logged in with the account's password or at the OpenID provider, and that no
      token stands in for them.
    - `token` is the id of the API token that the caller logged in with.
    - `grantable_names` are the names on which the caller may grant with this credential.
    """

    name: str | None
    admin: bool = False
    is_person: bool = False
    token: str | None = None
    grantable_names: NameSet = NO_NAMES

    @property
    def account_name(self) -> str:
        """The caller's account. Raises Unauthorized if there is none."""
        if self.name is None:
            raise Unauthorized("log in: this needs an account")
        return self.name

    def check_admin(self) -> None:
        """Raises Unauthorized or Denied unless the caller is an admin."""
        if not self.admin:
            raise Denied(f"{self.account_name} is no admin, or its token is limited")

    def check_may_see(self, name: AccountName) -> None:
        """Raises Unauthorized without an account, and AccountUnknown for another's account, whether it exists or
        not."""
        if not self.admin and self.account_name != name:
            raise AccountUnknown(f"there is no account {name}")

    def check_may_add_credential(self, name: AccountName) -> None:
        """Checks that the caller may set a password or make an API token for `name`. Raises Unauthorized,
        AccountUnknown, Denied.

        A token may not make another token: revoking a token ends everything that it could do.
        """
        self.check_may_see(name)
        if not self.admin and not self.is_person:
            raise Denied(
                "this takes a person's login, with a password of this registry's own or at the OpenID provider, "
                "not with an API token or another's"
            )

    def check_token(self, token: ApiToken) -> None:
        """Checks that the caller may revoke `token`. Raises Denied, and AccountUnknown for another account's token, as
        for one that does not exist."""
        if self.admin or token.id == self.token:
            return
        if token.account != self.name:
            raise AccountUnknown("there is no such API token; it was revoked, or has expired")
        self.check_may_add_credential(token.account)

    def may_grant(self, pattern: NamePattern) -> bool:
        """Returns whether the caller may grant on `pattern`. A caller without an account may not, even where the action
        admin is granted to everyone."""
        return self.admin or (self.name is not None and self.grantable_names.covers(pattern))

    def check_grant(self, pattern: NamePattern) -> None:
        """Raises Unauthorized or Denied unless the caller may grant on `pattern`."""
        if not self.may_grant(pattern):
            raise Denied(f"{self.account_name} may not grant on {pattern}; that takes the action admin on all of it")


UNRESTRICTED = ManagementRights(None, admin=True)
"""The rights of callers that need no account: the operator at the command line, and the registry's own machine while
there are no accounts."""


def management_rights_of(principal: Principal) -> ManagementRights:
    """Returns the rights of a principal; while there are no accounts, those of a caller without one."""
    identity = principal.identity
    # API tokens, tokens of /token and tokens of issuers (robots) do not make a person: none may outlive itself.
    by_token = identity.token is not None or identity.access is not None
    return ManagementRights(
        identity.name,
        admin=principal.admin,
        is_person=identity.version is not None and not identity.robot and not by_token,
        token=identity.token,
        grantable_names=principal.names(Action.ADMIN),
    )
