"""Explains which rights an account, or a client without a login, has on a repository, and which grants give these
rights (`explain_rights`). The rules are those of `registry.auth.rights.policy`.

The rights of one request can differ: a limited API token allows less, and a login at the OpenID provider can add
groups, whose grants then apply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from registry.auth.rights.policy import Policy
from registry.auth.rights.principal import ANONYMOUS, Identity
from storage.access import Account, AccountKind, AccountName, AccountUnknown, Action, Grant
from storage.names import RepositoryName

MAX_SHOWN_GRANTS: Final = 100
"""Largest number of grants in an explanation for one repository."""
_ACTIONS_ON_MIRRORED: Final = Action.PULL | Action.DELETE | Action.ADMIN
"""The actions that are possible on a mirrored repository."""


@dataclass(frozen=True, slots=True)
class RepositoryRights:
    """The rights on one repository.

    - `name`: the repository's name in the store.
    - `upstream`: the upstream from which the repository is mirrored. None: the repository is *hosted*, so clients push
      to it.
    - `actions`: the allowed actions.
    - `grants`: the grants that apply, at most `MAX_SHOWN_GRANTS`. A grant can name actions that are not allowed: `push`
      is not allowed on a mirrored repository, and a disabled account is allowed no action.
    """

    name: RepositoryName
    upstream: str | None
    actions: Action
    grants: tuple[Grant, ...]


@dataclass(frozen=True, slots=True)
class RightsExplanation:
    """The actions that are allowed to an account on a repository, and the grants that allow them.

    - `account`: the account's name. None: the explanation is about a client without a login.
    - `is_stored`: whether the store has the account; False for a client without a login. If the store does not have the
      account, the rights are those of an account of this name in the htpasswd file.
    - `is_enabled`: False for a disabled account, which may do nothing; otherwise True.
    - `is_admin`: whether the account is an admin, who may do everything without a grant.
    - `is_registry_open`: whether the registry has no accounts yet. If so, grants have no effect: every client may pull,
      push and delete. But no client may do anything on the repositories of an upstream that needs a grant of its own
      (the setting `require_grant`).
    - `repositories`: the rights on the repository. If the name can mean a hosted and a mirrored repository, the rights
      on both, the hosted repository first.
    """

    account: AccountName | None
    is_stored: bool
    is_enabled: bool
    is_admin: bool
    is_registry_open: bool
    repositories: tuple[RepositoryRights, ...]


async def explain_rights(policy: Policy, account: AccountName | None, repo: RepositoryName) -> RightsExplanation:
    """Returns what `account` (None: a client without a login) may do on the repository that clients call `repo`. Raises
    NameUnknown or NameInvalid if no repository can have this name."""
    stored_account = None if account is None else _stored_account(policy, account)
    is_enabled = stored_account is None or stored_account.enabled
    identity = ANONYMOUS if account is None else _identity(account, stored_account)
    await policy.prepare(identity)
    # `unchecked_principal` computes the rights without a credential, and also for a disabled account.
    principal = policy.unchecked_principal(identity)
    grants_matter = not principal.is_registry_open and not principal.admin
    repositories = []
    for name in policy.naming.candidates(repo):
        upstream = policy.naming.upstream_of(name)
        allowed = Action(principal.action_bits(name, name)) if is_enabled else Action.NONE
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
    """Returns the identity of a client that has logged in to the account without a limited API token."""
    if stored_account is None:
        return Identity(name)
    return Identity(name, robot=stored_account.kind is AccountKind.ROBOT, version=stored_account.version)
