"""The rules of the management API, without HTTP."""

from __future__ import annotations

import pytest

from registry.auth.rights.management_rights import ALL_MANAGEMENT_RIGHTS, ManagementRights, management_rights_of
from registry.auth.rights.principal import ANONYMOUS, Identity, Principal, Rights
from storage.access import AccountName, AccountUnknown, Action, ApiToken, LoginSession, TokenLimit
from storage.errors import Denied, Unauthorized
from storage.patterns import NamePattern, NameSet

ALICE, BOB = AccountName("alice"), AccountName("bob")
TEAM = Rights({Action.ADMIN: NameSet.of(["team/**"])})


def test_nobody_is_told_to_log_in() -> None:
    """Every check raises Unauthorized for a caller without an account."""
    nobody = management_rights_of(Principal(ANONYMOUS, Rights({Action.ADMIN: NameSet.of(["**"])})))
    for refused in (
        nobody.check_admin,
        lambda: nobody.check_may_see(ALICE),
        lambda: nobody.check_may_change_credentials(ALICE),
        lambda: nobody.check_grant(NamePattern("team/**")),
    ):
        with pytest.raises(Unauthorized):
            refused()


def test_others_are_not_there() -> None:
    """For a caller who is no admin, another's account and another's token do not exist."""
    alice = management_rights_of(Principal(Identity("alice", version=1), TEAM))
    alice.check_may_see(ALICE)
    alice.check_may_change_credentials(ALICE)
    with pytest.raises(AccountUnknown, match="there is no account bob"):
        alice.check_may_see(BOB)
    with pytest.raises(AccountUnknown, match="there is no such API token"):
        alice.check_may_revoke(ApiToken("1", BOB, "personal", "", 0.0))
    with pytest.raises(Denied):
        alice.check_admin()


@pytest.mark.parametrize(
    "proof",
    [
        Identity("alice", version=1, token="1"),
        Identity("alice", version=1, access={}),
        Identity("alice", stamp="htpasswd"),
        Identity("alice", robot=True, version=1, stamp="issuer"),
    ],
    ids=["API token", "token of /token", "htpasswd", "issuer"],
)
def test_only_a_person_makes_credentials(proof: Identity) -> None:
    """A credential of a program cannot make another credential."""
    with pytest.raises(Denied, match="log in as a person"):
        management_rights_of(Principal(proof, TEAM)).check_may_change_credentials(ALICE)


def test_a_token_may_end_itself() -> None:
    """An API token may revoke itself, but no other token of its account."""
    rights = management_rights_of(Principal(Identity("alice", version=1, token="1"), TEAM))
    rights.check_may_revoke(ApiToken("1", ALICE, "personal", "", 0.0))
    with pytest.raises(Denied):
        rights.check_may_revoke(ApiToken("2", ALICE, "personal", "", 0.0))


def test_who_ends_sessions() -> None:
    """A person may end the sessions of the own account, even if the account is a line of the htpasswd file. A request
    with a token may not end a session. The sessions of other accounts do not exist for the caller."""
    mine, others = (LoginSession("1", name, "password", 0.0, 1.0, 0.0, "", "") for name in (ALICE, BOB))
    for proof in (Identity("alice", version=1), Identity("alice", stamp="htpasswd", session="2")):
        rights = management_rights_of(Principal(proof, TEAM))
        rights.check_may_end(mine)
        with pytest.raises(AccountUnknown, match="there is no such session"):
            rights.check_may_end(others)
    for proof in (Identity("alice", version=1, token="1"), Identity("alice", version=1, access={})):
        with pytest.raises(Denied, match="a token does not suffice"):
            management_rights_of(Principal(proof, TEAM)).check_may_end(mine)
    ALL_MANAGEMENT_RIGHTS.check_may_end(others)


def test_granting() -> None:
    """An account with the action admin on a pattern may grant rights below this pattern. The limits of its token limit
    this as well."""
    alice = management_rights_of(Principal(Identity("alice", version=1), TEAM))
    assert alice.may_grant(NamePattern("team/app-*"))
    assert alice.may_grant(NamePattern("team/*/app"))
    assert not alice.may_grant(NamePattern("**"))
    limits = (TokenLimit(NamePattern("team/a/**"), Action.ADMIN), TokenLimit(NamePattern("team/b/**"), Action.PULL))
    limited = management_rights_of(Principal(Identity("alice", version=1, token="1", limits=limits), TEAM))
    assert limited.may_grant(NamePattern("team/a/b"))
    assert not limited.may_grant(NamePattern("team/b/c"))
    assert not limited.may_grant(NamePattern("team/**"))


def test_an_admin_with_a_limited_token_is_none() -> None:
    """A limited token of an admin has no admin rights."""
    rights = Rights.everything(admin=True)
    limits = (TokenLimit(NamePattern("**"), Action.PULL),)
    with pytest.raises(Denied):
        management_rights_of(Principal(Identity("alice", version=1, token="1", limits=limits), rights)).check_admin()
    management_rights_of(Principal(Identity("alice", version=1, token="1"), rights)).check_admin()


def test_the_operator() -> None:
    """The operator, who uses the command line, needs no account."""
    ALL_MANAGEMENT_RIGHTS.check_admin()
    ALL_MANAGEMENT_RIGHTS.check_may_see(BOB)
    ALL_MANAGEMENT_RIGHTS.check_grant(NamePattern("**"))
    assert ManagementRights("alice", admin=True).may_grant(NamePattern("docker.io/**"))
