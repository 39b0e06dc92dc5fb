"""What a caller of the management API may do.

The management API administers accounts, groups, grants and API tokens. A refusal depends only on the caller and never
on what exists, so it reveals nothing about other accounts.
"""

from __future__ import annotations

from dataclasses import dataclass

from registry.auth.rights.principal import Principal
from storage.access import AccountName, AccountUnknown, Action, ApiToken
from storage.errors import Denied, Unauthorized
from storage.patterns import NO_NAMES, NamePattern, NameSet


@dataclass(frozen=True, slots=True)
class ManagementRights:
    """The rights of one caller of the management API.

    - `name`: the caller's account. None: the caller has no account.
    - `admin`: whether the caller may do everything.
    - `is_person`: whether a person logged in with the account's own password, or at the OpenID provider. False for
      robots, and for logins with a token of any kind.
    - `token`: the id of the API token that the caller logged in with. None: the caller used no API token.
    - `grantable_names`: the repository names on which the caller may grant rights to others.
    """

    name: str | None
    admin: bool = False
    is_person: bool = False
    token: str | None = None
    grantable_names: NameSet = NO_NAMES

    @property
    def account_name(self) -> str:
        """The name of the caller's account. Raises Unauthorized if the caller has none."""
        if self.name is None:
            raise Unauthorized("log in: this needs an account")
        return self.name

    def check_admin(self) -> None:
        """Checks that the caller is an admin. Raises Denied if not, or Unauthorized if the caller has no account."""
        if not self.admin:
            raise Denied(f"{self.account_name} is no admin, or its token is limited")

    def check_may_see(self, name: AccountName) -> None:
        """Checks that the caller may see the account `name`: an admin sees all accounts, others see their own. Raises
        AccountUnknown if not, even if the account exists, or Unauthorized if the caller has no account."""
        if not self.admin and self.account_name != name:
            raise AccountUnknown(f"there is no account {name}")

    def check_may_add_credential(self, name: AccountName) -> None:
        """Checks that the caller may set the password of the account `name`, or make an API token for it. Admins may,
        and people may for their own account.

        A caller who logged in with a token may not, unless an admin: the new credential would still work after that
        token was revoked. Raises Unauthorized without an account, AccountUnknown for another account, Denied otherwise.
        """
        self.check_may_see(name)
        if not self.admin and not self.is_person:
            raise Denied(
                "this takes a person's login, with a password of this registry's own or at the OpenID provider, "
                "not with an API token or another's"
            )

    def check_token(self, token: ApiToken) -> None:
        """Checks that the caller may revoke `token`: an admin may revoke all tokens, a person those of the own account,
        and an API token may revoke itself. Raises AccountUnknown for a token of another account, Denied otherwise."""
        if self.admin or token.id == self.token:
            return
        if token.account != self.name:
            raise AccountUnknown("there is no such API token; it was revoked, or has expired")
        self.check_may_add_credential(token.account)

    def may_grant(self, pattern: NamePattern) -> bool:
        """Returns whether the caller may grant rights on all names that `pattern` matches. A caller without an account
        may not, even if everyone was granted the action `admin`."""
        return self.admin or (self.name is not None and self.grantable_names.covers(pattern))

    def check_grant(self, pattern: NamePattern) -> None:
        """Checks that the caller may grant rights on all names that `pattern` matches. Raises Denied if not, or
        Unauthorized if the caller has no account."""
        if not self.may_grant(pattern):
            raise Denied(f"{self.account_name} may not grant on {pattern}; that takes the action admin on all of it")


UNRESTRICTED = ManagementRights(None, admin=True)
"""The rights of callers on the registry's own machine while there are no accounts: they may do everything."""


def management_rights_of(principal: Principal) -> ManagementRights:
    """Returns the management rights of a principal. A principal without an account gets none."""
    identity = principal.identity
    # A login with an API token or a bearer token does not count as a person: it could make a credential that still
    # works after the token has ended. Tokens of issuers log in robots only.
    used_token = identity.token is not None or identity.access is not None
    return ManagementRights(
        identity.name,
        admin=principal.admin,
        is_person=identity.version is not None and not identity.robot and not used_token,
        token=identity.token,
        grantable_names=principal.names(Action.ADMIN),
    )
