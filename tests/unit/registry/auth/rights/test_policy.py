"""The policy: the rights that follow from grants, groups, limits and private upstreams, over a real store."""

from __future__ import annotations

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
    """A principal that was not authenticated may do nothing."""
    nobody = current_principal()
    assert nobody.actions("team/app", "team/app") == 0
    assert not nobody.may_list
    assert not nobody.admin
    assert "team/app" not in nobody.names(PULL)


async def test_an_open_store_allows_all_to_everybody_until_the_first_account(
    accounts: Accounts, policy: Policy
) -> None:
    """Before the first account, everybody may pull, push and delete. Exceptions are repositories of private upstreams,
    and the right to grant. The first account ends this for good, even if it is removed later."""
    nobody = policy.principal(ANONYMOUS)
    assert nobody.open
    assert nobody.may(PULL | PUSH | DELETE, "team/app")
    assert not nobody.may(Action.ADMIN, "team/app")
    assert not nobody.may(PULL, "private.example/team/app")
    assert nobody.may_list
    await add_account(accounts, "alice")
    assert not policy.principal(ANONYMOUS).open
    assert not policy.principal(ANONYMOUS).may(PULL, "team/app")
    await accounts.remove_account(AccountName("alice"), by=BY)
    assert not policy.principal(ANONYMOUS).may(PULL, "team/app")


async def test_accounts_from_elsewhere_close_the_store(accounts: Accounts) -> None:
    """With an htpasswd file or an issuer in the settings, the registry is closed although the store has no accounts."""
    policy = Policy(accounts, RevocationCheck(accounts), closed=True)
    assert not policy.anonymous().may(PULL, "team/app")


async def test_grants_add_up(accounts: Accounts, policy: Policy) -> None:
    """An account has the actions of its own grants and of those to its groups, to all accounts and to everyone. No
    action includes another."""
    alice = await add_account(accounts, "alice")
    bob = await add_account(accounts, "bob")
    await accounts.add_group(AccountName("dev"), by=BY)
    await accounts.add_member(AccountName("dev"), AccountName("alice"), by=BY)
    await add_grant(accounts, "user:alice", "own/*", "push")
    await add_grant(accounts, "group:dev", "team/**", "pull,push")
    await add_grant(accounts, "authenticated", "shared/**", "pull")
    await add_grant(accounts, "everyone", "public/**", "pull")
    seen = policy.principal(alice)
    assert [seen.actions(name, name) for name in ("own/a", "own/a/b", "team/a/b", "shared/x", "public/x", "x")] == [
        PUSH, 0, PULL | PUSH, PULL, PULL, 0,
    ]  # fmt: skip
    seen = policy.principal(bob)
    assert [seen.actions(name, name) for name in ("own/a", "team/a", "shared/x", "public/x")] == [0, 0, PULL, PULL]
    seen = policy.anonymous()
    assert [seen.actions(name, name) for name in ("own/a", "team/a", "shared/x", "public/x")] == [0, 0, 0, PULL]


async def test_a_robot_and_a_user_are_not_each_other(accounts: Accounts, policy: Policy) -> None:
    """A grant to a robot does not apply to a user of the same name."""
    robot = await add_account(accounts, "ci", robot=True)
    await add_grant(accounts, "robot:ci", "team/**", "push")
    assert policy.principal(robot).may(PUSH, "team/app")
    outsider = replace(robot, robot=False)
    assert not policy.principal(outsider).may(PUSH, "team/app")


async def test_groups_of_an_issuer_count_beside_the_stores(accounts: Accounts, policy: Policy) -> None:
    """The groups in an issuer's token apply to requests with this token, and not to other requests of the account."""
    robot = await add_account(accounts, "ci", robot=True)
    await accounts.add_group(AccountName("release"), by=BY)
    await add_grant(accounts, "group:release", "team/**", "push")
    assert policy.principal(replace(robot, groups=("release", "No Group!"))).may(PUSH, "team/app")
    assert not policy.principal(robot).may(PUSH, "team/app")


async def test_an_admin_may_do_everything(accounts: Accounts, policy: Policy) -> None:
    """An admin may do everything, also below private upstreams. An admin with a limited credential does not have the
    rights of an admin."""
    root = await add_account(accounts, "root", admin=True)
    seen = policy.principal(root)
    assert seen.admin
    assert seen.may(EVERY_ACTION, "private.example/team/app")
    assert seen.listable_names.has_every_name
    assert not policy.principal(replace(root, access={"team/app": PULL})).admin
    assert not policy.principal(replace(root, limits=(limit("**", "*"),))).admin


async def test_a_private_upstream_wants_a_grant_of_its_own(accounts: Accounts, policy: Policy) -> None:
    """The patterns `**` and `private.*/**` do not match repositories of a private upstream. A pattern that begins with
    the upstream's name does."""
    alice = await add_account(accounts, "alice")
    await add_grant(accounts, "user:alice", "**", "pull")
    await add_grant(accounts, "user:alice", "private.*/**", "pull")
    seen = policy.principal(alice)
    assert seen.may(PULL, "docker.io/library/ubuntu")
    assert not seen.may(PULL, "private.example/team/app")
    assert RepositoryName("private.example/team/app") not in seen.listable_names
    await add_grant(accounts, "user:alice", "private.example/team/*", "pull")
    seen = policy.principal(alice)
    assert seen.may(PULL, "private.example/team/app")
    assert RepositoryName("private.example/team/app") in seen.listable_names
    assert not seen.may(PULL, "private.example/other")


async def test_what_changed_since_ends_a_proof(accounts: Accounts, policy: Policy) -> None:
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
    again = await add_account(accounts, "alice")
    with pytest.raises(Unauthorized):
        policy.principal(alice)
    policy.principal(again)


async def test_rights_are_those_of_this_moment(accounts: Accounts, policy: Policy) -> None:
    """After a grant was removed, the account can still log in, but no longer has the rights of the grant. The epoch of
    the store has increased."""
    alice = await add_account(accounts, "alice")
    await add_grant(accounts, "user:alice", "team/**", "pull")
    assert policy.principal(alice).may(PULL, "team/app")
    before = accounts.epoch()
    await accounts.remove_grant(Grantee.parse("user:alice"), NamePattern("team/**"), by=BY)
    assert accounts.epoch() != before
    assert not policy.principal(alice).may(PULL, "team/app")


async def add_token(accounts: Accounts, account: str, *limits: tuple[str, str]) -> str:
    token = ApiToken(
        "T" * 12, AccountName(account), "personal", "", 0.0, limits=tuple(limit(*each) for each in limits) or None
    )
    await accounts.add_token(token, b"h" * 32, by=BY)
    return token.id


async def test_an_api_tokens_limits_only_take_away(accounts: Accounts, policy: Policy) -> None:
    """A request with an API token may do what both the account's grants and the token's limits allow. The limits are
    read from the store, and not from the identity."""
    alice = await add_account(accounts, "alice")
    await add_grant(accounts, "user:alice", "team/**", "pull,push")
    token = await add_token(accounts, "alice", ("team/app", "pull,delete"), ("other/**", "pull"))
    seen = policy.principal(replace(alice, token=token, limits=(limit("**", "*"),)))
    assert seen.actions("team/app", "team/app") == PULL
    assert seen.actions("team/web", "team/web") == 0
    assert seen.actions("other/app", "other/app") == 0
    assert seen.account_may(PUSH, "team/app")
    assert [name for name in ("team/app", "team/web", "other/app") if name in seen.listable_names] == ["team/app"]
    await accounts.revoke_token(token, by=BY)
    with pytest.raises(Unauthorized):
        policy.principal(replace(alice, token=token))


async def test_a_limit_does_not_open_a_private_upstream(accounts: Accounts, policy: Policy) -> None:
    """A token whose limits name a private upstream, but whose account has no grant for it, allows neither a pull from
    its repositories nor a list of them."""
    alice = await add_account(accounts, "alice")
    await add_grant(accounts, "user:alice", "**", "pull")
    seen = policy.principal(replace(alice, limits=(limit("private.example/**", "pull"),)))
    assert not seen.may(PULL, "private.example/team/app")
    assert RepositoryName("private.example/team/app") not in seen.listable_names
    assert seen.listable_names.seek("") is None


async def test_a_tokens_access_only_takes_away(accounts: Accounts, policy: Policy) -> None:
    """A bearer token names repositories as the client does, and grants name them as the store does. An action needs
    both the token and a grant."""
    alice = await add_account(accounts, "alice")
    await add_grant(accounts, "user:alice", "docker.io/**", "pull")
    seen = policy.principal(replace(alice, access={"ubuntu": PULL | PUSH, "team/app": PULL}))
    assert seen.may(PULL, "docker.io/library/ubuntu", "ubuntu")
    assert not seen.may(PUSH, "docker.io/library/ubuntu", "ubuntu")
    assert not seen.may(PULL, "docker.io/library/ubuntu", "library/ubuntu")
    assert not seen.may(PULL, "team/app")
    assert seen.account_may(PULL, "docker.io/library/debian")


async def test_a_token_that_was_granted_patterns_was_granted_nothing(accounts: Accounts, policy: Policy) -> None:
    """A name in a token's access is never a pattern, even if it looks like one."""
    alice = await add_account(accounts, "alice")
    await add_grant(accounts, "user:alice", "team/*", "pull")
    seen = policy.principal(replace(alice, access={"team/**": PULL, "**": PULL, "team/app": PULL, CATALOG: PULL}))
    assert not seen.may(PULL, "team/web")
    assert seen.names(PULL) == NameSet.of({"team/app"})


async def test_a_list_takes_the_catalog_and_shows_what_may_be_pulled(accounts: Accounts, policy: Policy) -> None:
    """The list of repositories needs a token with access to the catalog, and shows all that the account may pull. A
    request without a token gets no list. With an anonymous token, the list shows what everyone may pull."""
    alice = await add_account(accounts, "alice")
    await add_grant(accounts, "user:alice", "team/**", "pull")
    await add_grant(accounts, "everyone", "public/**", "pull")
    assert not policy.principal(replace(alice, access={"team/app": PULL})).may_list
    seen = policy.principal(replace(alice, access={CATALOG: PULL}))
    assert seen.may_list
    assert seen.listable_names.patterns == {NamePattern("team/**"), NamePattern("public/**")}
    assert not policy.anonymous().may_list
    anonymous = policy.principal(Identity(None, access={CATALOG: PULL}))
    assert anonymous.may_list
    assert anonymous.listable_names.patterns == {NamePattern("public/**")}


async def test_what_a_token_can_be_granted(accounts: Accounts, policy: Policy) -> None:
    """A token is granted access to the name that the client asks for. Pulls and deletes can be granted even if a mirror
    stores the repository under another name."""
    alice = await add_account(accounts, "alice")
    await add_grant(accounts, "user:alice", "docker.io/library/*", "pull,push")
    await add_grant(accounts, "user:alice", "team/**", "pull,push,admin")
    await add_grant(accounts, "user:alice", "private.example/**", "pull")
    assert (await policy.allowed(alice, ["ubuntu"]))["ubuntu"] == PULL
    assert (await policy.allowed(alice, ["library/ubuntu"]))["library/ubuntu"] == PULL
    assert (await policy.allowed(alice, ["docker.io/ubuntu"]))["docker.io/ubuntu"] == PULL
    assert (await policy.allowed(alice, ["docker.io/library/ubuntu"]))["docker.io/library/ubuntu"] == PULL | PUSH
    assert (await policy.allowed(alice, ["team/app"]))["team/app"] == PULL | PUSH | Action.ADMIN
    assert (await policy.allowed(alice, ["private.example/x"]))["private.example/x"] == PULL
    assert (await policy.allowed(alice, ["bitnami/redis"]))["bitnami/redis"] == PULL  # private.example may have it
    assert (await policy.allowed(ANONYMOUS, ["team/app"]))["team/app"] == Action.NONE
    await accounts.set_enabled(AccountName("alice"), False, by=BY)
    assert (await policy.allowed(alice, ["team/app"]))["team/app"] == Action.NONE


async def test_what_is_remembered_of_a_principal_is_bounded(accounts: Accounts, policy: Policy) -> None:
    """A principal caches the rights on a bounded number of names. The answers are right for any number of names."""
    alice = await add_account(accounts, "alice")
    await add_grant(accounts, "user:alice", "team/**", "pull")
    seen = policy.principal(alice)
    for number in range(3000):
        assert seen.may(PULL, f"team/{number}")
        assert not seen.may(PULL, f"other/{number}")
    assert len(seen._cached_bits) <= 64


async def test_where_no_name_makes_a_difference(accounts: Accounts, policy: Policy) -> None:
    """If a principal may do the same on all repositories, its rights are known without a look at the name. One grant
    for a narrower pattern ends this."""
    alice = await add_account(accounts, "alice")
    await add_grant(accounts, "user:alice", "**", "pull,push")
    assert policy.principal(alice).rights.actions_everywhere is None  # private.example wants a grant of its own
    policy = Policy(accounts, policy.identity_check)
    seen = policy.principal(alice)
    assert seen.rights.actions_everywhere == (PULL | PUSH).value
    assert seen.actions("a", "a") == seen.rights.action_bits("team/app") == (PULL | PUSH).value
    assert seen._cached_bits == {}
    await add_grant(accounts, "user:alice", "team/**", "delete")
    seen = policy.principal(alice)
    assert seen.rights.actions_everywhere is None
    assert seen.actions("team/app", "team/app") == (PULL | PUSH | Action.DELETE).value
    assert seen.actions("a", "a") == (PULL | PUSH).value


@pytest.mark.parametrize(
    "other",
    [NameSet.of(["team/**"], ["private.example"]), NameSet.of(["team/**"], limits=["team/app"])],
    ids=["guarded", "limits"],
)
def test_rights_have_sets_of_names_that_can_be_united(other: NameSet) -> None:
    """`Rights` refuses sets of names with different guarded upstreams or limits: their union could contain names that
    are in none of them."""
    with pytest.raises(ValueError, match="guarded"):
        Rights({PULL: NameSet.of(["**"])}, more_names=[(PULL, other)])
