"""Accounts, groups and grants in the store, as two workers see them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import apsw
import pytest

from storage.access import (
    AccountExists,
    AccountInvalid,
    AccountKind,
    AccountName,
    AccountUnknown,
    Action,
    Grantee,
)
from storage.composition import open_accounts, open_registry, prepare_data_dir
from storage.patterns import NamePattern
from tests.unit.storage.metadata.account_views import (
    ALICE,
    BOB,
    BY_ROOT,
    CI,
    DEV,
    TwoWorkers,
    add_people,
    api_token,
    grant,
    two_workers,
)

NOBODY = AccountName("nobody")


@pytest.fixture
async def both(data: Path) -> AsyncIterator[TwoWorkers]:
    async with two_workers(data) as opened:
        yield opened


async def test_the_first_account_closes_the_store_for_good(data: Path, both: TwoWorkers) -> None:
    """Every process sees the first account from its commit on. Neither its removal nor a restart opens the registry
    again."""
    assert not both.two.has_had_account()
    await both.one.add_group(DEV, by=BY_ROOT)
    assert not both.two.has_had_account()
    await both.one.add_account(ALICE, AccountKind.USER, password_hash=None, by=BY_ROOT)
    assert both.two.has_had_account()
    await both.two.remove_account(ALICE, by=BY_ROOT)
    assert both.one.has_had_account()
    prepare_data_dir(data)
    async with open_registry(data) as registry:
        assert registry.accounts.has_had_account()
    db = apsw.Connection(str(data / "entrepot.db"))
    with pytest.raises(apsw.ConstraintError, match="stays closed"):
        db.execute("UPDATE access SET closed = 0")
    db.close()


@pytest.mark.full_store
async def test_a_store_has_a_name_of_its_own(data: Path, tmp_path: Path, both: TwoWorkers) -> None:
    """A store keeps its random name, which differs from that of every other store."""
    name = both.one.instance_id()
    assert len(name) == 32
    prepare_data_dir(data)
    assert both.two.instance_id() == name
    prepare_data_dir(tmp_path / "another")
    async with open_accounts(tmp_path / "another") as another:
        assert another.instance_id() != name


async def test_an_account_is_stored_as_it_was_made(both: TwoWorkers) -> None:
    """An account is read as it was stored, with its groups. A robot has no password."""
    made = await both.one.add_account(BOB, AccountKind.USER, password_hash="$bob", note="Bob B.", by=BY_ROOT)
    assert both.two.account(BOB) == made
    assert (made.name, made.kind, made.enabled, made.admin) == (BOB, AccountKind.USER, True, False)
    assert (made.created, made.groups, made.note, made.has_password) == (1_000_000.0, (), "Bob B.", True)
    assert both.two.password_hash(BOB) == "$bob"
    assert both.two.password_hash(NOBODY) is None
    with pytest.raises(AccountUnknown):
        both.two.account(NOBODY)
    with pytest.raises(AccountInvalid):
        await both.one.add_account(CI, AccountKind.ROBOT, password_hash="$", by=BY_ROOT)
    robot = await both.two.add_account(CI, AccountKind.ROBOT, password_hash=None, by=BY_ROOT)
    assert not robot.has_password
    with pytest.raises(AccountInvalid):
        await both.one.set_password(CI, "$", by=BY_ROOT)


async def test_a_name_is_taken_for_people_robots_and_groups_alike(both: TwoWorkers) -> None:
    """People, robots and groups share one set of names. A refused change changes nothing."""
    await add_people(both.one)
    assert both.changed()
    lines = both.told()
    for name in (ALICE, CI, DEV):
        with pytest.raises(AccountExists, match=f"{name} already"):
            await both.two.add_account(name, AccountKind.USER, password_hash=None, by=BY_ROOT)
        with pytest.raises(AccountExists):
            await both.two.add_group(name, by=BY_ROOT)
    assert not both.changed()
    assert both.told() == lines


async def test_lists_of_accounts_go_by_name_in_pages(both: TwoWorkers) -> None:
    """Accounts of all kinds or of one are listed in pages, in the order of their names, after a name that need not
    exist."""
    await add_people(both.one)
    assert [account.name for account in both.two.accounts(None, None, 10).items] == [ALICE, BOB, CI]
    assert [account.name for account in both.two.accounts(AccountKind.ROBOT, None, 10).items] == [CI]
    page = both.two.accounts(None, "alice", 1)
    assert ([account.name for account in page.items], page.more) == ([BOB], True)
    assert [account.groups for account in page.items] == [(DEV,)]
    page = both.two.accounts(AccountKind.USER, "azz", 1)
    assert ([account.name for account in page.items], page.more) == ([BOB], False)


async def test_changes_of_an_account_increase_the_version_and_the_epoch(both: TwoWorkers) -> None:
    """A new password, disabling, enabling and a change of the admin flag increase the account's version and the epoch.
    A change that changes nothing does not."""
    await add_people(both.one)
    versions = [both.two.account(BOB).version]
    both.changed()
    await both.one.set_password(BOB, "$new", by=BY_ROOT)
    assert both.changed()
    versions.append(both.two.account(BOB).version)
    for enabled in (False, True):
        await both.one.set_enabled(BOB, enabled, by=BY_ROOT)
        assert both.changed()
        await both.one.set_enabled(BOB, enabled, by=BY_ROOT)
        assert not both.changed()
        assert both.two.account(BOB).enabled is enabled
        versions.append(both.two.account(BOB).version)
    for admin in (True, False):
        await both.one.set_admin(BOB, admin, by=BY_ROOT)
        assert both.changed()
        await both.one.set_admin(BOB, admin, by=BY_ROOT)
        assert not both.changed()
        assert both.two.account(BOB).admin is admin
        versions.append(both.two.account(BOB).version)
    assert versions == sorted(set(versions))
    for call in (both.one.set_enabled, both.one.set_admin):
        with pytest.raises(AccountUnknown):
            await call(NOBODY, True, by=BY_ROOT)
    with pytest.raises(AccountUnknown):
        await both.one.set_password(NOBODY, "$", by=BY_ROOT)


async def test_nobody_inherits_what_an_account_of_the_same_name_had(both: TwoWorkers) -> None:
    """With an account, its API tokens, memberships and grants are deleted. A new account of the same name has none of
    them, and a version that the old account never had."""
    await add_people(both.one)
    await both.one.put_grant(grant("user:bob", "team/**", "pull"), by=BY_ROOT)
    await both.one.add_token(api_token("t1", BOB), b"hash", by=BY_ROOT)
    await both.one.set_enabled(BOB, False, by=BY_ROOT)
    version = both.one.account(BOB).version
    both.changed()
    await both.two.remove_account(BOB, by=BY_ROOT)
    assert both.changed()
    with pytest.raises(AccountUnknown):
        both.one.account(BOB)
    with pytest.raises(AccountUnknown):
        await both.one.remove_account(BOB, by=BY_ROOT)
    again = await both.one.add_account(BOB, AccountKind.USER, password_hash="$", by=BY_ROOT)
    assert (again.groups, again.enabled) == ((), True)
    assert again.version > version
    assert both.two.grants([Grantee.parse("user:bob")]) == []
    assert both.two.tokens(BOB, None, 10).items == []
    with pytest.raises(AccountUnknown):
        both.two.token("t1")


async def test_a_stronger_hash_ends_no_login(both: TwoWorkers) -> None:
    """A stronger hash replaces only the hash from which it was made, and ends no login."""
    await add_people(both.one)
    both.changed()
    version = both.one.account(BOB).version
    await both.one.replace_hash(BOB, "$bob", "$better")
    assert both.two.password_hash(BOB) == "$better"
    await both.one.replace_hash(BOB, "$bob", "$stale")
    assert both.two.password_hash(BOB) == "$better"
    assert not both.changed()
    assert both.two.account(BOB).version == version


async def test_groups(both: TwoWorkers) -> None:
    """The members of a group need not be accounts in the store, and cannot be groups. A member that is added twice is
    in the group once."""
    await add_people(both.one)
    far = AccountName("somebody.far")
    both.changed()
    await both.one.add_member(DEV, far, by=BY_ROOT)
    assert both.changed()
    await both.two.add_member(DEV, far, by=BY_ROOT)
    assert not both.changed()
    ops = AccountName("ops")
    await both.two.add_group(ops, by=BY_ROOT)
    await both.two.add_member(ops, far, by=BY_ROOT)
    assert both.one.groups_of(far) == (DEV, ops)
    assert both.one.groups_of("nobody") == ()
    page = both.one.groups(None, 1)
    assert (page.items, page.more) == ([(DEV, ("bob", "somebody.far"))], True)
    assert both.one.groups(DEV, 1).items == [(ops, ("somebody.far",))]
    with pytest.raises(AccountInvalid, match="is a group"):
        await both.one.add_member(ops, DEV, by=BY_ROOT)
    for group in (NOBODY, ALICE):
        with pytest.raises(AccountUnknown):
            await both.one.add_member(group, BOB, by=BY_ROOT)
    both.changed()
    await both.one.remove_member(ops, far, by=BY_ROOT)
    assert both.changed()
    with pytest.raises(AccountUnknown):
        await both.one.remove_member(ops, far, by=BY_ROOT)
    assert both.two.groups_of(far) == (DEV,)


async def test_a_group_takes_its_grants_along(both: TwoWorkers) -> None:
    """With a group, its grants are deleted. A new group of the same name has none."""
    await add_people(both.one)
    await both.one.put_grant(grant("group:dev", "team/**", "pull"), by=BY_ROOT)
    both.changed()
    await both.one.remove_group(DEV, by=BY_ROOT)
    assert both.changed()
    assert both.two.groups_of(BOB) == ()
    assert both.two.grants() == []
    await both.one.add_group(DEV, by=BY_ROOT)
    assert both.two.groups(None, 10).items == [(DEV, ())]
    assert both.two.grants([Grantee.parse("group:dev")]) == []
    with pytest.raises(AccountUnknown):
        await both.one.remove_group(ALICE, by=BY_ROOT)


async def test_grants(both: TwoWorkers) -> None:
    """There is one grant for each subject and pattern: a second one replaces the first. Grants are found by their
    subject."""
    await add_people(both.one)
    made = [
        grant("authenticated", "docker.io/**", "pull"),
        grant("everyone", "public/**", "pull"),
        grant("group:dev", "team/**", "pull,push"),
        grant("robot:ci", "team/app", "push"),
        grant("user:somebody.far", "team/**", "*"),
    ]
    for one in made:
        both.changed()
        await both.one.put_grant(one, by=BY_ROOT)
        assert both.changed()
    assert both.two.grants() == made
    assert both.two.grants([made[3].subject, made[1].subject, Grantee.parse("user:ci")]) == [made[3], made[1]]
    assert both.two.grants([]) == []
    both.changed()
    await both.one.put_grant(made[3], by=BY_ROOT)
    assert not both.changed()
    await both.one.put_grant(grant("robot:ci", "team/app", "pull,delete"), by=BY_ROOT)
    assert both.changed()
    assert [one.actions for one in both.two.grants([made[3].subject])] == [Action.PULL | Action.DELETE]
    await both.one.remove_grant(made[3].subject, NamePattern("team/app"), by=BY_ROOT)
    assert both.changed()
    assert both.two.grants([made[3].subject]) == []
    with pytest.raises(AccountUnknown):
        await both.one.remove_grant(made[3].subject, NamePattern("team/app"), by=BY_ROOT)


@pytest.mark.parametrize("subject", ["group:nobody", "robot:nobody"])
async def test_grants_to_subjects_that_do_not_exist(both: TwoWorkers, subject: str) -> None:
    """A grant to a group or robot needs this group or robot in the store. A grant to a person does not."""
    await add_people(both.one)
    both.changed()
    with pytest.raises(AccountUnknown):
        await both.one.put_grant(grant(subject, "team/**", "pull"), by=BY_ROOT)
    for wrong in ("user:ci", "user:dev", "group:alice", "robot:bob"):
        with pytest.raises(AccountInvalid, match="write"):
            await both.one.put_grant(grant(wrong, "team/**", "pull"), by=BY_ROOT)
    assert not both.changed()
    assert both.two.grants() == []


async def test_each_change_is_in_the_audit_log(data: Path, both: TwoWorkers) -> None:
    """Each change is in the audit log, with who made it, from where, and for whom. No password or secret is."""
    await add_people(both.one)
    await both.one.set_password(BOB, "$secret", by=BY_ROOT)
    await both.one.set_enabled(BOB, False, by=BY_ROOT)
    await both.one.set_enabled(BOB, True, by=BY_ROOT)
    await both.one.set_admin(BOB, True, by=BY_ROOT)
    await both.one.put_grant(grant("group:dev", "team/**", "pull"), by=BY_ROOT)
    await both.one.remove_grant(Grantee.parse("group:dev"), NamePattern("team/**"), by=BY_ROOT)
    await both.one.remove_member(DEV, BOB, by=BY_ROOT)
    await both.one.remove_group(DEV, by=BY_ROOT)
    await both.one.remove_account(BOB, by=BY_ROOT)
    assert both.told(actor="root") == [
        *(("account.add", "alice"), ("account.add", "bob"), ("account.add", "ci")),
        *(("group.add", "dev"), ("member.add", "dev"), ("account.password", "bob")),
        *(("account.disable", "bob"), ("account.enable", "bob"), ("account.admin", "bob")),
        *(("grant.put", "group:dev"), ("grant.remove", "group:dev"), ("member.remove", "dev")),
        *(("group.remove", "dev"), ("account.remove", "bob")),
    ]
    db = apsw.Connection(str(data / "entrepot.db"))
    rows = db.execute("SELECT * FROM audit").fetchall()
    db.close()
    assert not any("$" in str(column) for row in rows for column in row)
    assert {row[2] for row in rows} == {"root"}
    assert {row[7:10] for row in rows} == {("192.0.2.7", "request", "curl/8")}
