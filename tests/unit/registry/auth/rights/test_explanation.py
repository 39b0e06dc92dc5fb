"""The explanation of an account's rights, which the management API shows. It names the grants that apply, and agrees
with the policy."""

from __future__ import annotations

import pytest

from registry.auth.rights.explanation import RightsExplanation, explain_rights
from registry.auth.rights.policy import Policy
from registry.auth.rights.principal import ANONYMOUS, Identity
from storage.access import EVERY_ACTION, AccountName, Action
from storage.accounts import Accounts
from storage.errors import NameInvalid
from storage.names import RepositoryName
from tests.fakes.store_accounts import BY, add_account, add_grant


async def explanation_of(policy: Policy, account: str | None, repo: str) -> RightsExplanation:
    return await explain_rights(policy, None if account is None else AccountName(account), RepositoryName(repo))


def grants_of(explanation: RightsExplanation) -> list[str]:
    (rights,) = explanation.repositories
    return [f"{grant.subject} {grant.pattern}" for grant in rights.grants]


async def test_the_grants_that_apply_are_named(accounts: Accounts, policy: Policy) -> None:
    """The explanation lists the grants that match the repository's name: those to the account, to its groups, to all
    accounts and to everyone. It lists no other grants. Its actions are those that the policy allows."""
    await accounts.add_group(AccountName("dev"), by=BY)
    identities: dict[str | None, Identity] = {None: ANONYMOUS}
    for name in ("alice", "bob"):
        identities[name] = await add_account(accounts, name)
    await accounts.add_member(AccountName("dev"), AccountName("alice"), by=BY)
    for subject, pattern, actions in (
        ("user:alice", "team/app", "delete"),
        ("user:alice", "other/**", "push"),
        ("group:dev", "team/*", "push"),
        ("authenticated", "team/**", "pull"),
        ("everyone", "public/**", "pull"),
        ("everyone", "**", "admin"),
    ):
        await add_grant(accounts, subject, pattern, actions)
    expected = {
        ("alice", "team/app"): ["authenticated team/**", "everyone **", "group:dev team/*", "user:alice team/app"],
        ("alice", "team/a/b"): ["authenticated team/**", "everyone **"],
        ("bob", "team/app"): ["authenticated team/**", "everyone **"],
        (None, "team/app"): ["everyone **"],
        (None, "public/app"): ["everyone **", "everyone public/**"],
    }
    for (account, repo), grants in expected.items():
        explanation = await explanation_of(policy, account, repo)
        assert sorted(grants_of(explanation)) == grants, (account, repo)
        allowed = policy.principal(identities[account]).action_bits(repo, repo)
        assert explanation.repositories[0].actions == Action(allowed)


async def test_a_private_upstream_needs_its_own_grant(accounts: Accounts, policy: Policy) -> None:
    """Below a private upstream, the explanation lists only grants whose pattern names the upstream. No grant allows a
    push to a mirrored repository."""
    await add_account(accounts, "alice")
    await add_grant(accounts, "user:alice", "**", "*")
    explanation = await explanation_of(policy, "alice", "private.example/app")
    assert (grants_of(explanation), explanation.repositories[0].actions) == ([], Action.NONE)
    await add_grant(accounts, "user:alice", "private.example/**", "pull,push")
    explanation = await explanation_of(policy, "alice", "private.example/app")
    assert grants_of(explanation) == ["user:alice private.example/**"]
    assert explanation.repositories[0].actions == Action.PULL
    assert explanation.repositories[0].upstream == "private.example"
    official = await explanation_of(policy, "alice", "docker.io/ubuntu")
    assert official.repositories[0].name == "docker.io/library/ubuntu"
    assert official.repositories[0].actions == EVERY_ACTION & ~Action.PUSH


async def test_open_registries_admins_and_disabled_accounts(accounts: Accounts, policy: Policy) -> None:
    """The explanation says whether the registry is open (it has no accounts), whether the account is an admin or
    disabled, and whether the store has the account."""
    explanation = await explanation_of(policy, None, "team/app")
    assert explanation.is_registry_open
    assert explanation.repositories[0].actions == Action.PULL | Action.PUSH | Action.DELETE
    await add_account(accounts, "root", admin=True)
    await add_account(accounts, "alice")
    await add_account(accounts, "ci", robot=True)
    for subject in ("user:alice", "robot:ci", "user:unstored"):
        await add_grant(accounts, subject, "team/**", "pull")
    root = await explanation_of(policy, "root", "team/app")
    assert (root.is_admin, root.repositories[0].actions, grants_of(root)) == (True, EVERY_ACTION, [])
    assert grants_of(await explanation_of(policy, "ci", "team/app")) == ["robot:ci team/**"]
    await accounts.set_enabled(AccountName("alice"), False, by=BY)
    alice = await explanation_of(policy, "alice", "team/app")
    assert (alice.is_enabled, alice.repositories[0].actions) == (False, Action.NONE)
    assert grants_of(alice) == ["user:alice team/**"]
    # A name that the store does not have can be an account of the htpasswd file.
    unstored = await explanation_of(policy, "unstored", "team/app")
    assert (unstored.is_stored, unstored.repositories[0].actions) == (False, Action.PULL)


async def test_an_invalid_name_is_refused(policy: Policy) -> None:
    """A name that is not a valid repository name raises NameInvalid."""
    with pytest.raises(NameInvalid):
        await explanation_of(policy, None, "../etc")
