"""The limit on the number of refresh tokens, the API tokens that `docker login` gets. A login beyond the limit revokes
an earlier token of the same account. These tests say which one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from storage.access import AccountUnknown, Action, TokenLimit
from storage.metadata.sqlite.access import api_token_table
from storage.metadata.sqlite.access.api_token_table import MAX_REFRESH_TOKENS
from storage.patterns import NamePattern
from tests.unit.storage.metadata.account_views import (
    ALICE,
    BOB,
    BY_ROOT,
    TwoWorkers,
    add_people,
    api_token,
    two_workers,
)

HOUR, DAY = 3600.0, 86400.0
LIMIT = 20
"""The limit in those tests that set it (the fixture `low_limit`)."""


@pytest.fixture
async def workers(data: Path) -> AsyncIterator[TwoWorkers]:
    async with two_workers(data) as opened:
        await add_people(opened.first)
        opened.note_epoch()
        yield opened


@pytest.fixture
def low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the limit to `LIMIT` tokens."""
    monkeypatch.setattr(api_token_table, "MAX_REFRESH_TOKENS", LIMIT)


async def log_in(workers: TwoWorkers, token_id: str, note: str, *, used_after: float | None = 1.0) -> None:
    """Adds a refresh token for bob, at the time that the clock shows. `used_after`: the time from the login to the only
    use that is recorded, in seconds; the clock does not move. None: no use is recorded."""
    token = replace(api_token(token_id, BOB, login=True), note=note, created=workers.clock.now)
    await workers.first.add_token(token, b"hash", by=BY_ROOT)
    if used_after is not None:
        await workers.first.save_token_use(token_id, workers.clock.now + used_after)


async def log_in_often(workers: TwoWorkers, name: str, note: str, count: int) -> None:
    """A host logs in `count` times, once a minute, and uses each token once. The ids are `name` with a number."""
    for number in range(count):
        workers.clock.now += 60
        await log_in(workers, f"{name}{number}", note)


def token_ids(workers: TwoWorkers) -> set[str]:
    return {token.id for token in workers.first.tokens(BOB, None, 2000).items}


@pytest.mark.slow
async def test_the_number_of_refresh_tokens_of_an_account_is_limited(workers: TwoWorkers) -> None:
    """If an account has the largest number of refresh tokens, a further one revokes the token that was used least
    recently, and changes the epoch of rights. API tokens that the user has made stay, whatever their ids and limits
    are. The same applies to tokens of other accounts."""
    limits = tuple(TokenLimit(NamePattern(f"team{number}/**"), Action.PULL) for number in range(50))
    personal = [f"a{number}" for number in range(10)]
    for token_id in personal:  # these ids sort before those of the refresh tokens
        await workers.first.add_token(api_token(token_id, BOB, limits=limits), b"hash", by=BY_ROOT)
    await workers.first.add_token(api_token("other", ALICE, login=True), b"hash", by=BY_ROOT)
    for number in range(MAX_REFRESH_TOKENS):
        token = replace(api_token(f"t{number}", BOB, login=True), created=998_000.0 + number)
        await workers.first.add_token(token, b"hash", by=BY_ROOT)
    await workers.first.save_token_use("t0", 999_500.0)
    assert not workers.epoch_changed()
    # The new token stays, although the clock was set back and its time is the earliest.
    await workers.second.add_token(replace(api_token("new", BOB, login=True), created=1.0), b"hash", by=BY_ROOT)
    assert workers.epoch_changed()
    assert workers.audit_entries(action="token.revoke") == [("token.revoke", "bob")]
    with pytest.raises(AccountUnknown):
        workers.first.token("t1")
    for token_id in (*personal, "other", "new", "t0", *(f"t{number}" for number in range(2, MAX_REFRESH_TOKENS))):
        assert workers.first.token(token_id)[0].id == token_id


async def test_a_fleet_can_log_in_at_once(workers: TwoWorkers) -> None:
    """500 machines behind one NAT, which all have the same note, and 300 machines with addresses of their own can log
    in with one account."""
    for number in range(500):
        await log_in(workers, f"nat{number}", "docker at 203.0.113.1", used_after=None)
    for number in range(300):
        await log_in(workers, f"own{number}", f"docker at 10.0.0.{number}", used_after=None)
    assert len(token_ids(workers)) == 800


@pytest.mark.usefixtures("low_limit")
async def test_a_host_that_logs_in_often_revokes_its_own_tokens(workers: TwoWorkers) -> None:
    """A host that logs in again and again revokes its own earlier tokens, the one that was used least recently first.
    Tokens of other hosts stay, even if they were used once, before all of these logins."""
    await log_in(workers, "laptop", "docker at 10.0.0.1")
    await log_in(workers, "desktop", "podman at 10.0.0.2", used_after=None)
    await log_in_often(workers, "ci", "docker at 10.0.0.3", 3 * LIMIT)
    newest = {f"ci{number}" for number in range(2 * LIMIT + 2, 3 * LIMIT)}
    assert token_ids(workers) == {"laptop", "desktop"} | newest


@pytest.mark.usefixtures("low_limit")
async def test_two_busy_hosts_share_the_limit(workers: TwoWorkers) -> None:
    """If several hosts log in again and again, the one with the most tokens loses one."""
    await log_in(workers, "laptop", "docker at 10.0.0.1")
    await log_in_often(workers, "a", "docker at 10.0.0.2", 2 * LIMIT)
    await log_in_often(workers, "b", "docker at 10.0.0.3", 2 * LIMIT)
    await log_in_often(workers, "c", "docker at 10.0.0.4", 3)
    kept = token_ids(workers)
    assert {"laptop", "c0", "c1", "c2"} <= kept
    counts = [sum(token_id.startswith(name) for token_id in kept) for name in "ab"]
    assert counts == [8, 8]


@pytest.mark.usefixtures("low_limit")
async def test_a_machine_in_use_stays_logged_in_behind_the_same_nat(workers: TwoWorkers) -> None:
    """All clients behind a NAT, or behind a proxy whose headers are not trusted, have the same note. A machine that has
    used its token an hour or more after its login stays logged in, although a job logs in again and again behind the
    same NAT, and although the machine is off for three weeks."""
    await log_in(workers, "laptop", "docker at 172.18.0.1", used_after=HOUR)
    workers.clock.now += 21 * DAY
    await log_in_often(workers, "ci", "docker at 172.18.0.1", 3 * LIMIT)
    assert "laptop" in token_ids(workers)
    assert len(token_ids(workers)) == LIMIT


@pytest.mark.usefixtures("low_limit")
async def test_two_machines_in_use_stay_logged_in_among_many_addresses(workers: TwoWorkers) -> None:
    """Two machines behind one NAT that are in use stay logged in, although jobs log in from ever new addresses, each
    of which has a single token."""
    for token_id in ("laptop", "desktop"):
        await log_in(workers, token_id, "docker at 203.0.113.1", used_after=HOUR)
    workers.clock.now += DAY
    for number in range(2 * LIMIT):
        await log_in_often(workers, f"ci{number}-", f"docker at 10.0.0.{number}", 1)
    assert {"laptop", "desktop"} <= token_ids(workers)
    assert len(token_ids(workers)) == LIMIT


@pytest.mark.usefixtures("low_limit")
async def test_a_token_that_was_not_used_for_a_month_is_not_in_use(workers: TwoWorkers) -> None:
    """A token that was not used for more than 30 days has no advantage over the others with the same note. So machines
    that are gone do not take the places of new ones."""
    for number in range(LIMIT):
        await log_in(workers, f"old{number}", "docker at 203.0.113.1", used_after=HOUR)
    workers.clock.now += 31 * DAY
    await log_in_often(workers, "new", "docker at 203.0.113.1", 5)
    kept = token_ids(workers)
    assert {f"new{number}" for number in range(5)} <= kept
    assert len(kept) == LIMIT


@pytest.mark.usefixtures("low_limit")
async def test_the_number_is_limited_if_all_tokens_are_in_use(workers: TwoWorkers) -> None:
    """If an account has more machines than the limit, and all are in use, those with the most common note lose the
    token that was used least recently."""
    await log_in(workers, "laptop", "docker at 10.0.0.1", used_after=HOUR)
    for number in range(LIMIT - 1):
        workers.clock.now += 60
        await log_in(workers, f"nat{number}", "docker at 203.0.113.1", used_after=HOUR)
    workers.clock.now += 2 * HOUR
    await log_in(workers, "desktop", "docker at 10.0.0.2")
    assert token_ids(workers) == {"laptop", "desktop", *(f"nat{number}" for number in range(1, LIMIT - 1))}


@pytest.mark.usefixtures("low_limit")
async def test_jobs_that_use_their_tokens_for_hours_do_not_log_out_a_new_machine(workers: TwoWorkers) -> None:
    """Jobs on one host log in and use their tokens for more than an hour, so that the account has as many tokens in use
    as the limit. A machine that logs in then stays logged in until it has used its token an hour later too, although
    the jobs go on. This is so with an address of its own, and, if it is not the only one, behind the NAT of the
    jobs."""
    for number in range(2 * LIMIT):
        workers.clock.now += 2 * HOUR
        await log_in(workers, f"job{number}", "docker at 203.0.113.1", used_after=HOUR)
    workers.clock.now += 2 * HOUR
    for token_id, note in (("own", "docker at 10.0.0.1"), ("nat", "docker at 203.0.113.1")):
        await log_in(workers, token_id, note)
    await log_in_often(workers, "ci", "docker at 203.0.113.1", 3)
    assert {"own", "nat"} <= token_ids(workers)
    assert len(token_ids(workers)) == LIMIT


@pytest.mark.usefixtures("low_limit")
async def test_new_refresh_tokens_stay_after_the_clock_was_set_back(workers: TwoWorkers) -> None:
    """An account got the largest number of refresh tokens while the clock was a day ahead. After the clock was set
    back, new refresh tokens do not revoke each other, but those of the future. Nor do they revoke those with a right
    time, of whatever note."""
    await log_in(workers, "before", "docker at 10.0.0.1")
    workers.clock.now += DAY
    for number in range(LIMIT - 1):
        await log_in(workers, f"t{number}", "docker at 10.0.0.2" if number % 2 else "docker at 10.0.0.1")
    workers.clock.now -= DAY
    for token_id in ("new", "newer"):
        await log_in(workers, token_id, "docker at 10.0.0.1")
    assert {"before", "new", "newer"} <= token_ids(workers)
    assert len(token_ids(workers)) == LIMIT


@pytest.mark.usefixtures("low_limit")
async def test_excess_tokens_of_older_versions_are_revoked_step_by_step(
    workers: TwoWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If an account has far more refresh tokens than the limit, because older versions allowed this, each login revokes
    a limited number of them, until the account has as many as the limit. The tokens that are in use stay. Logins do not
    compare the notes of all tokens, which takes a second for 100,000 tokens, until few enough are left."""
    with monkeypatch.context() as older_version:
        older_version.setattr(api_token_table, "MAX_REFRESH_TOKENS", 1000)
        await log_in(workers, "laptop", "docker at 10.0.0.1", used_after=HOUR)
        workers.clock.now += 2 * HOUR
        await log_in_often(workers, "t", "docker at 10.0.0.1", LIMIT + 25)
    monkeypatch.setattr(api_token_table, "_REVOKED_PER_LOGIN", 10)
    counts = []
    for number in range(4):
        with monkeypatch.context() as patch:
            if number == 0:
                patch.setattr(api_token_table, "_EXCESS_REFRESH_TOKENS", "not the statement of this login")
            await log_in_often(workers, f"n{number}", "docker at 10.0.0.1", 1)
        counts.append(len(token_ids(workers)))
    assert counts == [LIMIT + 17, LIMIT + 8, LIMIT, LIMIT]
    assert "laptop" in token_ids(workers)
