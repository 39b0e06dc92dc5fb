"""The policy decides what an account may do. It combines grants, groups, limits of tokens, and private upstreams. The
tests use a store on disk."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from registry.auth.revocation import RevocationCheck
from registry.auth.rights.policy import Policy
from registry.auth.rights.principal import ANONYMOUS, CATALOG, Identity, Rights, current_principal
from storage.access import EVERY_ACTION, AccountName, Action, ApiToken, Grantee
from storage.accounts import Accounts
from storage.errors import Unauthorized
from storage.names import RepositoryName
from storage.patterns import NamePattern, NameSet
from tests.fakes.store_accounts import BY, add_account, add_grant, limit

PULL, PUSH, DELETE = Action.PULL, Action.PUSH, Action.DELETE


def test_without_a_principal_nothing_is_allowed() -> None:
    """The default principal, before a request is authenticated, may do nothing."""
    principal = current_principal()
    assert principal.action_bits("team/app", "team/app") == 0
    assert not principal.may_list
    assert not principal.admin
    assert "team/app" not in principal.names_allowing(PULL)


async def test_without_accounts_everyone_may_pull_push_and_delete(accounts: Accounts, policy: Policy) -> None:
    """Before the first account, everyone may pull, push and delete. Nobody may grant rights, or pull from a private
    upstream. After the first account was added, anonymous clients lose these rights for good, even if the account is
    removed later."""
    anonymous = policy.principal(ANONYMOUS)
    assert anonymous.is_registry_open
    assert anonymous.may(PULL | PUSH | DELETE, "team/app")
    assert not anonymous.may(Action.ADMIN, "team/app")
    assert not anonymous.may(PULL, "private.example/team/app")
    assert anonymous.may_list
    await add_account(accounts, "alice")
    assert not policy.principal(ANONYMOUS).is_registry_open
    assert not policy.principal(ANONYMOUS).may(PULL, "team/app")
    await accounts.remove_account(AccountName("alice"), by=BY)
    assert not policy.principal(ANONYMOUS).may(PULL, "team/app")


async def test_other_sources_of_accounts_close_the_registry(accounts: Accounts) -> None:
    """If the settings have an htpasswd file or an issuer, anonymous clients have no rights, although the store has no
    accounts."""
    policy = Policy(accounts, RevocationCheck(accounts), is_closed=True)
    assert not policy.anonymous().may(PULL, "team/app")


async def test_grants_add_up(accounts: Accounts, policy: Policy) -> None:
    """An account has the actions of its own grants, and of the grants to its groups, to all accounts and to everyone.
    No action includes another action."""
    alice = await add_account(accounts, "alice")
    bob = await add_account(accounts, "bob")
    await accounts.add_group(AccountName("dev"), by=BY)
    await accounts.add_member(AccountName("dev"), AccountName("alice"), by=BY)
    await add_grant(accounts, "user:alice", "own/*", "push")
    await add_grant(accounts, "group:dev", "team/**", "pull,push")
    await add_grant(accounts, "authenticated", "shared/**", "pull")
    await add_grant(accounts, "everyone", "public/**", "pull")
    principal = policy.principal(alice)
    names = ("own/a", "own/a/b", "team/a/b", "shared/x", "public/x", "x")
    assert [principal.action_bits(name, name) for name in names] == [PUSH, 0, PULL | PUSH, PULL, PULL, 0]
    others = ("own/a", "team/a", "shared/x", "public/x")
    principal = policy.principal(bob)
    assert [principal.action_bits(name, name) for name in others] == [0, 0, PULL, PULL]
    principal = policy.anonymous()
    assert [principal.action_bits(name, name) for name in others] == [0, 0, 0, PULL]


async def test_a_grant_to_a_robot_does_not_apply_to_a_user(accounts: Accounts, policy: Policy) -> None:
    """A grant to a robot does not apply to a user of the same name."""
    robot = await add_account(accounts, "ci", robot=True)
    await add_grant(accounts, "robot:ci", "team/**", "push")
    assert policy.principal(robot).may(PUSH, "team/app")
    user = replace(robot, robot=False)
    assert not policy.principal(user).may(PUSH, "team/app")


async def test_groups_in_an_issuers_token_apply_to_its_requests(accounts: Accounts, policy: Policy) -> None:
    """The groups in an issuer's token apply to requests with this token. They do not apply to other requests of the
    account."""
    robot = await add_account(accounts, "ci", robot=True)
    await accounts.add_group(AccountName("release"), by=BY)
    await add_grant(accounts, "group:release", "team/**", "push")
    assert policy.principal(replace(robot, groups=("release", "No Group!"))).may(PUSH, "team/app")
    assert not policy.principal(robot).may(PUSH, "team/app")


async def test_an_admin_may_do_everything(accounts: Accounts, policy: Policy) -> None:
    """An admin may do everything, also below private upstreams. An admin with a limited credential does not have the
    rights of an admin."""
    root = await add_account(accounts, "root", admin=True)
    principal = policy.principal(root)
    assert principal.admin
    assert principal.may(EVERY_ACTION, "private.example/team/app")
    assert principal.listable_names.has_every_name
    assert not policy.principal(replace(root, access={"team/app": PULL})).admin
    assert not policy.principal(replace(root, limits=(limit("**", "*"),))).admin


async def test_a_private_upstream_needs_a_grant_that_names_it(accounts: Accounts, policy: Policy) -> None:
    """The patterns `**` and `private.*/**` do not match repositories of a private upstream. A pattern that begins with
    the upstream's name does."""
    alice = await add_account(accounts, "alice")
    await add_grant(accounts, "user:alice", "**", "pull")
    await add_grant(accounts, "user:alice", "private.*/**", "pull")
    principal = policy.principal(alice)
    assert principal.may(PULL, "docker.io/library/ubuntu")
    assert not principal.may(PULL, "private.example/team/app")
    assert RepositoryName("private.example/team/app") not in principal.listable_names
    await add_grant(accounts, "user:alice", "private.example/team/*", "pull")
    principal = policy.principal(alice)
    assert principal.may(PULL, "private.example/team/app")
    assert RepositoryName("private.example/team/app") in principal.listable_names
    assert not principal.may(PULL, "private.example/other")


async def test_an_identity_is_refused_after_its_account_changed(accounts: Accounts, policy: Policy) -> None:
    """An identity is refused after its account was disabled or removed, even if a new account of the same name was
    added."""
    alice = await add_account(accounts, "alice")
    policy.principal(alice)
    await accounts.set_enabled(AccountName("alice"), False, by=BY)
    with pytest.raises(Unauthorized):
        policy.principal(alice)
    await accounts.remove_account(AccountName("alice"), by=BY)
    with pytest.raises(Unauthorized):
        policy.principal(alice)
    new_identity = await add_account(accounts, "alice")
    with pytest.raises(Unauthorized):
        policy.principal(alice)
    policy.principal(new_identity)


async def test_removed_grants_no_longer_apply(accounts: Accounts, policy: Policy) -> None:
    """After a grant was removed, the account can still log in, but no longer has the rights of the grant. The store's
    epoch, a number that increases with each change of the rights, has changed."""
    alice = await add_account(accounts, "alice")
    await add_grant(accounts, "user:alice", "team/**", "pull")
    assert policy.principal(alice).may(PULL, "team/app")
    epoch_before = accounts.epoch()
    await accounts.remove_grant(Grantee.parse("user:alice"), NamePattern("team/**"), by=BY)
    assert accounts.epoch() != epoch_before
    assert not policy.principal(alice).may(PULL, "team/app")


async def test_grants_are_read_again_only_after_a_change_of_grants(
    accounts: Accounts, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every client can change the epoch, such as by revoking its own API tokens in a loop. So after a change of the
    epoch that changes no grant, the policy computes the rights of others without reading their grants again: a group
    can have thousands. After a change of a grant, it reads them."""
    alice = await add_account(accounts, "alice")
    await accounts.add_group(AccountName("dev"), by=BY)
    await accounts.add_member(AccountName("dev"), AccountName("alice"), by=BY)
    await add_grant(accounts, "group:dev", "team/**", "pull")
    policy.principal(alice)
    read_subjects: list[Grantee] = []
    read_grants = accounts.patterns_by_actions

    def record_read(subjects: Sequence[Grantee]) -> Mapping[Action, frozenset[NamePattern]]:
        read_subjects.extend(subjects)
        return read_grants(subjects)

    monkeypatch.setattr(accounts, "patterns_by_actions", record_read)
    await add_account(accounts, "mallory")
    await accounts.revoke_token(await add_token(accounts, "mallory"), by=BY)
    await accounts.set_password(AccountName("mallory"), "a hash", by=BY)
    await policy.prepare(alice)
    assert policy.principal(alice).epoch == accounts.epoch()
    assert policy.principal(alice).may(PULL, "team/app")
    assert read_subjects == []
    await add_grant(accounts, "group:dev", "team/**", "push")
    assert policy.principal(alice).may(PUSH, "team/app")
    assert not policy.principal(alice).may(PULL, "team/app")
    assert Grantee.parse("group:dev") in read_subjects
    await accounts.remove_member(AccountName("dev"), AccountName("alice"), by=BY)
    assert not policy.principal(alice).may(PUSH, "team/app")


async def add_token(accounts: Accounts, account: str, *limits: tuple[str, str]) -> str:
    token = ApiToken(
        "T" * 12, AccountName(account), "personal", "", 0.0, limits=tuple(limit(*each) for each in limits) or None
    )
    await accounts.add_token(token, b"h" * 32, by=BY)
    return token.id


async def test_limits_of_an_api_token_only_remove_rights(accounts: Accounts, policy: Policy) -> None:
    """A request with an API token may do what is allowed both by the account's grants and by the token's limits. The
    policy reads the limits from the store, and ignores those in the identity."""
    alice = await add_account(accounts, "alice")
    await add_grant(accounts, "user:alice", "team/**", "pull,push")
    token = await add_token(accounts, "alice", ("team/app", "pull,delete"), ("other/**", "pull"))
    principal = policy.principal(replace(alice, token=token, limits=(limit("**", "*"),)))
    assert principal.action_bits("team/app", "team/app") == PULL
    assert principal.action_bits("team/web", "team/web") == 0
    assert principal.action_bits("other/app", "other/app") == 0
    assert principal.account_may(PUSH, "team/app")
    assert [name for name in ("team/app", "team/web", "other/app") if name in principal.listable_names] == ["team/app"]
    await accounts.revoke_token(token, by=BY)
    with pytest.raises(Unauthorized):
        policy.principal(replace(alice, token=token))


async def test_a_limit_gives_no_access_to_a_private_upstream(accounts: Accounts, policy: Policy) -> None:
    """If a token's limits name a private upstream, but its account has no grant for the upstream, the token allows
    neither pulls from the upstream's repositories nor a list of them."""
    alice = await add_account(accounts, "alice")
    await add_grant(accounts, "user:alice", "**", "pull")
    principal = policy.principal(replace(alice, limits=(limit("private.example/**", "pull"),)))
    assert not principal.may(PULL, "private.example/team/app")
    assert RepositoryName("private.example/team/app") not in principal.listable_names
    assert principal.listable_names.seek("") is None


async def test_the_access_of_a_bearer_token_only_removes_rights(accounts: Accounts, policy: Policy) -> None:
    """An action needs both the access in the bearer token and a grant. The token has the repository's name that the
    client uses, and the grant has the stored name."""
    alice = await add_account(accounts, "alice")
    await add_grant(accounts, "user:alice", "docker.io/**", "pull")
    principal = policy.principal(replace(alice, access={"ubuntu": PULL | PUSH, "team/app": PULL}))
    assert principal.may(PULL, "docker.io/library/ubuntu", "ubuntu")
    assert not principal.may(PUSH, "docker.io/library/ubuntu", "ubuntu")
    assert not principal.may(PULL, "docker.io/library/ubuntu", "library/ubuntu")
    assert not principal.may(PULL, "team/app")
    assert principal.account_may(PULL, "docker.io/library/debian")


async def test_a_name_in_a_tokens_access_is_never_a_pattern(accounts: Accounts, policy: Policy) -> None:
    """A name in a bearer token's access is never a pattern, even if it looks like one."""
    alice = await add_account(accounts, "alice")
    await add_grant(accounts, "user:alice", "team/*", "pull")
    principal = policy.principal(replace(alice, access={"team/**": PULL, "**": PULL, "team/app": PULL, CATALOG: PULL}))
    assert not principal.may(PULL, "team/web")
    assert principal.names_allowing(PULL) == NameSet.of({"team/app"})


async def test_a_list_needs_access_to_the_catalog(accounts: Accounts, policy: Policy) -> None:
    """The list of repositories needs a bearer token with access to the catalog. It has all repositories that the
    account may pull. With an anonymous token, it has those that everyone may pull. An anonymous request without a token
    gets no list."""
    alice = await add_account(accounts, "alice")
    await add_grant(accounts, "user:alice", "team/**", "pull")
    await add_grant(accounts, "everyone", "public/**", "pull")
    assert not policy.principal(replace(alice, access={"team/app": PULL})).may_list
    principal = policy.principal(replace(alice, access={CATALOG: PULL}))
    assert principal.may_list
    assert principal.listable_names.patterns == {NamePattern("team/**"), NamePattern("public/**")}
    assert not policy.anonymous().may_list
    anonymous = policy.principal(Identity(None, access={CATALOG: PULL}))
    assert anonymous.may_list
    assert anonymous.listable_names.patterns == {NamePattern("public/**")}


async def test_access_that_a_bearer_token_can_get(accounts: Accounts, policy: Policy) -> None:
    """A bearer token gets access to the name that the client requests. The name may stand for a repository that a
    mirror stores under another name. Then a push is not allowed."""
    alice = await add_account(accounts, "alice")
    await add_grant(accounts, "user:alice", "docker.io/library/*", "pull,push")
    await add_grant(accounts, "user:alice", "team/**", "pull,push,admin")
    await add_grant(accounts, "user:alice", "private.example/**", "pull")
    assert (await policy.allowed_actions(alice, ["ubuntu"]))["ubuntu"] == PULL
    assert (await policy.allowed_actions(alice, ["library/ubuntu"]))["library/ubuntu"] == PULL
    assert (await policy.allowed_actions(alice, ["docker.io/ubuntu"]))["docker.io/ubuntu"] == PULL
    stored_name = "docker.io/library/ubuntu"
    assert (await policy.allowed_actions(alice, [stored_name]))[stored_name] == PULL | PUSH
    assert (await policy.allowed_actions(alice, ["team/app"]))["team/app"] == PULL | PUSH | Action.ADMIN
    assert (await policy.allowed_actions(alice, ["private.example/x"]))["private.example/x"] == PULL
    # With `ns`, the name can stand for a repository of private.example.
    assert (await policy.allowed_actions(alice, ["bitnami/redis"]))["bitnami/redis"] == PULL
    assert (await policy.allowed_actions(ANONYMOUS, ["team/app"]))["team/app"] == Action.NONE
    await accounts.set_enabled(AccountName("alice"), False, by=BY)
    with pytest.raises(Unauthorized):
        await policy.allowed_actions(alice, ["team/app"])


async def test_the_cache_of_a_principal_has_a_largest_size(accounts: Accounts, policy: Policy) -> None:
    """A principal caches the rights on a limited number of names. Its answers are right for any number of names."""
    alice = await add_account(accounts, "alice")
    await add_grant(accounts, "user:alice", "team/**", "pull")
    principal = policy.principal(alice)
    for number in range(3000):
        assert principal.may(PULL, f"team/{number}")
        assert not principal.may(PULL, f"other/{number}")
    assert len(principal._cached_bits) <= 64


@pytest.mark.slow
async def test_principals_with_the_same_grants_share_their_rights(accounts: Accounts, policy: Policy) -> None:
    """All principals to which the same grants apply share one object with the rights, so many bearer tokens of an
    account take little more memory than one. They share it also if unrelated rights change between them. When no
    principal has the rights any more, their memory is released."""
    alice, bob = await add_account(accounts, "alice"), await add_account(accounts, "bob")
    for group in ("dev", "ops"):
        await accounts.add_group(AccountName(group), by=BY)
        await accounts.add_member(AccountName(group), AccountName("alice"), by=BY)
        await accounts.add_member(AccountName(group), AccountName("bob"), by=BY)
        await add_grant(accounts, f"group:{group}", f"{group}/**", "pull")
        await add_grant(accounts, f"group:{group}", f"{group}-web/**", "pull,push")
    first = policy.principal(alice)
    for number, same_grants in enumerate((alice, replace(alice, access={"dev/app": PULL}), bob)):
        await add_account(accounts, f"ci{number}", robot=True)  # changes the epoch
        principal = policy.principal(same_grants)
        assert principal.rights is first.rights
        assert principal.epoch == accounts.epoch()
        assert principal.listable_names is first.listable_names
    await add_grant(accounts, "group:ops", "ops-api/**", "pull")
    changed = policy.principal(alice)
    assert changed.may(PULL, "ops-api/app")
    assert not first.may(PULL, "ops-api/app")
    assert policy.principal(bob).rights is changed.rights
    await accounts.remove_member(AccountName("ops"), AccountName("alice"), by=BY)
    assert not policy.principal(alice).may(PULL, "ops/app")
    assert policy.principal(bob).may(PULL, "ops/app")
    del first, principal, changed
    gc.collect()
    assert len(policy._rights_by_grants) == 0


async def test_equal_rights_on_all_repositories_need_no_lookup(accounts: Accounts, policy: Policy) -> None:
    """If a principal may do the same on all repositories, its rights are known without a look at the name. This is no
    longer so after one grant for a narrower pattern."""
    alice = await add_account(accounts, "alice")
    await add_grant(accounts, "user:alice", "**", "pull,push")
    assert policy.principal(alice).rights.actions_everywhere is None  # private.example needs a grant of its own
    policy = Policy(accounts, policy.identity_check)
    principal = policy.principal(alice)
    assert principal.rights.actions_everywhere == (PULL | PUSH).value
    assert principal.action_bits("a", "a") == principal.rights.action_bits("team/app") == (PULL | PUSH).value
    assert principal._cached_bits == {}
    await add_grant(accounts, "user:alice", "team/**", "delete")
    principal = policy.principal(alice)
    assert principal.rights.actions_everywhere is None
    assert principal.action_bits("team/app", "team/app") == (PULL | PUSH | Action.DELETE).value
    assert principal.action_bits("a", "a") == (PULL | PUSH).value


@pytest.mark.parametrize(
    "other",
    [NameSet.of(["team/**"], ["private.example"]), NameSet.of(["team/**"], limits=["team/app"])],
    ids=["guarded", "limits"],
)
def test_rights_refuse_sets_of_names_with_different_limits(other: NameSet) -> None:
    """`Rights` refuses sets of names that have different guarded (private) upstreams or different limits. The union of
    such sets could contain names that are in none of them."""
    with pytest.raises(ValueError, match="guarded"):
        Rights({PULL: NameSet.of(["**"])}, more_names=[(PULL, other)])
