"""What somebody may administer. Refusals depend on who asks, never on what there is."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Final

from registry.auth.rights.pattern_containment import QUESTION_STEPS, StepBudget, covers
from registry.auth.rights.principal import Principal
from storage.access import AccountName, AccountUnknown, Action, ApiToken
from storage.errors import Denied, Unauthorized
from storage.patterns import NO_NAMES, NamePattern, NameSet

_LOOK_STEPS: Final = 4
"""Steps of effort that a look at a pattern counts for."""


@dataclass(frozen=True, slots=True)
class ManagementRights:
    """`name`: None is nobody. `admin`: may do all, by a credential that is not limited. `person`: logged in with the
    password itself or at the OpenID provider, so it is somebody and not a program that was given a token. `token`: the
    API token it logged in with. `grantable_names`: the names it may grant on, with this credential."""

    name: str | None
    admin: bool = False
    person: bool = False
    token: str | None = None
    grantable_names: NameSet = NO_NAMES
    _effort: StepBudget = field(default_factory=StepBudget, repr=False, compare=False)

    @property
    def somebody(self) -> str:
        """Raises Unauthorized for nobody."""
        if self.name is None:
            raise Unauthorized("log in: this needs an account")
        return self.name

    def check_admin(self) -> None:
        """Raises Unauthorized, Denied."""
        if not self.admin:
            raise Denied(f"{self.somebody} is no admin, or its token is limited")

    def check_may_see(self, name: AccountName) -> None:
        """Raises Unauthorized; AccountUnknown for another's account, whether or not there is one."""
        if not self.admin and self.somebody != name:
            raise AccountUnknown(f"there is no account {name}")

    def check_may_add_credential(self, name: AccountName) -> None:
        """May make what outlives this request for `name`: a password, an API token. A token makes no token, so that
        revoking one ends what it could do. Raises Unauthorized, AccountUnknown, Denied."""
        self.check_may_see(name)
        if not self.admin and not self.person:
            raise Denied(
                "this takes a person's login, with a password of this registry's own or at the OpenID provider, "
                "not with an API token or another's"
            )

    def check_token(self, token: ApiToken) -> None:
        """May revoke it. One that is somebody else's is as one that never was. Raises AccountUnknown, Denied."""
        if self.admin or token.id == self.token:
            return
        if token.account != self.name:
            raise AccountUnknown("there is no such API token; it was revoked, or has expired")
        self.check_may_add_credential(token.account)

    def may_grant(self, pattern: NamePattern) -> bool:
        """Nobody may, even where the action admin is granted to everyone."""
        return self.admin or (self.name is not None and self._reaches(pattern))

    @property
    def exhausted(self) -> bool:
        """What may be spent on comparing patterns in a request is spent: `may_grant` says no from here on."""
        return self._effort.left <= QUESTION_STEPS

    def _reaches(self, pattern: NamePattern) -> bool:
        if not self._covered(pattern, self.grantable_names.patterns, self.grantable_names.guarded):
            return False
        return self.grantable_names.limits is None or self._covered(pattern, self.grantable_names.limits)

    def _covered(self, pattern: NamePattern, by: Iterable[NamePattern], guarded: Collection[str] = ()) -> bool:
        """Whether one of them covers it. Where their texts before the first star differ, none does."""
        prefix, effort = pattern.prefix, self._effort
        for outer in by:
            effort.left -= _LOOK_STEPS
            if effort.left <= 0:
                return False
            begins = outer.prefix
            if (prefix.startswith(begins) or begins.startswith(prefix)) and covers(outer, pattern, guarded, effort):
                return True
        return False

    def check_grant(self, pattern: NamePattern) -> None:
        """Raises Unauthorized, Denied."""
        if not self.may_grant(pattern):
            raise Denied(f"{self.somebody} may not grant on {pattern}; that takes the action admin on all of it")


UNRESTRICTED = ManagementRights(None, admin=True)
"""Of who needs no account: the operator at the command line, and this machine's own while the registry is open."""


def management_rights_of(principal: Principal) -> ManagementRights:
    """Of who logged in. While the registry is open, that is nobody."""
    proof = principal.identity
    return ManagementRights(
        proof.name,
        admin=principal.admin,
        # Not by an API token, a token of /token or an issuer's (which is a robot's): none is to outlive itself.
        person=proof.version is not None and not proof.robot and proof.token is None and proof.access is None,
        token=proof.token,
        grantable_names=principal.names(Action.ADMIN),
    )
