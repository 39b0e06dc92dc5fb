"""`ManagementRights` has the rules of the management API: who may see and change which accounts, credentials and
grants. The tests call it without HTTP."""

from __future__ import annotations

import pytest

from registry.auth.rights.management_rights import ALL_MANAGEMENT_RIGHTS, ManagementRights, management_rights_of
from registry.auth.rights.principal import ANONYMOUS, Identity, Principal, Rights
from storage.access import AccountName, AccountUnknown, Action, ApiToken, LoginSession, TokenLimit
from storage.errors import Denied, Unauthorized
from storage.patterns import NamePattern, NameSet

ALICE, BOB = AccountName("alice"), AccountName("bob")
TEAM_ADMIN = Rights({Action.ADMIN: NameSet.of(["team/**"])})
"""Rights with the action `admin` on all repositories below `team`."""


def test_anonymous_callers_are_unauthorized() -> None:
    """Every check raises Unauthorized for a caller without an account."""
    anonymous = management_rights_of(Principal(ANONYMOUS, Rights({Action.ADMIN: NameSet.of(["**"])})))
    for check in (
        anonymous.check_admin,
        lambda: anonymous.check_may_see(ALICE),
        lambda: anonymous.check_may_change_credentials(ALICE),
        lambda: anonymous.check_may_grant(NamePattern("team/**")),
    ):
        with pytest.raises(Unauthorized):
            check()


def test_other_accounts_do_not_exist_for_a_caller() -> None:
    """For a caller who is not an admin, the accounts and tokens of others do not exist."""
    alice = management_rights_of(Principal(Identity("alice", version=1), TEAM_ADMIN))
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
    """A caller cannot make a credential after a login with the credential of a program, such as an API token. Callers
    whose account is not in the store, but in the htpasswd file or at an issuer, cannot make one either."""
    with pytest.raises(Denied, match="only a person may do this"):
        management_rights_of(Principal(proof, TEAM_ADMIN)).check_may_change_credentials(ALICE)


def test_a_token_may_revoke_itself() -> None:
    """An API token may revoke itself, but no other token of its account."""
    rights = management_rights_of(Principal(Identity("alice", version=1, token="1"), TEAM_ADMIN))
    rights.check_may_revoke(ApiToken("1", ALICE, "personal", "", 0.0))
    with pytest.raises(Denied):
        rights.check_may_revoke(ApiToken("2", ALICE, "personal", "", 0.0))


def test_sessions_are_ended_by_their_own_account() -> None:
    """A person may end the sessions of their own account, even if the account is a line of the htpasswd file. A request
    with a token may not end a session. For other callers, the session does not exist."""
    own, of_other_account = (LoginSession("1", name, "password", 0.0, 1.0, 0.0, "", "") for name in (ALICE, BOB))
    for proof in (Identity("alice", version=1), Identity("alice", stamp="htpasswd", session="2")):
        rights = management_rights_of(Principal(proof, TEAM_ADMIN))
        rights.check_may_end(own)
        with pytest.raises(AccountUnknown, match="there is no such session"):
            rights.check_may_end(of_other_account)
    for proof in (Identity("alice", version=1, token="1"), Identity("alice", version=1, access={})):
        with pytest.raises(Denied, match="a token does not suffice"):
            management_rights_of(Principal(proof, TEAM_ADMIN)).check_may_end(own)
    ALL_MANAGEMENT_RIGHTS.check_may_end(of_other_account)


def test_a_password_of_the_htpasswd_file_needs_a_browser() -> None:
    """A person who has given the password of a line of the htpasswd file, and has no login session, is told what
    suffices instead. To end sessions: a login with a browser, or the password of an account that the registry stores.
    To make credentials: an account that the registry stores."""
    rights = management_rights_of(Principal(Identity("alice", stamp="htpasswd"), TEAM_ADMIN))
    with pytest.raises(Denied, match=r"with a browser .* password of an account that this registry stores"):
        rights.check_may_end_sessions(ALICE)
    with pytest.raises(Denied, match=r"only a person .* an account that this registry stores"):
        rights.check_may_change_credentials(ALICE)


def test_a_pattern_admin_may_grant_below_the_pattern() -> None:
    """An account with the action `admin` on a pattern may grant rights below this pattern. If its token has limits, it
    may grant only within them."""
    alice = management_rights_of(Principal(Identity("alice", version=1), TEAM_ADMIN))
    assert alice.may_grant(NamePattern("team/app-*"))
    assert alice.may_grant(NamePattern("team/*/app"))
    assert not alice.may_grant(NamePattern("**"))
    limits = (TokenLimit(NamePattern("team/a/**"), Action.ADMIN), TokenLimit(NamePattern("team/b/**"), Action.PULL))
    limited = management_rights_of(Principal(Identity("alice", version=1, token="1", limits=limits), TEAM_ADMIN))
    assert limited.may_grant(NamePattern("team/a/b"))
    assert not limited.may_grant(NamePattern("team/b/c"))
    assert not limited.may_grant(NamePattern("team/**"))


def test_a_limited_token_has_no_admin_rights() -> None:
    """A request with a limited token does not have admin rights, even if its account is an admin."""
    rights = Rights.everything(admin=True)
    limits = (TokenLimit(NamePattern("**"), Action.PULL),)
    with pytest.raises(Denied):
        management_rights_of(Principal(Identity("alice", version=1, token="1", limits=limits), rights)).check_admin()
    management_rights_of(Principal(Identity("alice", version=1, token="1"), rights)).check_admin()


def test_the_operator_needs_no_account() -> None:
    """The operator, who uses the command line, needs no account."""
    ALL_MANAGEMENT_RIGHTS.check_admin()
    ALL_MANAGEMENT_RIGHTS.check_may_see(BOB)
    ALL_MANAGEMENT_RIGHTS.check_may_grant(NamePattern("**"))
    assert ManagementRights("alice", admin=True).may_grant(NamePattern("docker.io/**"))
