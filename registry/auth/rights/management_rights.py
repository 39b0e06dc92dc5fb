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
    - `token_id`: the id of the API token with which the caller logged in. None: the caller used no API token.
    - `session_id`: the id of the caller's login session. None: the caller has no login session.
    - `grantable_names`: the names of the repositories on which the caller may give rights to others.
    """

    name: str | None
    admin: bool = False
    is_logged_in_as_person: bool = False
    token_id: str | None = None
    session_id: str | None = None
    grantable_names: NameSet = NO_NAMES

    @property
    def account_name(self) -> str:
        """The name of the caller's account. Raises Unauthorized if the caller has none."""
        if self.name is None:
            raise Unauthorized("log in: this needs an account")
        return self.name

    def check_admin(self) -> None:
        """Checks that `admin` is true. If it is false, raises Unauthorized for a caller without an account, and Denied
        for other callers."""
        if not self.admin:
            raise Denied(f"{self.account_name} is not an admin, or uses a limited token")

    def check_may_see(self, name: AccountName) -> None:
        """Checks that the caller may see the account `name`. An admin may see all accounts. Other callers may see only
        their own account. Raises Unauthorized if the caller has no account. Raises AccountHidden if the caller may not
        see the account `name`, whether or not this account exists."""
        if not self.admin and self.account_name != name:
            raise AccountHidden(f"there is no account {name}")

    def check_may_change_credentials(self, name: AccountName) -> None:
        """Checks that the caller may set the password of the account `name`, and make API tokens for this account. An
        admin may change the credentials of all accounts. Another caller may change only the credentials of the caller's
        own account, and only if `is_logged_in_as_person` is true. A login with a token does not suffice, because the
        new credential would still be valid after the token was revoked.

        - Raises Unauthorized if the caller has no account.
        - Raises AccountHidden if the caller may not see the account `name`.
        - Raises Denied if the caller may see the account, but may not change its credentials.
        """
        self.check_may_see(name)
        if not self.admin and not self.is_logged_in_as_person:
            raise Denied(
                "only a person may do this: log in to an account that this registry stores, with its password or at "
                "the OpenID provider; a token does not suffice"
            )

    def check_may_revoke(self, token: ApiToken) -> None:
        """Checks that the caller may revoke `token`.

        - An admin may revoke every token.
        - A caller whose `is_logged_in_as_person` is true may revoke every token of the caller's own account.
        - A caller who logged in with an API token may revoke the token of this login.
        - In every other case, raises Denied if `token` belongs to the caller's own account, and AccountHidden if it
          belongs to another account."""
        if self.admin or token.id == self.token_id:
            return
        if token.account != self.name:
            raise AccountHidden("there is no such API token; it was revoked, or has expired")
        self.check_may_change_credentials(token.account)

    def check_may_end_sessions(self, name: AccountName) -> None:
        """Checks that the caller may end login sessions of the account `name`. An admin may end the sessions of all
        accounts. Another caller may end only the sessions of the caller's own account, and only if
        `is_logged_in_as_person` is true or the caller has a login session. Only people have login sessions, including
        people whose account is in the htpasswd file.

        - Raises Unauthorized if the caller has no account.
        - Raises AccountHidden if the caller may not see the account `name`.
        - Raises Denied if the caller may see the account, but may not end its sessions.
        """
        self.check_may_see(name)
        if not self.admin and not self.is_logged_in_as_person and self.session_id is None:
            raise Denied(
                "to end login sessions, log in with a browser or with the password of an account that this registry "
                "stores; a token does not suffice"
            )

    def check_may_end(self, session: LoginSession) -> None:
        """Checks that the caller may end a login session, by the rules of `check_may_end_sessions`. If the caller is
        not an admin and the session belongs to another account, raises AccountHidden, as for a session that does not
        exist."""
        if not self.admin and session.account != self.name:
            raise AccountHidden("there is no such session, or it has ended")
        self.check_may_end_sessions(session.account)

    def may_grant(self, pattern: NamePattern) -> bool:
        """Returns whether the caller may give others rights on all names that `pattern` matches.

        - If `admin` is true, the caller may grant everything.
        - Otherwise, a caller without an account may grant nothing. `grantable_names` can have names even for such a
          caller, if there is a grant of the action `admin` to everyone. These names do not count.
        - Otherwise, `grantable_names` decides."""
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
"""The rights of every caller on the registry's own machine while the registry has no accounts. Such a caller may do
everything. For example, the caller may add the first account."""


def management_rights_of(principal: Principal) -> ManagementRights:
    """Returns the management rights of the caller that `principal` describes. A caller without an account may do
    nothing."""
    identity = principal.identity
    # True for an API token (`identity.token`) and for a bearer token of this registry (`identity.access`). False for a
    # token of another issuer. Such a token always logs in as a robot, and `identity.robot` excludes robots below.
    used_token = identity.token is not None or identity.access is not None
    is_stored = identity.version is not None
    return ManagementRights(
        identity.name,
        admin=principal.admin,
        is_logged_in_as_person=is_stored and not identity.robot and not used_token,
        token_id=identity.token,
        session_id=identity.session,
        grantable_names=principal.names_allowing(Action.ADMIN),
    )
