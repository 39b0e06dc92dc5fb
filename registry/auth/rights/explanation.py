"""`explain_rights`: returns what an account, or a client without a login, may do on a repository, and which grants
allow it.

It answers questions such as "why may alice push here?" by the rules that `registry.auth.rights.policy` applies to
requests. The rights of one request can differ: a limited API token allows less, and a login at the OpenID provider can
add groups, whose grants then apply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from registry.auth.rights.policy import Policy
from registry.auth.rights.principal import ANONYMOUS, Identity
from storage.access import Account, AccountKind, AccountName, AccountUnknown, Action, Grant
from storage.names import RepositoryName

MAX_SHOWN_GRANTS: Final = 100
"""The largest number of grants that an explanation names for one repository."""
_ACTIONS_ON_MIRRORED: Final = Action.PULL | Action.DELETE | Action.ADMIN
"""The actions that are possible on a mirrored repository."""


@dataclass(frozen=True, slots=True)
class RepositoryRights:
    """The rights on one repository.

    - `name`: the repository's name in the store.
    - `upstream`: the upstream from which the repository is mirrored. None: the repository is *hosted*: clients push to
      it.
    - `actions`: the allowed actions.
    - `grants`: the grants that apply, at most `MAX_SHOWN_GRANTS`. A grant can name actions that are not in `actions`,
      because nobody can push to a mirrored repository, and a disabled account may do nothing.
    """

    name: RepositoryName
    upstream: str | None
    actions: Action
    grants: tuple[Grant, ...]


@dataclass(frozen=True, slots=True)
class RightsExplanation:
    """The actions that an account may do on a repository, and the grants that allow them.

    - `account`: the account's name. None: the explanation is about a client without a login.
    - `is_stored`: whether the store has the account. If not, the rights are those that an account of this name in the
      htpasswd file would have.
    - `is_enabled`: whether the account is enabled. A disabled account may do nothing.
    - `is_admin`: whether the account is an admin, who may do everything without a grant.
    - `is_registry_open`: whether the registry has no accounts yet. Grants then have no effect. Every client may pull,
      push and delete, except in repositories of a guarded upstream (`require_grant`), where no client may do anything.
    - `repositories`: the rights on the repository. If the name can mean two repositories, the rights on both: first on
      the hosted one, then on the mirrored one.
    """

    account: AccountName | None
    is_stored: bool
    is_enabled: bool
    is_admin: bool
    is_registry_open: bool
    repositories: tuple[RepositoryRights, ...]


async def explain_rights(policy: Policy, account: AccountName | None, repo: RepositoryName) -> RightsExplanation:
    """Returns what `account` (None: a client without a login) may do on the repository that clients call `repo`. Pauses
    now and then so that other tasks can run. Raises NameUnknown and NameInvalid if clients cannot use the name."""
    stored_account = None if account is None else _stored_account(policy, account)
    is_enabled = stored_account is None or stored_account.enabled
    identity = ANONYMOUS if account is None else _identity(account, stored_account)
    await policy.prepare(identity)
    principal = policy.unchecked_principal(identity)
    grants_matter = not principal.is_registry_open and not principal.admin
    repositories = []
    for name in policy.naming.candidates(repo):
        upstream = policy.naming.upstream_of(name)
        allowed = Action(principal.actions(name, name)) if is_enabled else Action.NONE
        grants = await policy.grants_on(identity, name, MAX_SHOWN_GRANTS) if grants_matter else []
        actions = allowed if upstream is None else allowed & _ACTIONS_ON_MIRRORED
        repositories.append(RepositoryRights(name, upstream, actions, tuple(grants)))
    return RightsExplanation(
        account=account,
        is_stored=stored_account is not None,
        is_enabled=is_enabled,
        is_admin=principal.admin,
        is_registry_open=principal.is_registry_open,
        repositories=tuple(repositories),
    )


def _stored_account(policy: Policy, name: AccountName) -> Account | None:
    try:
        return policy.accounts.account(name)
    except AccountUnknown:
        return None


def _identity(name: AccountName, stored_account: Account | None) -> Identity:
    """Returns the identity that a login to the account with an unlimited credential proves."""
    if stored_account is None:
        return Identity(name)
    return Identity(name, robot=stored_account.kind is AccountKind.ROBOT, version=stored_account.version)
