"""API tokens, signing keys and the throttle of logins in the store, as two workers see them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import apsw
import pytest

from storage.access import AccountExists, AccountInvalid, AccountName, AccountUnknown, Action, SigningKey, TokenLimit
from storage.metadata.sqlite.access.api_token_table import MOST_TOKENS
from storage.patterns import NamePattern
from tests.fakes.server_process import ROOT as PROJECT
from tests.unit.storage.metadata.account_views import (
    ALICE,
    BOB,
    BY_ROOT,
    CI,
    TwoWorkers,
    add_people,
    api_token,
    key,
    two_workers,
)


@pytest.fixture
async def both(data: Path) -> AsyncIterator[TwoWorkers]:
    async with two_workers(data) as opened:
        await add_people(opened.one)
        opened.changed()
        yield opened


async def test_a_token_is_stored_as_it_was_made(both: TwoWorkers) -> None:
    """A token is stored with the hash of its secret and with its limits. A new token does not change the epoch, so a
    login clears no caches."""
    limits = (
        TokenLimit(NamePattern("team/**"), Action.PULL | Action.PUSH),
        TokenLimit(NamePattern("web"), Action.PULL),
    )
    for made in (api_token("t1"), api_token("t2", limits=limits, expires=2_000_000.0), api_token("t3", limits=())):
        await both.one.add_token(made, made.id.encode(), by=BY_ROOT)
        assert both.two.token(made.id) == (made, made.id.encode())
    assert not both.changed()
    with pytest.raises(AccountExists):
        await both.two.add_token(api_token("t1", BOB), b"other", by=BY_ROOT)
    with pytest.raises(AccountUnknown):
        await both.two.add_token(api_token("t4", AccountName("nobody")), b"hash", by=BY_ROOT)
    assert both.one.token("t1")[0].account == CI
    assert both.told(target="ci", action="token.add") == [("token.add", "ci")] * 3


async def test_a_revoked_token_is_gone_at_once(both: TwoWorkers) -> None:
    """A revoked token is unknown to every process at once, and the epoch changes."""
    await both.one.add_token(api_token("t1"), b"hash", by=BY_ROOT)
    await both.two.revoke_token("t1", by=BY_ROOT)
    assert both.changed()
    with pytest.raises(AccountUnknown):
        both.one.token("t1")
    with pytest.raises(AccountUnknown):
        await both.one.revoke_token("t1", by=BY_ROOT)
    assert both.told(action="token.revoke") == [("token.revoke", "ci")]


async def test_an_expired_token_is_unknown(both: TwoWorkers) -> None:
    """A token is unknown from the second of its expiry. The next change deletes its row."""
    await both.one.add_token(api_token("t1", expires=1_000_100.0), b"hash", by=BY_ROOT)
    await both.one.add_token(api_token("t2"), b"hash", by=BY_ROOT)
    both.clock.now = 1_000_099.9
    assert both.two.token("t1")[0].expires == 1_000_100.0
    both.clock.now = 1_000_100.0
    with pytest.raises(AccountUnknown):
        both.two.token("t1")
    assert [made.id for made in both.two.tokens(None, None, 10).items] == ["t2"]
    assert [made.id for made in both.two.tokens(CI, None, 10).items] == ["t2"]
    with pytest.raises(AccountUnknown):
        await both.two.revoke_token("t1", by=BY_ROOT)
    await both.one.add_token(api_token("t1"), b"again", by=BY_ROOT)
    assert both.two.token("t1") == (api_token("t1"), b"again")


async def test_lists_of_tokens_go_by_id_in_pages(both: TwoWorkers) -> None:
    """The tokens of all accounts, or of one account, are listed in pages, in the order of their ids."""
    for token_id, account in (("t3", CI), ("t1", BOB), ("t2", CI), ("t4", CI)):
        await both.one.add_token(api_token(token_id, account), b"hash", by=BY_ROOT)
    page = both.two.tokens(None, None, 3)
    assert ([made.id for made in page.items], page.more) == (["t1", "t2", "t3"], True)
    page = both.two.tokens(CI, "t2", 2)
    assert ([made.id for made in page.items], page.more) == (["t3", "t4"], False)
    assert both.two.tokens(ALICE, None, 2).items == []


async def test_a_new_password_ends_logins(both: TwoWorkers) -> None:
    """A new password deletes the refresh tokens that were made with the old one. Tokens that the person made, and
    tokens of others, stay."""
    await both.one.add_token(api_token("login", BOB, login=True), b"hash", by=BY_ROOT)
    await both.one.add_token(api_token("made", BOB), b"hash", by=BY_ROOT)
    await both.one.add_token(api_token("other", ALICE, login=True), b"hash", by=BY_ROOT)
    await both.two.set_password(BOB, "$new", by=BY_ROOT)
    assert both.changed()
    assert [made.id for made in both.one.tokens(None, None, 10).items] == ["made", "other"]


async def test_the_use_of_a_token_is_noted(both: TwoWorkers) -> None:
    """The time of the last use is stored. This does not change the epoch, and adds no entry to the audit log."""
    await both.one.add_token(api_token("t1"), b"hash", by=BY_ROOT)
    lines = both.told()
    await both.one.save_token_use("t1", 1_000_050.0)
    await both.two.save_token_use("t1", 1_000_040.0)
    await both.two.save_token_use("unknown", 1_000_040.0)
    assert both.one.token("t1")[0].used == 1_000_050.0
    assert not both.changed()
    assert both.told() == lines


async def test_the_first_key_is_made_once(both: TwoWorkers) -> None:
    """The first call creates the signing key, later calls do not."""
    assert both.one.signing_keys() == []
    first, second = await asyncio.gather(
        both.one.ensure_key(lambda: key("k1"), by=BY_ROOT), both.two.ensure_key(lambda: key("k2"), by=BY_ROOT)
    )
    assert first == second
    assert both.two.signing_keys() == [first]
    assert both.changed()

    def make() -> SigningKey:
        raise AssertionError("there is a key")

    assert await both.two.ensure_key(make, by=BY_ROOT) == first
    assert not both.changed()
    assert both.told(action="key.make") == [("key.make", first.id)]


RACER = """
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
async def test_processes_that_race_for_the_first_key_get_the_same(data: Path) -> None:
    """Four processes propose their own keys at the same time. One of these keys becomes the signing key of all four."""
    racers = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", RACER, str(data), f"k{number}"),
            cwd=PROJECT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        for number in range(4)
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert await racer.stdout.readline() == b"ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write(b"go\n")
        # All have been told before the first is waited for.
        said = [(await racer.communicate())[0].split() for racer in racers]
    finally:
        for racer in racers:
            if racer.returncode is None:
                racer.kill()
                await racer.wait()
    assert [racer.returncode for racer in racers] == [0] * 4
    assert {word for words in said for word in words} == {said[0][0]}
    assert [len(words) for words in said] == [5] * 4


async def test_a_rotated_key_is_accepted_until_it_expires(both: TwoWorkers) -> None:
    """After a rotation, the new key signs and is first in the list. The old key is accepted until it expires."""
    await both.one.ensure_key(lambda: key("k1"), by=BY_ROOT)
    both.changed()
    both.clock.now += 10
    await both.two.rotate_key(key("k2"), keep=300.0, by=BY_ROOT)
    assert both.changed()
    assert [(k.id, k.retired, k.until) for k in both.one.signing_keys()] == [
        ("k2", None, None),
        ("k1", 1_000_010.0, 1_000_310.0),
    ]
    assert both.one.signing_keys()[1].secret == b"secret of k1"
    both.clock.now += 299
    await both.one.rotate_key(key("k3"), keep=300.0, by=BY_ROOT)
    assert [k.id for k in both.two.signing_keys()] == ["k3", "k2", "k1"]
    both.clock.now += 1
    assert [k.id for k in both.two.signing_keys()] == ["k3", "k2"]
    assert both.told(action="key.rotate") == [("key.rotate", "k2"), ("key.rotate", "k3")]


async def test_a_key_that_others_know_is_dropped_at_once(both: TwoWorkers) -> None:
    """A rotation with immediate effect deletes all older keys, whatever time they had left. Their secrets are in no row
    any more."""
    await both.one.ensure_key(lambda: key("k1"), by=BY_ROOT)
    await both.one.rotate_key(key("k2"), keep=300.0, by=BY_ROOT)
    await both.two.rotate_key(key("k3"), keep=0.0, by=BY_ROOT)
    assert [k.id for k in both.one.signing_keys()] == ["k3"]
    both.clock.now -= 100
    assert [k.id for k in both.one.signing_keys()] == ["k3"]


async def test_failures_add_up_for_all_processes(both: TwoWorkers) -> None:
    """Failed logins of all processes add up. Each failure adds seconds to the time that is left from earlier ones. Time
    or a successful login reduces it."""
    await both.one.add_failures({"address": 10.0, "account": 3.0})
    await both.two.add_failures({"address": 10.0})
    assert both.one.throttled_until("address") == 1_000_020.0
    assert both.two.throttled_until("account") == 1_000_003.0
    assert both.two.throttled_until("another") == 0.0
    both.clock.now += 15
    await both.one.add_failures({"address": 10.0, "account": 3.0})
    assert both.two.throttled_until("address") == 1_000_030.0
    assert both.two.throttled_until("account") == 1_000_018.0
    both.clock.now += 15
    assert both.two.throttled_until("address") == 0.0
    await both.two.add_failures({"address": 10.0, "account": 3.0})
    await both.one.clear_failures(["address", "another"])
    assert (both.two.throttled_until("address"), both.two.throttled_until("account")) == (0.0, 1_000_033.0)
    assert not both.changed()


async def test_failures_are_not_kept_without_end(data: Path, both: TwoWorkers) -> None:
    """Failures whose time is over are deleted at the next failure."""
    for number in range(50):
        await both.one.add_failures({f"address {number}": 1.0})
        both.clock.now += 1
    await both.one.add_failures({"last": 1.0})
    db = apsw.Connection(str(data / "entrepot.db"))
    assert db.execute("SELECT key FROM login_pace").fetchall() == [("last",)]
    db.close()


async def test_an_account_has_so_many_api_tokens_at_the_most(both: TwoWorkers) -> None:
    """An account has a largest number of API tokens. Another one is refused until one is revoked. Tokens of other
    accounts, and refresh tokens, do not count."""
    for number in range(MOST_TOKENS):
        await both.one.add_token(api_token(f"t{number}"), b"hash", by=BY_ROOT)
    with pytest.raises(AccountInvalid, match="revoke some first"):
        await both.two.add_token(api_token("more"), b"hash", by=BY_ROOT)
    await both.two.add_token(api_token("login", login=True), b"hash", by=BY_ROOT)
    await both.two.add_token(api_token("bobs", BOB), b"hash", by=BY_ROOT)
    await both.two.revoke_token("t0", by=BY_ROOT)
    await both.one.add_token(api_token("more"), b"hash", by=BY_ROOT)
