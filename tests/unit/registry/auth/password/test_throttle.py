"""Guessing is slowed, over all workers, and nobody is locked out by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from registry.auth.password.throttle import BY_ACCOUNT, BY_ADDRESS, BY_PAIR, FAMILIAR_SECONDS, LoginThrottle
from registry.client_addresses import network_of
from storage.content import Actor
from storage.errors import TooManyRequests, Unauthorized
from tests.fakes.auth_worker import ALICE, AT_HOME, ELSEWHERE, PASSWORD, AuthClock, AuthWorker, auth_worker


def address(number: int) -> str:
    return f"203.0.113.{number}" if number < 256 else f"2001:db8:{number:x}::1"


async def fail(pace: LoginThrottle, name: str, place: str, times: int) -> None:
    for _ in range(times):
        pace.check(name, place)
        await pace.failed(name, place)


@pytest.fixture
def pace(worker: AuthWorker) -> LoginThrottle:
    return LoginThrottle(worker.accounts, worker.clock)


def held_back(pace: LoginThrottle, name: str, place: str) -> int:
    """Seconds until the next attempt; 0: now."""
    try:
        pace.check(name, place)
    except TooManyRequests as error:
        return error.retry_after
    return 0


async def test_one_account_from_one_address(pace: LoginThrottle, worker: AuthWorker) -> None:
    """Ten tries, then one each half minute. Other accounts from there and the account from elsewhere are as before."""
    await fail(pace, ALICE, address(1), BY_PAIR.burst)
    wait = held_back(pace, ALICE, address(1))
    assert wait == BY_PAIR.cost
    assert held_back(pace, "bob", address(1)) == 0
    assert held_back(pace, ALICE, address(2)) == 0
    worker.clock.now += wait
    await fail(pace, ALICE, address(1), 1)
    assert held_back(pace, ALICE, address(1)) == BY_PAIR.cost
    worker.clock.now += BY_PAIR.cost * BY_PAIR.burst
    await fail(pace, ALICE, address(1), BY_PAIR.burst)


async def test_many_accounts_from_one_address(pace: LoginThrottle) -> None:
    """Who goes through a list of names is held back for all of them, in whichever of its network's addresses."""
    for number in range(BY_ADDRESS.burst):
        await fail(pace, f"user{number}", "2001:db8:1:2::1", 1)
    assert held_back(pace, "another", "2001:db8:1:2:ffff::9") == BY_ADDRESS.cost
    assert held_back(pace, "another", "2001:db8:1:3::1") == 0


async def test_owner_is_not_locked_out(pace: LoginThrottle) -> None:
    """An account that is attacked from everywhere takes no more attempts from new addresses for a while, and does as
    ever where its owner has logged in; nobody but its owner can have logged in there."""
    await pace.record_success(ALICE, address(1))
    for number in range(BY_ACCOUNT.burst):
        await fail(pace, ALICE, address(100 + number), 1)
    assert held_back(pace, ALICE, address(2)) == BY_ACCOUNT.cost
    assert held_back(pace, ALICE, address(1)) == 0
    await fail(pace, ALICE, address(1), BY_PAIR.burst - 1)
    assert held_back(pace, ALICE, address(1)) == 0
    assert held_back(pace, "bob", address(2)) == 0


async def test_owner_stays_known_for_a_month(pace: LoginThrottle, worker: AuthWorker) -> None:
    """An address from which an account has not logged in for long is like any other, and logging in renews it."""
    await pace.record_success(ALICE, address(1))
    worker.clock.now += FAMILIAR_SECONDS - 60
    await pace.record_success(ALICE, address(1))
    worker.clock.now += FAMILIAR_SECONDS - 60
    for number in range(BY_ACCOUNT.burst):
        await fail(pace, ALICE, address(100 + number), 1)
    assert held_back(pace, ALICE, address(1)) == 0
    worker.clock.now += 120
    for number in range(BY_ACCOUNT.burst):
        await pace.failed(ALICE, address(100 + number))
    assert held_back(pace, ALICE, address(1)) > 0


async def test_owners_mistakes_do_not_count_against_the_account(pace: LoginThrottle) -> None:
    """A machine of the owner's with an old password does not keep them from logging in from a new place."""
    await pace.record_success(ALICE, address(1))
    for _ in range(BY_ACCOUNT.burst):
        await pace.failed(ALICE, address(1))
    assert held_back(pace, ALICE, address(2)) == 0


async def test_success_forgives_this_account_from_here(pace: LoginThrottle) -> None:
    """The right password ends the waiting for that account there. What was counted against the address stays: an
    attacker who has an account cannot log in between guesses to wipe them out."""
    await fail(pace, ALICE, address(1), BY_PAIR.burst)
    await pace.record_success(ALICE, address(1))
    assert held_back(pace, ALICE, address(1)) == 0
    for number in range(BY_ADDRESS.burst - BY_PAIR.burst):
        await fail(pace, f"user{number}", address(1), 1)
    await pace.record_success("mallory", address(1))
    assert held_back(pace, "another", address(1)) > 0


async def test_counted_over_workers(data: Path, clock: AuthClock, worker: AuthWorker) -> None:
    """What one worker has counted, the next request on another finds."""
    async with auth_worker(data, clock) as other:
        await fail(LoginThrottle(worker.accounts, clock), ALICE, address(1), BY_PAIR.burst)
        assert held_back(LoginThrottle(other.accounts, clock), ALICE, address(1)) > 0


@pytest.mark.parametrize("name", ["alice", "nobody-here"])
async def test_known_and_unknown_accounts_alike(worker: AuthWorker, name: str) -> None:
    """Which accounts there are shows neither in when somebody is held back nor in what they are told."""
    answers = []
    for attempt in range(BY_PAIR.burst + 1):
        try:
            await worker.access.credentials.verify_basic(name, f"wrong {attempt}", ELSEWHERE)
        except Unauthorized as error:
            answers.append(("401", error.message))
        except TooManyRequests as error:
            answers.append((str(error.retry_after), error.message))
    assert answers == [("401", "the credentials are not valid")] * BY_PAIR.burst + [
        ("30", "too many failed logins; try again later")
    ]


async def test_attack_and_owner(worker: AuthWorker) -> None:
    """While an account is being attacked from many addresses, its owner logs in where they are known, and with an API
    token from anywhere. The right password from elsewhere is held back like a guess."""
    credentials = worker.access.credentials
    assert await credentials.verify_basic(ALICE, PASSWORD, AT_HOME)
    pace = LoginThrottle(worker.accounts, worker.clock)
    for number in range(2 * BY_ACCOUNT.burst):
        await pace.failed(ALICE, address(100 + number))
    for guess in ("a guess", PASSWORD):
        with pytest.raises(TooManyRequests):
            await credentials.verify_basic(ALICE, guess, ELSEWHERE)
    assert await credentials.verify_basic(ALICE, PASSWORD, AT_HOME)
    made = await worker.add_token(ALICE)
    assert await credentials.verify_basic(ALICE, made.text, replace(ELSEWHERE, address=address(99)))


async def test_the_same_wrong_password_is_counted_once_a_day(worker: AuthWorker) -> None:
    """A client with an old password shows it over and over, which is no guessing: its owner, beside it, gets in."""
    for _ in range(20 * BY_PAIR.burst):
        with pytest.raises(Unauthorized):
            await worker.access.credentials.verify_basic(ALICE, "the old password", AT_HOME)
    assert await worker.access.credentials.verify_basic(ALICE, PASSWORD, AT_HOME)


async def test_a_new_password_counts_at_once(worker: AuthWorker) -> None:
    """That a password was wrong is forgotten when its account changes."""
    with pytest.raises(Unauthorized):
        await worker.access.credentials.verify_basic(ALICE, "the new password", AT_HOME)
    from registry.auth.password.hashing import hash_password

    await worker.accounts.set_password(ALICE, hash_password("the new password"), by=Actor("operator"))
    assert await worker.access.credentials.verify_basic(ALICE, "the new password", AT_HOME)


@pytest.mark.parametrize(
    ("given", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("unix:", "unix:"),
    ],
)
def test_network(given: str, network: str) -> None:
    """An IPv4 address is one, however it is written; of IPv6 one host has 64 bits to choose from."""
    assert network_of(given) == network
