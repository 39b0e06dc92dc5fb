"""API tokens, signing keys and the throttling of failed logins in the store. Two workers use the same database, and
each sees the changes of the other one. The *epoch* is a number in the database that grows with each change of
rights."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage.access import (
    LONGEST_THROTTLING_SECONDS,
    AccountExists,
    AccountInvalid,
    AccountName,
    AccountUnknown,
    Action,
    FailureCost,
    LoginSession,
    SigningKey,
    TokenLimit,
)
from storage.errors import Unauthorized
from storage.metadata.sqlite.access.api_token_table import MAX_PERSONAL_TOKENS
from storage.patterns import NamePattern
from tests.fakes.second_connection import second_connection
from tests.fakes.server_process import ROOT as PROJECT_ROOT
from tests.unit.storage.metadata.account_views import (
    ALICE,
    BOB,
    BY_ROOT,
    CI,
    TwoWorkers,
    add_people,
    api_token,
    signing_key,
    two_workers,
)

TEN_SECONDS, THREE_SECONDS = FailureCost(10.0, 100.0), FailureCost(3.0, 100.0)
"""The costs of failed logins in some tests."""


@pytest.fixture
async def workers(data: Path) -> AsyncIterator[TwoWorkers]:
    async with two_workers(data) as opened:
        await add_people(opened.first)
        opened.note_epoch()
        yield opened


async def test_a_token_is_stored_as_it_was_made(workers: TwoWorkers) -> None:
    """A token is stored with the hash of its secret and with its limits. A new token does not change the epoch of
    rights, so the caches of rights stay valid after a login."""
    limits = (
        TokenLimit(NamePattern("team/**"), Action.PULL | Action.PUSH),
        TokenLimit(NamePattern("web"), Action.PULL),
    )
    for token in (api_token("t1"), api_token("t2", limits=limits, expires=2_000_000.0), api_token("t3", limits=())):
        await workers.first.add_token(token, token.id.encode(), by=BY_ROOT)
        assert workers.second.token(token.id) == (token, token.id.encode())
    assert not workers.epoch_changed()
    with pytest.raises(AccountExists):
        await workers.second.add_token(api_token("t1", BOB), b"other", by=BY_ROOT)
    with pytest.raises(AccountUnknown):
        await workers.second.add_token(api_token("t4", AccountName("nobody")), b"hash", by=BY_ROOT)
    assert workers.first.token("t1")[0].account == CI
    assert workers.audit_entries(target="ci", action="token.add") == [("token.add", "ci")] * 3


async def test_a_revoked_token_is_unknown_at_once(workers: TwoWorkers) -> None:
    """A revoked token is unknown in every process at once. The epoch of rights changes."""
    await workers.first.add_token(api_token("t1"), b"hash", by=BY_ROOT)
    await workers.second.revoke_token("t1", by=BY_ROOT)
    assert workers.epoch_changed()
    with pytest.raises(AccountUnknown):
        workers.first.token("t1")
    with pytest.raises(AccountUnknown):
        await workers.first.revoke_token("t1", by=BY_ROOT)
    assert workers.audit_entries(action="token.revoke") == [("token.revoke", "ci")]


async def test_an_expired_token_is_unknown(workers: TwoWorkers) -> None:
    """A token is unknown from the time at which it expires. A new token can then have the same id."""
    await workers.first.add_token(api_token("t1", expires=1_000_100.0), b"hash", by=BY_ROOT)
    await workers.first.add_token(api_token("t2"), b"hash", by=BY_ROOT)
    workers.clock.now = 1_000_099.9
    assert workers.second.token("t1")[0].expires == 1_000_100.0
    workers.clock.now = 1_000_100.0
    with pytest.raises(AccountUnknown):
        workers.second.token("t1")
    assert [token.id for token in workers.second.tokens(None, None, 10).items] == ["t2"]
    assert [token.id for token in workers.second.tokens(CI, None, 10).items] == ["t2"]
    with pytest.raises(AccountUnknown):
        await workers.second.revoke_token("t1", by=BY_ROOT)
    await workers.first.add_token(api_token("t1"), b"again", by=BY_ROOT)
    assert workers.second.token("t1") == (api_token("t1"), b"again")


async def test_tokens_are_listed_by_id_in_pages(workers: TwoWorkers) -> None:
    """The tokens of all accounts, or of one account, are listed in pages, in the order of their ids."""
    for token_id, account in (("t3", CI), ("t1", BOB), ("t2", CI), ("t4", CI)):
        await workers.first.add_token(api_token(token_id, account), b"hash", by=BY_ROOT)
    page = workers.second.tokens(None, None, 3)
    assert ([token.id for token in page.items], page.more) == (["t1", "t2", "t3"], True)
    page = workers.second.tokens(CI, "t2", 2)
    assert ([token.id for token in page.items], page.more) == (["t3", "t4"], False)
    assert workers.second.tokens(ALICE, None, 2).items == []


async def test_tokens_of_one_purpose_are_listed(workers: TwoWorkers) -> None:
    """A list of an account's tokens can be limited to those of one purpose."""
    for token_id, login in (("t1", True), ("t2", False), ("t3", True), ("t4", False)):
        await workers.first.add_token(api_token(token_id, login=login), b"hash", by=BY_ROOT)
    page = workers.second.tokens(CI, None, 2, purpose="personal")
    assert ([token.id for token in page.items], page.more) == (["t2", "t4"], False)
    page = workers.second.tokens(CI, None, 1, purpose="login")
    assert ([token.id for token in page.items], page.more) == (["t1"], True)
    assert [token.id for token in workers.second.tokens(CI, "t1", 1, purpose="login").items] == ["t3"]


async def test_a_new_password_deletes_refresh_tokens(workers: TwoWorkers) -> None:
    """A new password deletes the account's refresh tokens, which were made by logins with the old password. API tokens
    that the user has made, and tokens of other accounts, stay."""
    await workers.first.add_token(api_token("login", BOB, login=True), b"hash", by=BY_ROOT)
    await workers.first.add_token(api_token("made", BOB), b"hash", by=BY_ROOT)
    await workers.first.add_token(api_token("other", ALICE, login=True), b"hash", by=BY_ROOT)
    await workers.second.set_password(BOB, "$new", by=BY_ROOT)
    assert workers.epoch_changed()
    assert [token.id for token in workers.first.tokens(None, None, 10).items] == ["made", "other"]


async def test_an_old_login_cannot_make_credentials(workers: TwoWorkers) -> None:
    """A login with an old password cannot make a credential after the password was changed, although the change was
    made after the login was verified. The account's version has changed, and the transaction compares it. The same
    applies to an account that was removed."""
    old_version = workers.first.account(BOB).version
    session = LoginSession("s1", BOB, "password", 1_000_000.0, 2_000_000.0, 1_000_000.0, "", "", version=old_version)
    login, made = api_token("login", BOB, login=True), api_token("made", BOB)

    async def check_refused() -> None:
        for change in (
            workers.first.add_token(login, b"hash", expected_version=old_version, by=BY_ROOT),
            workers.first.add_token(made, b"hash", expected_version=old_version, by=BY_ROOT),
            workers.first.add_login_session(session, b"hash", by=BY_ROOT),
            workers.first.set_password(BOB, "$old", expected_version=old_version, by=BY_ROOT),
        ):
            with pytest.raises(Unauthorized):
                await change
        assert workers.first.tokens(BOB, None, 10).items == []
        assert workers.first.login_sessions(BOB) == []

    await workers.second.set_password(BOB, "$new", expected_version=old_version, by=BY_ROOT)
    await check_refused()
    assert workers.first.password_hash(BOB) == "$new"
    await workers.second.remove_account(BOB, by=BY_ROOT)
    await check_refused()


async def test_the_last_use_of_a_token_is_stored(workers: TwoWorkers) -> None:
    """The time of the last use of a token is stored. This does not change the epoch of rights, and adds no entry to the
    audit log."""
    await workers.first.add_token(api_token("t1"), b"hash", by=BY_ROOT)
    entries_before = workers.audit_entries()
    await workers.first.save_token_use("t1", 1_000_050.0)
    await workers.second.save_token_use("t1", 1_000_040.0)
    await workers.second.save_token_use("unknown", 1_000_040.0)
    assert workers.first.token("t1")[0].used == 1_000_050.0
    assert not workers.epoch_changed()
    assert workers.audit_entries() == entries_before


async def test_the_first_signing_key_is_made_once(workers: TwoWorkers) -> None:
    """If two workers need the first signing key at the same time, one key is created and both use it. Later calls
    create no key."""
    assert workers.first.signing_keys() == []
    first, second = await asyncio.gather(
        workers.first.ensure_key(lambda: signing_key("k1"), by=BY_ROOT),
        workers.second.ensure_key(lambda: signing_key("k2"), by=BY_ROOT),
    )
    assert first == second
    assert workers.second.signing_keys() == [first]
    assert workers.epoch_changed()

    def make() -> SigningKey:
        raise AssertionError("there is a key")

    assert await workers.second.ensure_key(make, by=BY_ROOT) == first
    assert not workers.epoch_changed()
    assert workers.audit_entries(action="key.make") == [("key.make", first.id)]


KEY_PROCESS = """
import asyncio, sys
from pathlib import Path
from storage.access import SigningKey
from storage.content import Actor
from storage.composition import open_accounts

async def main():
    async with open_accounts(Path(sys.argv[1])) as accounts:
        print("ready", flush=True)
        sys.stdin.readline()
        made = SigningKey(sys.argv[2], sys.argv[2].encode(), 1.0)
        for _ in range(5):
            key = await accounts.ensure_key(lambda: made, by=Actor(sys.argv[2]))
            print(key.id, flush=True)

asyncio.run(main())
"""


@pytest.mark.slow
async def test_processes_that_race_for_the_first_key_get_the_same_key(data: Path) -> None:
    """Four processes propose their own keys at the same time. One of these keys becomes the signing key of all four."""
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", KEY_PROCESS, str(data), f"k{number}"),
            cwd=PROJECT_ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        for number in range(4)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
        # All processes are started before the first output is read.
        key_ids = [(await process.communicate())[0].split() for process in processes]
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert [process.returncode for process in processes] == [0] * 4
    assert {key_id for ids in key_ids for key_id in ids} == {key_ids[0][0]}
    assert [len(ids) for ids in key_ids] == [5] * 4


async def test_a_rotated_key_is_accepted_until_it_expires(workers: TwoWorkers) -> None:
    """After a rotation, the new key signs and is first in the list. The old key is accepted until it expires."""
    await workers.first.ensure_key(lambda: signing_key("k1"), by=BY_ROOT)
    workers.note_epoch()
    workers.clock.now += 10
    await workers.second.rotate_key(signing_key("k2"), keep_seconds=300.0, by=BY_ROOT)
    assert workers.epoch_changed()
    assert [(k.id, k.retired, k.until) for k in workers.first.signing_keys()] == [
        ("k2", None, None),
        ("k1", 1_000_010.0, 1_000_310.0),
    ]
    assert workers.first.signing_keys()[1].secret == b"secret of k1"
    workers.clock.now += 299
    await workers.first.rotate_key(signing_key("k3"), keep_seconds=300.0, by=BY_ROOT)
    assert [k.id for k in workers.second.signing_keys()] == ["k3", "k2", "k1"]
    workers.clock.now += 1
    assert [k.id for k in workers.second.signing_keys()] == ["k3", "k2"]
    assert workers.audit_entries(action="key.rotate") == [("key.rotate", "k2"), ("key.rotate", "k3")]


async def test_a_rotation_can_delete_old_keys_at_once(workers: TwoWorkers) -> None:
    """With `keep_seconds=0`, as after a leak, a rotation deletes all older keys, even if they have not expired. They
    stay deleted if the clock is set back."""
    await workers.first.ensure_key(lambda: signing_key("k1"), by=BY_ROOT)
    await workers.first.rotate_key(signing_key("k2"), keep_seconds=300.0, by=BY_ROOT)
    await workers.second.rotate_key(signing_key("k3"), keep_seconds=0.0, by=BY_ROOT)
    assert [k.id for k in workers.first.signing_keys()] == ["k3"]
    workers.clock.now -= 100
    assert [k.id for k in workers.first.signing_keys()] == ["k3"]


async def test_failed_logins_of_all_processes_add_up(workers: TwoWorkers) -> None:
    """After failed logins, further logins from an address or for an account are throttled for some time. Each failure
    adds seconds to this time, in whichever process it occurs. A successful login ends the throttling."""
    await workers.first.add_failures({"address": TEN_SECONDS, "account": THREE_SECONDS})
    await workers.second.add_failures({"address": TEN_SECONDS})
    assert workers.first.throttled_until("address") == 1_000_020.0
    assert workers.second.throttled_until("account") == 1_000_003.0
    assert workers.second.throttled_until("another") == 0.0
    workers.clock.now += 15
    await workers.first.add_failures({"address": TEN_SECONDS, "account": THREE_SECONDS})
    assert workers.second.throttled_until("address") == 1_000_030.0
    assert workers.second.throttled_until("account") == 1_000_018.0
    workers.clock.now += 15
    assert workers.second.throttled_until("address") == 0.0
    await workers.second.add_failures({"address": TEN_SECONDS, "account": THREE_SECONDS})
    await workers.first.clear_failures(["address", "another"])
    assert (workers.second.throttled_until("address"), workers.second.throttled_until("account")) == (0.0, 1_000_033.0)
    assert not workers.epoch_changed()


async def test_a_key_that_is_added_once(data: Path, workers: TwoWorkers) -> None:
    """Of several processes that add the same throttling key once, one succeeds. After the key's time has passed, it can
    be added again, and keys whose time has passed are deleted."""
    both_workers = (workers.first, workers.second) * 2
    added = await asyncio.gather(*(worker.mark_once("login", 10.0) for worker in both_workers))
    assert sorted(added) == [False, False, False, True]
    assert workers.second.throttled_until("login") == 1_000_010.0
    assert await workers.first.mark_once("another", 20.0)
    workers.clock.now += 10
    assert await workers.second.mark_once("third", 5.0)
    db = second_connection(data / "entrepot.db")
    assert db.execute("SELECT key FROM login_pace ORDER BY key").fetchall() == [("another",), ("third",)]
    db.close()
    assert await workers.second.mark_once("login", 10.0)


async def test_old_failed_logins_are_deleted(data: Path, workers: TwoWorkers) -> None:
    """When a login fails, the records of failures whose throttling is over are deleted."""
    for number in range(50):
        await workers.first.add_failures({f"address {number}": FailureCost(1.0, 100.0)})
        workers.clock.now += 1
    await workers.first.add_failures({"last": FailureCost(1.0, 100.0)})
    db = second_connection(data / "entrepot.db")
    assert db.execute("SELECT key FROM login_pace").fetchall() == [("last",)]
    db.close()


async def test_failed_logins_of_the_future_pass(data: Path, workers: TwoWorkers) -> None:
    """A login failed while the clock was ahead. After the clock was set back, the next failure under the same key
    counts as the first one, and the records of other keys end after `LONGEST_THROTTLING_SECONDS` at the latest."""
    workers.clock.now += 2 * LONGEST_THROTTLING_SECONDS
    await workers.first.add_failures({"address": TEN_SECONDS, "account": THREE_SECONDS})
    workers.clock.now -= 2 * LONGEST_THROTTLING_SECONDS
    await workers.first.add_failures({"address": TEN_SECONDS})
    assert workers.first.throttled_until("address") == 1_000_010.0
    assert workers.first.throttled_until("account") == workers.clock() + LONGEST_THROTTLING_SECONDS


async def test_recorded_use_of_the_future_is_replaced(workers: TwoWorkers) -> None:
    """An API token was used while the clock was ahead. After the clock was set back, the next use is recorded. Uses
    that are recorded out of order do not replace later ones."""
    await workers.first.add_token(api_token("t1"), b"hash", by=BY_ROOT)
    for used_at, recorded in ((1_086_400.0, 1_086_400.0), (1_000_000.0, 1_000_000.0), (999_990.0, 1_000_000.0)):
        await workers.first.save_token_use("t1", used_at)
        assert workers.second.token("t1")[0].used == recorded


async def test_the_number_of_api_tokens_of_an_account_is_limited(workers: TwoWorkers) -> None:
    """An account can have at most `MAX_PERSONAL_TOKENS` API tokens. A further token is refused until one is revoked.
    Tokens of other accounts, and refresh tokens, do not count."""
    for number in range(MAX_PERSONAL_TOKENS):
        await workers.first.add_token(api_token(f"t{number}"), b"hash", by=BY_ROOT)
    with pytest.raises(AccountInvalid, match="revoke some of these tokens first"):
        await workers.second.add_token(api_token("more"), b"hash", by=BY_ROOT)
    await workers.second.add_token(api_token("login", login=True), b"hash", by=BY_ROOT)
    await workers.second.add_token(api_token("bobs", BOB), b"hash", by=BY_ROOT)
    await workers.second.revoke_token("t0", by=BY_ROOT)
    await workers.first.add_token(api_token("more"), b"hash", by=BY_ROOT)
