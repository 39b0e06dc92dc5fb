"""The throttle of failed logins, over all workers. It does not lock the owner of an account out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from registry.auth.password.throttle import (
    BY_ACCOUNT,
    BY_ACCOUNT_AND_ADDRESS,
    BY_ADDRESS,
    FAMILIAR_SECONDS,
    LoginThrottle,
)
from registry.client_addresses import network_of
from storage.content import Actor
from storage.errors import TooManyRequests, Unauthorized
from tests.fakes.auth_worker import ALICE, AT_HOME, ELSEWHERE, PASSWORD, AuthClock, AuthWorker, auth_worker


def address(number: int) -> str:
    return f"203.0.113.{number}" if number < 256 else f"2001:db8:{number:x}::1"


async def fail(pace: LoginThrottle, name: str, place: str, times: int) -> None:
    for _ in range(times):
        pace.check(name, place)
        await pace.record_failure(name, place)


@pytest.fixture
def pace(worker: AuthWorker) -> LoginThrottle:
    return LoginThrottle(worker.accounts, worker.clock)


def held_back(pace: LoginThrottle, name: str, place: str) -> int:
    """Returns the seconds until the next attempt is allowed; 0 means now."""
    try:
        pace.check(name, place)
    except TooManyRequests as error:
        return error.retry_after
    return 0


async def test_one_account_from_one_address(pace: LoginThrottle, worker: AuthWorker) -> None:
    """Ten attempts on an account from an address are free, then one is allowed every 30 seconds. Other accounts from
    this address, and this account from other addresses, are not held back."""
    await fail(pace, ALICE, address(1), BY_ACCOUNT_AND_ADDRESS.burst)
    wait = held_back(pace, ALICE, address(1))
    assert wait == BY_ACCOUNT_AND_ADDRESS.cost_seconds
    assert held_back(pace, "bob", address(1)) == 0
    assert held_back(pace, ALICE, address(2)) == 0
    worker.clock.now += wait
    await fail(pace, ALICE, address(1), 1)
    assert held_back(pace, ALICE, address(1)) == BY_ACCOUNT_AND_ADDRESS.cost_seconds
    worker.clock.now += BY_ACCOUNT_AND_ADDRESS.cost_seconds * BY_ACCOUNT_AND_ADDRESS.burst
    await fail(pace, ALICE, address(1), BY_ACCOUNT_AND_ADDRESS.burst)


async def test_many_accounts_from_one_address(pace: LoginThrottle) -> None:
    """A client that tries many account names is held back for all of them, from any address of its network."""
    for number in range(BY_ADDRESS.burst):
        await fail(pace, f"user{number}", "2001:db8:1:2::1", 1)
    assert held_back(pace, "another", "2001:db8:1:2:ffff::9") == BY_ADDRESS.cost_seconds
    assert held_back(pace, "another", "2001:db8:1:3::1") == 0


async def test_owner_is_not_locked_out(pace: LoginThrottle) -> None:
    """An account that is attacked from many addresses is held back at new addresses only, not where its owner has
    logged in before."""
    await pace.record_success(ALICE, address(1))
    for number in range(BY_ACCOUNT.burst):
        await fail(pace, ALICE, address(100 + number), 1)
    assert held_back(pace, ALICE, address(2)) == BY_ACCOUNT.cost_seconds
    assert held_back(pace, ALICE, address(1)) == 0
    await fail(pace, ALICE, address(1), BY_ACCOUNT_AND_ADDRESS.burst - 1)
    assert held_back(pace, ALICE, address(1)) == 0
    assert held_back(pace, "bob", address(2)) == 0


async def test_owner_stays_known_for_a_month(pace: LoginThrottle, worker: AuthWorker) -> None:
    """An address stays familiar for a month after the last login from it."""
    await pace.record_success(ALICE, address(1))
    worker.clock.now += FAMILIAR_SECONDS - 60
    await pace.record_success(ALICE, address(1))
    worker.clock.now += FAMILIAR_SECONDS - 60
    for number in range(BY_ACCOUNT.burst):
        await fail(pace, ALICE, address(100 + number), 1)
    assert held_back(pace, ALICE, address(1)) == 0
    worker.clock.now += 120
    for number in range(BY_ACCOUNT.burst):
        await pace.record_failure(ALICE, address(100 + number))
    assert held_back(pace, ALICE, address(1)) > 0


async def test_owners_mistakes_do_not_count_against_the_account(pace: LoginThrottle) -> None:
    """Failures from a familiar address do not hold the owner back at a new address."""
    await pace.record_success(ALICE, address(1))
    for _ in range(BY_ACCOUNT.burst):
        await pace.record_failure(ALICE, address(1))
    assert held_back(pace, ALICE, address(2)) == 0


async def test_success_forgives_this_account_from_here(pace: LoginThrottle) -> None:
    """The right password clears the failures of this account from this address. It does not clear the other failures
    from the address, because an attacker with an account could otherwise clear the failures of the attacker's
    guesses."""
    await fail(pace, ALICE, address(1), BY_ACCOUNT_AND_ADDRESS.burst)
    await pace.record_success(ALICE, address(1))
    assert held_back(pace, ALICE, address(1)) == 0
    for number in range(BY_ADDRESS.burst - BY_ACCOUNT_AND_ADDRESS.burst):
        await fail(pace, f"user{number}", address(1), 1)
    await pace.record_success("mallory", address(1))
    assert held_back(pace, "another", address(1)) > 0


async def test_counted_over_workers(data: Path, clock: AuthClock, worker: AuthWorker) -> None:
    """A failure that one worker counts holds the next request back on another."""
    async with auth_worker(data, clock) as other:
        await fail(LoginThrottle(worker.accounts, clock), ALICE, address(1), BY_ACCOUNT_AND_ADDRESS.burst)
        assert held_back(LoginThrottle(other.accounts, clock), ALICE, address(1)) > 0


@pytest.mark.parametrize("name", ["alice", "nobody-here"])
@pytest.mark.slow
async def test_known_and_unknown_accounts_alike(worker: AuthWorker, name: str) -> None:
    """The time from which an attempt is held back, and the error, are the same whether or not the account exists."""
    answers = []
    for attempt in range(BY_ACCOUNT_AND_ADDRESS.burst + 1):
        try:
            await worker.access.credential_verifier.verify_basic(name, f"wrong {attempt}", ELSEWHERE)
        except Unauthorized as error:
            answers.append(("401", error.message))
        except TooManyRequests as error:
            answers.append((str(error.retry_after), error.message))
    assert answers == [("401", "the credentials are not valid")] * BY_ACCOUNT_AND_ADDRESS.burst + [
        ("30", "too many failed logins; try again later")
    ]


async def test_attack_and_owner(worker: AuthWorker) -> None:
    """While an account is attacked from many addresses, its owner can log in from a familiar address, and with an API
    token from any address. At any other address, the right password is held back like a guess."""
    credentials = worker.access.credential_verifier
    assert await credentials.verify_basic(ALICE, PASSWORD, AT_HOME)
    pace = LoginThrottle(worker.accounts, worker.clock)
    for number in range(2 * BY_ACCOUNT.burst):
        await pace.record_failure(ALICE, address(100 + number))
    for guess in ("a guess", PASSWORD):
        with pytest.raises(TooManyRequests):
            await credentials.verify_basic(ALICE, guess, ELSEWHERE)
    assert await credentials.verify_basic(ALICE, PASSWORD, AT_HOME)
    made = await worker.add_token(ALICE)
    assert await credentials.verify_basic(ALICE, made.text, replace(ELSEWHERE, address=address(99)))


async def test_the_same_wrong_password_is_counted_once_a_day(worker: AuthWorker) -> None:
    """A client that sends the same outdated password many times counts as one failure a day, so that the owner can log
    in from the same address."""
    for _ in range(20 * BY_ACCOUNT_AND_ADDRESS.burst):
        with pytest.raises(Unauthorized):
            await worker.access.credential_verifier.verify_basic(ALICE, "the old password", AT_HOME)
    assert await worker.access.credential_verifier.verify_basic(ALICE, PASSWORD, AT_HOME)


async def test_a_new_password_counts_at_once(worker: AuthWorker) -> None:
    """A password that was cached as wrong is checked again when its account changes."""
    with pytest.raises(Unauthorized):
        await worker.access.credential_verifier.verify_basic(ALICE, "the new password", AT_HOME)
    from registry.auth.password.hashing import hash_password

    await worker.accounts.set_password(ALICE, hash_password("the new password"), by=Actor("operator"))
    assert await worker.access.credential_verifier.verify_basic(ALICE, "the new password", AT_HOME)


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
    """For the throttle, an IPv4 address is the same address in each of its notations. IPv6 addresses count by their
    64-bit network."""
    assert network_of(given) == network
