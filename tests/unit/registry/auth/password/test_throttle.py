"""The throttle delays logins after failures. All workers share its counters. It never locks out the owner of an account
at an address from which the owner has logged in before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from registry.auth.password.hashing import hash_password
from registry.auth.password.throttle import (
    BY_ACCOUNT,
    BY_ACCOUNT_AND_ADDRESS,
    BY_ADDRESS,
    DAY_SECONDS,
    FAMILIAR_SECONDS,
    MAX_CONCURRENT_FAILURES,
    LoginThrottle,
)
from registry.client_addresses import network_of, site_of
from storage.content import Actor
from storage.errors import TooManyRequests, Unauthorized
from tests.fakes.auth_worker import ALICE, KNOWN_ADDRESS, OTHER_ADDRESS, PASSWORD, AuthClock, AuthWorker, auth_worker


def address(number: int) -> str:
    return f"203.0.113.{number}" if number < 256 else f"2001:db8:{number:x}::1"


async def attempt_and_fail(throttle: LoginThrottle, name: str, source: str, times: int) -> None:
    """Makes `times` failed attempts to log in as `name` from the address `source`. Each attempt has to be allowed."""
    for _ in range(times):
        throttle.check(name, source)
        await throttle.record_failure(name, source)


@pytest.fixture
def throttle(worker: AuthWorker) -> LoginThrottle:
    return LoginThrottle(worker.accounts, worker.clock)


def wait_seconds(throttle: LoginThrottle, name: str, source: str) -> int:
    """Returns the seconds until the next attempt is allowed. 0 means that it is allowed now."""
    try:
        throttle.check(name, source)
    except TooManyRequests as error:
        return error.retry_after
    return 0


async def test_one_account_from_one_address(throttle: LoginThrottle, worker: AuthWorker) -> None:
    """The first ten failed attempts on an account from an address cause no delay. After that, one attempt is allowed
    every 30 seconds. Other accounts from this address are not delayed, nor is this account from other addresses."""
    await attempt_and_fail(throttle, ALICE, address(1), BY_ACCOUNT_AND_ADDRESS.burst)
    delay = wait_seconds(throttle, ALICE, address(1))
    assert delay == BY_ACCOUNT_AND_ADDRESS.cost_seconds
    assert wait_seconds(throttle, "bob", address(1)) == 0
    assert wait_seconds(throttle, ALICE, address(2)) == 0
    worker.clock.now += delay
    await attempt_and_fail(throttle, ALICE, address(1), 1)
    assert wait_seconds(throttle, ALICE, address(1)) == BY_ACCOUNT_AND_ADDRESS.cost_seconds
    worker.clock.now += BY_ACCOUNT_AND_ADDRESS.cost_seconds * BY_ACCOUNT_AND_ADDRESS.burst
    await attempt_and_fail(throttle, ALICE, address(1), BY_ACCOUNT_AND_ADDRESS.burst)


async def test_many_accounts_from_one_address(throttle: LoginThrottle) -> None:
    """A client that tries many account names is delayed for every account, and from every address of its network."""
    for number in range(BY_ADDRESS.burst):
        await attempt_and_fail(throttle, f"user{number}", "2001:db8:1:2::1", 1)
    assert wait_seconds(throttle, "another", "2001:db8:1:2:ffff::9") == BY_ADDRESS.cost_seconds
    assert wait_seconds(throttle, "another", "2001:db8:1:3::1") == 0


async def test_owner_is_not_locked_out(throttle: LoginThrottle) -> None:
    """If an account is attacked from many addresses, logins from new addresses are delayed. Logins from an address from
    which the owner has logged in before are not."""
    await throttle.record_success(ALICE, address(1))
    for number in range(BY_ACCOUNT.burst):
        await attempt_and_fail(throttle, ALICE, address(100 + number), 1)
    assert wait_seconds(throttle, ALICE, address(2)) == BY_ACCOUNT.cost_seconds
    assert wait_seconds(throttle, ALICE, address(1)) == 0
    await attempt_and_fail(throttle, ALICE, address(1), BY_ACCOUNT_AND_ADDRESS.burst - 1)
    assert wait_seconds(throttle, ALICE, address(1)) == 0
    assert wait_seconds(throttle, "bob", address(2)) == 0


async def test_an_address_stays_familiar_for_a_month(throttle: LoginThrottle, worker: AuthWorker) -> None:
    """An address from which the owner has logged in is familiar. It stays familiar for a month after the last login
    from it."""
    await throttle.record_success(ALICE, address(1))
    worker.clock.now += FAMILIAR_SECONDS - 60
    await throttle.record_success(ALICE, address(1))
    worker.clock.now += FAMILIAR_SECONDS - 60
    for number in range(BY_ACCOUNT.burst):
        await attempt_and_fail(throttle, ALICE, address(100 + number), 1)
    assert wait_seconds(throttle, ALICE, address(1)) == 0
    worker.clock.now += 120
    for number in range(BY_ACCOUNT.burst):
        await throttle.record_failure(ALICE, address(100 + number))
    assert wait_seconds(throttle, ALICE, address(1)) > 0


async def test_failures_from_a_familiar_address_do_not_delay_other_addresses(throttle: LoginThrottle) -> None:
    """Failures from a familiar address do not delay the owner at a new address."""
    await throttle.record_success(ALICE, address(1))
    for _ in range(BY_ACCOUNT.burst):
        await throttle.record_failure(ALICE, address(1))
    assert wait_seconds(throttle, ALICE, address(2)) == 0


async def test_success_clears_the_failures_of_this_account_from_this_address(throttle: LoginThrottle) -> None:
    """The right password clears the failures of this account from this address. It does not clear the failures of other
    accounts from the address. Otherwise an attacker with an account could clear the failures of guesses at other
    accounts."""
    await attempt_and_fail(throttle, ALICE, address(1), BY_ACCOUNT_AND_ADDRESS.burst)
    await throttle.record_success(ALICE, address(1))
    assert wait_seconds(throttle, ALICE, address(1)) == 0
    for number in range(BY_ADDRESS.burst - BY_ACCOUNT_AND_ADDRESS.burst):
        await attempt_and_fail(throttle, f"user{number}", address(1), 1)
    await throttle.record_success("mallory", address(1))
    assert wait_seconds(throttle, "another", address(1)) > 0


async def test_workers_share_the_counters(data: Path, clock: AuthClock, worker: AuthWorker) -> None:
    """If one worker counts a failure, the next attempt is delayed on the other worker too."""
    async with auth_worker(data, clock) as other:
        await attempt_and_fail(LoginThrottle(worker.accounts, clock), ALICE, address(1), BY_ACCOUNT_AND_ADDRESS.burst)
        assert wait_seconds(LoginThrottle(other.accounts, clock), ALICE, address(1)) > 0


async def test_clock_that_was_ahead_does_not_refuse_logins(
    throttle: LoginThrottle, worker: AuthWorker, clock: AuthClock
) -> None:
    """Logins failed while the clock was a year ahead. After the clock was set back, these failures do not delay any
    login, and later failures are counted as usual."""
    clock.now += 365 * DAY_SECONDS
    for number in range(BY_ACCOUNT.burst):
        await throttle.record_failure(ALICE, address(number))
    for _ in range(BY_ADDRESS.burst):
        await throttle.record_failure(ALICE, address(1))
        await throttle.record_provider_failure(address(1))
    clock.now -= 365 * DAY_SECONDS
    assert wait_seconds(throttle, ALICE, address(1)) == 0
    throttle.check_provider_logins(address(1))
    await attempt_and_fail(throttle, ALICE, address(1), BY_ACCOUNT_AND_ADDRESS.burst)
    assert wait_seconds(throttle, ALICE, address(1)) == BY_ACCOUNT_AND_ADDRESS.cost_seconds
    for _ in range(BY_ADDRESS.burst):
        throttle.check_provider_logins(address(1))
        await throttle.record_provider_failure(address(1))
    with pytest.raises(TooManyRequests):
        throttle.check_provider_logins(address(1))


async def test_address_of_the_future_stays_familiar_for_a_month(throttle: LoginThrottle, worker: AuthWorker) -> None:
    """An address became familiar while the clock was a year ahead. After the clock was set back, the next failed login
    of any account shortens this: from then on, the address stays familiar for a month."""
    worker.clock.now += 365 * DAY_SECONDS
    await throttle.record_success(ALICE, address(1))
    worker.clock.now -= 365 * DAY_SECONDS
    await throttle.record_failure("bob", address(2))
    # The key "known …" does not stand for failures. Its time is the time until which the address is familiar.
    assert worker.accounts.throttled_until(f"known {ALICE} {address(1)}") == worker.clock() + FAMILIAR_SECONDS


async def test_failures_at_the_same_time_delay_for_limited_time(throttle: LoginThrottle) -> None:
    """However many attempts fail together, the delay has a limit. Failures after that neither lengthen the delay nor
    cancel it."""
    await throttle.record_success(ALICE, address(1))  # failures from here do not count in the limit per account
    for _ in range(MAX_CONCURRENT_FAILURES + 2 * BY_ACCOUNT_AND_ADDRESS.burst):
        await throttle.record_failure(ALICE, address(1))
    limit = BY_ACCOUNT_AND_ADDRESS.cost_seconds * (MAX_CONCURRENT_FAILURES + 1)
    assert wait_seconds(throttle, ALICE, address(1)) == limit


@pytest.mark.parametrize("name", ["alice", "nobody-here"])
@pytest.mark.slow
async def test_known_and_unknown_accounts_are_delayed_alike(worker: AuthWorker, name: str) -> None:
    """After the same number of failures, an attempt is delayed with the same error, whether or not the account
    exists."""
    answers = []
    for attempt in range(BY_ACCOUNT_AND_ADDRESS.burst + 1):
        try:
            await worker.access.credential_verifier.verify_basic(name, f"wrong {attempt}", OTHER_ADDRESS)
        except Unauthorized as error:
            answers.append(("401", error.message))
        except TooManyRequests as error:
            answers.append((str(error.retry_after), error.message))
    assert answers == [("401", "the credentials are not valid")] * BY_ACCOUNT_AND_ADDRESS.burst + [
        ("30", "too many failed logins; try again later")
    ]


@pytest.mark.slow
async def test_the_owner_can_log_in_during_an_attack(worker: AuthWorker) -> None:
    """While an account is attacked from many addresses, its owner can log in from a familiar address, and with an API
    token from any address. At any other address, the right password is refused with 429 like a guess."""
    credentials = worker.access.credential_verifier
    assert await credentials.verify_basic(ALICE, PASSWORD, KNOWN_ADDRESS)
    throttle = LoginThrottle(worker.accounts, worker.clock)
    for number in range(2 * BY_ACCOUNT.burst):
        await throttle.record_failure(ALICE, address(100 + number))
    for guess in ("a guess", PASSWORD):
        with pytest.raises(TooManyRequests):
            await credentials.verify_basic(ALICE, guess, OTHER_ADDRESS)
    assert await credentials.verify_basic(ALICE, PASSWORD, KNOWN_ADDRESS)
    api_token = await worker.add_token(ALICE)
    assert await credentials.verify_basic(ALICE, api_token.text, replace(OTHER_ADDRESS, address=address(99)))


async def test_the_same_wrong_password_is_counted_once_a_day(worker: AuthWorker) -> None:
    """A client that sends the same outdated password many times counts as one failure a day. So the owner can still log
    in from the same address."""
    for _ in range(20 * BY_ACCOUNT_AND_ADDRESS.burst):
        with pytest.raises(Unauthorized):
            await worker.access.credential_verifier.verify_basic(ALICE, "the old password", KNOWN_ADDRESS)
    assert await worker.access.credential_verifier.verify_basic(ALICE, PASSWORD, KNOWN_ADDRESS)


@pytest.mark.slow
async def test_a_new_password_is_accepted_at_once(worker: AuthWorker) -> None:
    """If a password was cached as wrong and its account changes, the password is checked again."""
    with pytest.raises(Unauthorized):
        await worker.access.credential_verifier.verify_basic(ALICE, "the new password", KNOWN_ADDRESS)
    await worker.accounts.set_password(ALICE, hash_password("the new password"), by=Actor("operator"))
    assert await worker.access.credential_verifier.verify_basic(ALICE, "the new password", KNOWN_ADDRESS)


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("unix:", "unix:"),
    ],
)
def test_network_of_an_address(address: str, network: str) -> None:
    """For the throttle, all notations of an IPv4 address are the same address. IPv6 addresses count by their 64-bit
    network."""
    assert network_of(address) == network


@pytest.mark.parametrize(
    ("address", "site"),
    [
        ("192.0.2.1", "192.0.2.0/24"),
        ("::ffff:192.0.2.1", "192.0.2.0/24"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1::/48"),
        ("", ""),
        ("unix:", "unix:"),
    ],
)
def test_site_of_an_address(address: str, site: str) -> None:
    """The site of a client is the network that one customer of a provider usually has."""
    assert site_of(address) == site
