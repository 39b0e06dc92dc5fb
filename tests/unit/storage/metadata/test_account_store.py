"""Accounts, groups and grants in the store. Two workers use the same database, and each sees the changes of the other
one. The *epoch* is a number in the database that grows with each change of rights. `workers.epoch_changed()` compares
the epoch with that at its last call or at the last call of `workers.note_epoch()`."""

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
    LastAdmin,
)
from storage.composition import open_accounts, open_registry, prepare_data_dir
from storage.patterns import NamePattern
from tests.fakes.second_connection import second_connection
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
    signing_key,
    two_workers,
)

NOBODY = AccountName("nobody")


@pytest.fixture
async def workers(data: Path) -> AsyncIterator[TwoWorkers]:
    async with two_workers(data) as opened:
        yield opened


async def test_the_first_account_closes_the_registry_for_good(data: Path, workers: TwoWorkers) -> None:
    """Without accounts, the registry is open to everybody. From the commit of the first account on, every process
    treats the registry as closed. The registry stays closed if the account is removed, and after a restart."""
    assert not workers.second.has_had_account()
    await workers.first.add_group(DEV, by=BY_ROOT)
    assert not workers.second.has_had_account()
    await workers.first.add_account(ALICE, AccountKind.USER, password_hash=None, by=BY_ROOT)
    assert workers.second.has_had_account()
    await workers.second.remove_account(ALICE, by=BY_ROOT)
    assert workers.first.has_had_account()
    prepare_data_dir(data)
    async with open_registry(data) as registry:
        assert registry.accounts.has_had_account()
    db = second_connection(data / "entrepot.db")
    with pytest.raises(apsw.ConstraintError, match="stays closed"):
        db.execute("UPDATE access SET closed = 0")
    db.close()


@pytest.mark.full_store
async def test_a_store_has_an_instance_id_of_its_own(data: Path, tmp_path: Path, workers: TwoWorkers) -> None:
    """A store has a random instance id, which never changes. Every store has a different id."""
    instance_id = workers.first.instance_id()
    assert len(instance_id) == 32
    prepare_data_dir(data)
    assert workers.second.instance_id() == instance_id
    prepare_data_dir(tmp_path / "another")
    async with open_accounts(tmp_path / "another") as other_accounts:
        assert other_accounts.instance_id() != instance_id


async def test_an_account_is_stored_as_it_was_made(workers: TwoWorkers) -> None:
    """A worker reads an account as the other worker has stored it. A robot account cannot have a password."""
    stored = await workers.first.add_account(BOB, AccountKind.USER, password_hash="$bob", note="Bob B.", by=BY_ROOT)
    assert workers.second.account(BOB) == stored
    assert (stored.name, stored.kind, stored.enabled, stored.admin) == (BOB, AccountKind.USER, True, False)
    assert (stored.created, stored.groups, stored.note, stored.has_password) == (1_000_000.0, (), "Bob B.", True)
    assert workers.second.password_hash(BOB) == "$bob"
    assert workers.second.password_hash(NOBODY) is None
    with pytest.raises(AccountUnknown):
        workers.second.account(NOBODY)
    with pytest.raises(AccountInvalid):
        await workers.first.add_account(CI, AccountKind.ROBOT, password_hash="$", by=BY_ROOT)
    robot = await workers.second.add_account(CI, AccountKind.ROBOT, password_hash=None, by=BY_ROOT)
    assert not robot.has_password
    with pytest.raises(AccountInvalid):
        await workers.first.set_password(CI, "$", by=BY_ROOT)


async def test_users_robots_and_groups_share_one_set_of_names(workers: TwoWorkers) -> None:
    """If a user, robot or group has a name, no other user, robot or group can have it. A refused change adds no entry
    to the audit log and does not change the epoch."""
    await add_people(workers.first)
    assert workers.epoch_changed()
    entries_before = workers.audit_entries()
    for name in (ALICE, CI, DEV):
        with pytest.raises(AccountExists, match=f"{name} already"):
            await workers.second.add_account(name, AccountKind.USER, password_hash=None, by=BY_ROOT)
        with pytest.raises(AccountExists):
            await workers.second.add_group(name, by=BY_ROOT)
    assert not workers.epoch_changed()
    assert workers.audit_entries() == entries_before


async def test_accounts_are_listed_by_name_in_pages(workers: TwoWorkers) -> None:
    """Accounts of all kinds, or of one kind, are listed in pages, in the order of their names. A page begins after a
    given name, even if no account has this name."""
    await add_people(workers.first)
    assert [account.name for account in workers.second.accounts(None, None, 10).items] == [ALICE, BOB, CI]
    assert [account.name for account in workers.second.accounts(AccountKind.ROBOT, None, 10).items] == [CI]
    page = workers.second.accounts(None, "alice", 1)
    assert ([account.name for account in page.items], page.more) == ([BOB], True)
    assert [account.groups for account in page.items] == [(DEV,)]
    page = workers.second.accounts(AccountKind.USER, "azz", 1)
    assert ([account.name for account in page.items], page.more) == ([BOB], False)


async def test_changes_of_an_account_increase_the_version_and_the_epoch(workers: TwoWorkers) -> None:
    """A new password, disabling, enabling and a change of the admin flag increase the account's version and the epoch.
    If an account already has the requested state, its version and the epoch stay the same."""
    await add_people(workers.first)
    versions = [workers.second.account(BOB).version]
    workers.note_epoch()
    await workers.first.set_password(BOB, "$new", by=BY_ROOT)
    assert workers.epoch_changed()
    versions.append(workers.second.account(BOB).version)
    for enabled in (False, True):
        await workers.first.set_enabled(BOB, enabled, by=BY_ROOT)
        assert workers.epoch_changed()
        await workers.first.set_enabled(BOB, enabled, by=BY_ROOT)
        assert not workers.epoch_changed()
        assert workers.second.account(BOB).enabled is enabled
        versions.append(workers.second.account(BOB).version)
    for admin in (True, False):
        await workers.first.set_admin(BOB, admin, by=BY_ROOT)
        assert workers.epoch_changed()
        await workers.first.set_admin(BOB, admin, by=BY_ROOT)
        assert not workers.epoch_changed()
        assert workers.second.account(BOB).admin is admin
        versions.append(workers.second.account(BOB).version)
    assert versions == sorted(set(versions))
    for call in (workers.first.set_enabled, workers.first.set_admin):
        with pytest.raises(AccountUnknown):
            await call(NOBODY, True, by=BY_ROOT)
    with pytest.raises(AccountUnknown):
        await workers.first.set_password(NOBODY, "$", by=BY_ROOT)


async def test_two_changes_of_an_account_are_made_together_or_not_at_all(workers: TwoWorkers) -> None:
    """The admin flag and the enabled flag of an account can be changed in one transaction. If the second change is
    refused, because no enabled admin would be left, the first is not made either."""
    await add_people(workers.first)
    await workers.first.set_enabled(ALICE, False, by=BY_ROOT)
    workers.note_epoch()
    before = workers.second.account(BOB)
    with pytest.raises(LastAdmin):
        await workers.first.change_account(BOB, admin=True, enabled=False, keep_admin=True, by=BY_ROOT)
    assert workers.second.account(BOB) == before
    assert not workers.epoch_changed()
    assert workers.audit_entries(target="bob", action="account.admin") == []
    await workers.first.change_account(BOB, admin=True, enabled=False, by=BY_ROOT)
    assert workers.epoch_changed()
    bob = workers.second.account(BOB)
    assert (bob.admin, bob.enabled, bob.version > before.version) == (True, False, True)
    assert workers.audit_entries(target="bob")[-2:] == [("account.admin", "bob"), ("account.disable", "bob")]
    await workers.first.change_account(BOB, by=BY_ROOT)  # changes nothing
    assert workers.second.account(BOB) == bob
    with pytest.raises(AccountUnknown):
        await workers.first.change_account(NOBODY, admin=False, enabled=True, by=BY_ROOT)


async def test_a_new_account_inherits_nothing_from_a_removed_one(workers: TwoWorkers) -> None:
    """When an account is removed, its API tokens, memberships and grants are deleted. A new account of the same name
    has none of them. The version of the new account is higher than every version of the old account."""
    await add_people(workers.first)
    await workers.first.put_grant(grant("user:bob", "team/**", "pull"), by=BY_ROOT)
    await workers.first.add_token(api_token("t1", BOB), b"hash", by=BY_ROOT)
    await workers.first.set_enabled(BOB, False, by=BY_ROOT)
    version = workers.first.account(BOB).version
    workers.note_epoch()
    await workers.second.remove_account(BOB, by=BY_ROOT)
    assert workers.epoch_changed()
    with pytest.raises(AccountUnknown):
        workers.first.account(BOB)
    with pytest.raises(AccountUnknown):
        await workers.first.remove_account(BOB, by=BY_ROOT)
    new_account = await workers.first.add_account(BOB, AccountKind.USER, password_hash="$", by=BY_ROOT)
    assert (new_account.groups, new_account.enabled) == ((), True)
    assert new_account.version > version
    assert workers.second.grants([Grantee.parse("user:bob")]) == []
    assert workers.second.tokens(BOB, None, 10).items == []
    with pytest.raises(AccountUnknown):
        workers.second.token("t1")


async def test_a_stronger_password_hash_ends_no_login(workers: TwoWorkers) -> None:
    """When the hash of the same password is replaced by a stronger one, the account's version and the epoch stay the
    same, so logins stay valid. `replace_hash` does nothing if the stored hash is not the expected old hash."""
    await add_people(workers.first)
    workers.note_epoch()
    version = workers.first.account(BOB).version
    await workers.first.replace_hash(BOB, "$bob", "$better")
    assert workers.second.password_hash(BOB) == "$better"
    await workers.first.replace_hash(BOB, "$bob", "$stale")
    assert workers.second.password_hash(BOB) == "$better"
    assert not workers.epoch_changed()
    assert workers.second.account(BOB).version == version


async def test_members_of_groups(workers: TwoWorkers) -> None:
    """A member of a group can be a user without an account in the store. A group cannot be a member. A member that is
    added twice is in the group once."""
    await add_people(workers.first)
    external_user = AccountName("somebody.far")
    workers.note_epoch()
    await workers.first.add_member(DEV, external_user, by=BY_ROOT)
    assert workers.epoch_changed()
    await workers.second.add_member(DEV, external_user, by=BY_ROOT)
    assert not workers.epoch_changed()
    ops = AccountName("ops")
    await workers.second.add_group(ops, by=BY_ROOT)
    await workers.second.add_member(ops, external_user, by=BY_ROOT)
    assert workers.first.groups_of(external_user) == (DEV, ops)
    assert workers.first.groups_of("nobody") == ()
    page = workers.first.groups(None, 1)
    assert (page.items, page.more) == ([(DEV, ("bob", "somebody.far"))], True)
    assert workers.first.groups(DEV, 1).items == [(ops, ("somebody.far",))]
    with pytest.raises(AccountInvalid, match="is a group"):
        await workers.first.add_member(ops, DEV, by=BY_ROOT)
    for group in (NOBODY, ALICE):
        with pytest.raises(AccountUnknown):
            await workers.first.add_member(group, BOB, by=BY_ROOT)
    workers.note_epoch()
    await workers.first.remove_member(ops, external_user, by=BY_ROOT)
    assert workers.epoch_changed()
    with pytest.raises(AccountUnknown):
        await workers.first.remove_member(ops, external_user, by=BY_ROOT)
    assert workers.second.groups_of(external_user) == (DEV,)


async def test_several_members_or_grants_are_changed_together_or_not_at_all(workers: TwoWorkers) -> None:
    """Several members of a group, or several grants, can be changed in one transaction. If one of them is refused, none
    is changed."""
    await add_people(workers.first)  # bob is in the group dev
    grants = [grant("user:alice", "team/**", "pull"), grant("group:dev", "team/**", "pull")]
    workers.note_epoch()
    with pytest.raises(AccountInvalid):
        await workers.first.add_members(DEV, [ALICE, DEV], by=BY_ROOT)
    with pytest.raises(AccountUnknown):
        await workers.first.remove_members(DEV, [BOB, ALICE], by=BY_ROOT)
    with pytest.raises(AccountUnknown):
        await workers.first.put_grants([*grants, grant("robot:nobody", "team/**", "pull")], by=BY_ROOT)
    assert workers.second.group(DEV) == (DEV, (BOB,))
    assert workers.second.grants() == []
    assert not workers.epoch_changed()
    await workers.first.add_members(DEV, [ALICE, CI], by=BY_ROOT)
    assert workers.second.group(DEV) == (DEV, (ALICE, BOB, CI))
    await workers.first.remove_members(DEV, [BOB, ALICE], by=BY_ROOT)
    assert workers.second.group(DEV) == (DEV, (CI,))
    await workers.first.put_grants(grants, by=BY_ROOT)
    assert workers.second.grants() == sorted(grants, key=lambda each: str(each.subject))


async def test_grants_of_a_removed_group_are_deleted(workers: TwoWorkers) -> None:
    """When a group is removed, its members and grants are deleted. A new group of the same name has none of them."""
    await add_people(workers.first)
    await workers.first.put_grant(grant("group:dev", "team/**", "pull"), by=BY_ROOT)
    workers.note_epoch()
    await workers.first.remove_group(DEV, by=BY_ROOT)
    assert workers.epoch_changed()
    assert workers.second.groups_of(BOB) == ()
    assert workers.second.grants() == []
    await workers.first.add_group(DEV, by=BY_ROOT)
    assert workers.second.groups(None, 10).items == [(DEV, ())]
    assert workers.second.grants([Grantee.parse("group:dev")]) == []
    with pytest.raises(AccountUnknown):
        await workers.first.remove_group(ALICE, by=BY_ROOT)


async def test_only_changes_of_grants_increase_their_version(workers: TwoWorkers) -> None:
    """Each change of a grant increases the version of the grants, which both workers see at once. This includes the
    removal of a group or an account that has grants. Changes of accounts, members, tokens and keys leave the version
    as it is."""
    versions = [workers.second.grants_version()]

    def increased() -> bool:
        versions.append(workers.second.grants_version())
        assert workers.first.grants_version() == versions[-1]
        return versions[-1] > versions[-2]

    await add_people(workers.first)
    await workers.first.set_password(BOB, "$new", by=BY_ROOT)
    await workers.first.set_admin(BOB, True, by=BY_ROOT)
    await workers.first.add_token(api_token("t1"), b"hash", by=BY_ROOT)
    await workers.first.revoke_token("t1", by=BY_ROOT)
    await workers.first.rotate_key(signing_key("k1"), keep_seconds=0.0, by=BY_ROOT)
    await workers.first.remove_member(DEV, BOB, by=BY_ROOT)
    assert not increased()
    for each in (grant("group:dev", "team/**", "pull"), grant("group:dev", "team/**", "push")):
        await workers.first.put_grant(each, by=BY_ROOT)
        assert increased()
        await workers.first.put_grant(each, by=BY_ROOT)  # changes nothing
        assert not increased()
    await workers.first.put_grant(grant("user:bob", "bob/**", "pull"), by=BY_ROOT)
    await workers.first.put_grant(grant("user:alice", "alice/**", "pull"), by=BY_ROOT)
    assert increased()
    await workers.first.remove_grant(Grantee.parse("user:alice"), NamePattern("alice/**"), by=BY_ROOT)
    assert increased()
    await workers.first.remove_group(DEV, by=BY_ROOT)
    assert increased()
    await workers.first.remove_account(BOB, by=BY_ROOT)
    assert increased()
    await workers.first.remove_account(CI, by=BY_ROOT)  # has no grants
    assert not increased()


async def test_grants_are_stored_by_subject_and_pattern(workers: TwoWorkers) -> None:
    """There is at most one grant for each subject and pattern: a second grant replaces the first. Grants are found by
    their subject."""
    await add_people(workers.first)
    grants = [
        grant("authenticated", "docker.io/**", "pull"),
        grant("everyone", "public/**", "pull"),
        grant("group:dev", "team/**", "pull,push"),
        grant("robot:ci", "team/app", "push"),
        grant("user:somebody.far", "team/**", "*"),
    ]
    for each in grants:
        workers.note_epoch()
        await workers.first.put_grant(each, by=BY_ROOT)
        assert workers.epoch_changed()
    assert workers.second.grants() == grants
    assert workers.second.grants([grants[3].subject, grants[1].subject, Grantee.parse("user:ci")]) == [
        grants[3],
        grants[1],
    ]
    assert workers.second.grants([]) == []
    workers.note_epoch()
    await workers.first.put_grant(grants[3], by=BY_ROOT)
    assert not workers.epoch_changed()
    await workers.first.put_grant(grant("robot:ci", "team/app", "pull,delete"), by=BY_ROOT)
    assert workers.epoch_changed()
    assert [each.actions for each in workers.second.grants([grants[3].subject])] == [Action.PULL | Action.DELETE]
    await workers.first.remove_grant(grants[3].subject, NamePattern("team/app"), by=BY_ROOT)
    assert workers.epoch_changed()
    assert workers.second.grants([grants[3].subject]) == []
    with pytest.raises(AccountUnknown):
        await workers.first.remove_grant(grants[3].subject, NamePattern("team/app"), by=BY_ROOT)


@pytest.mark.parametrize("subject", ["group:nobody", "robot:nobody"])
async def test_grants_to_subjects_that_do_not_exist(workers: TwoWorkers, subject: str) -> None:
    """A grant to a group or robot is refused if the store has no such group or robot. A grant is also refused if the
    name belongs to an account or group of another kind. The error then says how to write the subject, such as "ci is a
    robot: write robot:ci"."""
    await add_people(workers.first)
    workers.note_epoch()
    with pytest.raises(AccountUnknown):
        await workers.first.put_grant(grant(subject, "team/**", "pull"), by=BY_ROOT)
    for subject_of_wrong_kind in ("user:ci", "user:dev", "group:alice", "robot:bob"):
        with pytest.raises(AccountInvalid, match=r"is a \w+: write \w+:"):
            await workers.first.put_grant(grant(subject_of_wrong_kind, "team/**", "pull"), by=BY_ROOT)
    assert not workers.epoch_changed()
    assert workers.second.grants() == []


async def test_each_change_is_in_the_audit_log(data: Path, workers: TwoWorkers) -> None:
    """Each change has an entry in the audit log with its author, the author's address, and the account or group that
    was changed. Passwords and other secrets are not in the log."""
    await add_people(workers.first)
    await workers.first.set_password(BOB, "$secret", by=BY_ROOT)
    await workers.first.set_enabled(BOB, False, by=BY_ROOT)
    await workers.first.set_enabled(BOB, True, by=BY_ROOT)
    await workers.first.set_admin(BOB, True, by=BY_ROOT)
    await workers.first.put_grant(grant("group:dev", "team/**", "pull"), by=BY_ROOT)
    await workers.first.remove_grant(Grantee.parse("group:dev"), NamePattern("team/**"), by=BY_ROOT)
    await workers.first.remove_member(DEV, BOB, by=BY_ROOT)
    await workers.first.remove_group(DEV, by=BY_ROOT)
    await workers.first.remove_account(BOB, by=BY_ROOT)
    assert workers.audit_entries(actor="root") == [
        *(("account.add", "alice"), ("account.add", "bob"), ("account.add", "ci")),
        *(("group.add", "dev"), ("member.add", "dev"), ("account.password", "bob")),
        *(("account.disable", "bob"), ("account.enable", "bob"), ("account.admin", "bob")),
        *(("grant.put", "group:dev"), ("grant.remove", "group:dev"), ("member.remove", "dev")),
        *(("group.remove", "dev"), ("account.remove", "bob")),
    ]
    db = second_connection(data / "entrepot.db")
    rows = db.execute("SELECT * FROM audit").fetchall()
    db.close()
    assert not any("$" in str(column) for row in rows for column in row)
    assert {row[2] for row in rows} == {"root"}  # the actor
    assert {row[7:10] for row in rows} == {("192.0.2.7", "request", "curl/8")}  # address, request id and user agent
