"""The rights of callers of the management API.

The management API (`/api/v1`) administers accounts, groups, grants and API tokens. A caller who may not see an account
gets the same error whether or not that account exists.
"""

from __future__ import annotations

from dataclasses import dataclass

from registry.auth.rights.principal import Principal
from storage.access import AccountHidden, AccountName, Action, ApiToken, LoginSession
from storage.errors import Denied, Unauthorized
from storage.patterns import NO_NAMES, NamePattern, NameSet


@dataclass(frozen=True, slots=True)
class ManagementRights:
    """The rights of one caller of the management API.

    - `name`: the caller's account. None: the caller has no account.
    - `admin`: whether the caller may do everything.
    - `is_logged_in_as_person`: whether the caller is a person with an account in the store, who logged in with the
      account's password or at the OpenID provider. False for robots (accounts for programs), and for logins with a
      token of any kind.
    - `token`: the id of the API token with which the caller logged in. None: the caller used no API token.
    - `session`: the id of the caller's login session. None: the request came without one.
    - `grantable_names`: the names of the repositories on which the caller may give rights to others.
    """

    name: str | None
    admin: bool = False
    is_logged_in_as_person: bool = False
    token: str | None = None
    session: str | None = None
    grantable_names: NameSet = NO_NAMES

    @property
    def account_name(self) -> str:
        """The name of the caller's account. Raises Unauthorized if the caller has none."""
        if self.name is None:
            raise Unauthorized("log in: this needs an account")
        return self.name

    def check_admin(self) -> None:
        """Checks that the caller is an admin, who may do everything. Raises Denied if not, or Unauthorized if the
        caller has no account."""
        if not self.admin:
            raise Denied(f"{self.account_name} is not an admin, or uses a limited token")

    def check_may_see(self, name: AccountName) -> None:
        """Checks that the caller may see the account `name`. An admin may see all accounts, and other callers only
        their own. Raises AccountHidden if the caller may not see it, whether or not it exists. Raises Unauthorized if
        the caller has no account."""
        if not self.admin and self.account_name != name:
            raise AccountHidden(f"there is no account {name}")

    def check_may_change_credentials(self, name: AccountName) -> None:
        """Checks that the caller may set the password of the account `name`, or make an API token for this account. An
        admin may do both for all accounts. Another caller may do both only for the caller's own account, and only if
        `is_logged_in_as_person` is true. A login with a token does not suffice, because the new credential would still
        be valid after the token was revoked.

        - Raises Unauthorized if the caller has no account.
        - Raises AccountHidden if the caller may not see the account `name`.
        - Raises Denied if the caller may see the account, but may not change its credentials.
        """
        self.check_may_see(name)
        if not self.admin and not self.is_logged_in_as_person:
            raise Denied(
                "only a person may do this: log in with a password or at the OpenID provider, to an account that this "
                "registry stores; a token does not suffice"
            )

    def check_may_revoke(self, token: ApiToken) -> None:
        """Checks that the caller may revoke `token`. An admin may revoke all tokens. If `is_logged_in_as_person` is
        true, the caller may revoke all tokens of the caller's own account. A caller who logged in with an API token may
        revoke this token. For all other tokens, raises AccountHidden if the token belongs to another account, and
        Denied if it belongs to the caller's account."""
        if self.admin or token.id == self.token:
            return
        if token.account != self.name:
            raise AccountHidden("there is no such API token; it was revoked, or has expired")
        self.check_may_change_credentials(token.account)

    def check_may_end_sessions(self, name: AccountName) -> None:
        """Checks that the caller may end login sessions of the account `name`. An admin may end the sessions of all
        accounts. Another caller may end only the sessions of the caller's own account, and only in these cases:

        - `is_logged_in_as_person` is true.
        - `session` is not None. Only people have login sessions. People with an account in the htpasswd file need this
          case, because `is_logged_in_as_person` is false for them.

        The errors:

        - Raises Unauthorized if the caller has no account.
        - Raises AccountHidden if the caller may not see the account `name`.
        - Raises Denied if the caller may see the account, but may not end its sessions.
        """
        self.check_may_see(name)
        if not self.admin and not self.is_logged_in_as_person and self.session is None:
            raise Denied(
                "log in with a browser for this, or with the password of an account that this registry stores; "
                "a token does not suffice"
            )

    def check_may_end(self, session: LoginSession) -> None:
        """Checks that the caller may end a login session, by the rules of `check_may_end_sessions`. If the session
        belongs to another account, and the caller is not an admin, raises AccountHidden: the same error as for a
        session that does not exist."""
        if not self.admin and session.account != self.name:
            raise AccountHidden("there is no such session, or it has ended")
        self.check_may_end_sessions(session.account)

    def may_grant(self, pattern: NamePattern) -> bool:
        """Returns whether the caller may give others rights on all names that `pattern` matches. A caller without an
        account may not, even if a grant gives everyone the action `admin`."""
        return self.admin or (self.name is not None and self.grantable_names.covers(pattern))

    def check_may_grant(self, pattern: NamePattern) -> None:
        """Checks that the caller may give others rights on all names that `pattern` matches. Raises Denied if not, or
        Unauthorized if the caller has no account."""
        if not self.may_grant(pattern):
            raise Denied(
                f"{self.account_name} may not grant rights on {pattern}: this needs the action admin on all "
                "repositories that it matches"
            )


ALL_MANAGEMENT_RIGHTS = ManagementRights(None, admin=True)
"""The management rights of a caller on the registry's own machine while the registry has no accounts. The caller may do
everything, such as add the first account."""


def management_rights_of(principal: Principal) -> ManagementRights:
    """Returns the management rights of a principal. A principal without an account may do nothing."""
    identity = principal.identity
    # `used_token` is also False for a login with a token of a trusted issuer. The account of such a login is always a
    # robot, so `is_logged_in_as_person` is false anyway.
    used_token = identity.token is not None or identity.access is not None
    is_stored = identity.version is not None
    return ManagementRights(
        identity.name,
        admin=principal.admin,
        is_logged_in_as_person=is_stored and not identity.robot and not used_token,
        token=identity.token,
        session=identity.session,
        grantable_names=principal.names_allowing(Action.ADMIN),
    )
