"""Throttles password logins after failures. The store counts the failures, so all workers share the counts.

There are three limits. Each limit allows a burst of failures; after the burst, the next attempt must wait. Each failure
adds a fixed number of seconds to the wait (the generic cell rate algorithm, a form of leaky bucket). Names of accounts
that do not exist are throttled like those of existing accounts.

- Per address, against guessing at many accounts. An IPv6 network with a prefix of 64 bits is one address. This limit
  does not count a failure if the account is not in the store and its line in the htpasswd file cannot be used, because
  even the right password is refused then.
- Per account and address, against guessing many passwords of one account.
- Per account, against guessing from many addresses. An attacker could use this limit to lock a person out. So the limit
  does not apply to *familiar* addresses, from which the account has logged in during the last 30 days.

If a password was verified for the client's address before and is still in the cache of verified credentials
(`registry.auth.credential_cache`), the login is not throttled. If a password was verified only for other addresses, the
login is throttled, even if `registry.auth.password.password_check` still has the password in its cache. The same wrong
password counts once a day for each account and network (`registry.auth.password.wrong_passwords`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from registry.client_addresses import network_of
from storage.access import LONGEST_THROTTLING_SECONDS, FailureCost
from storage.accounts import Accounts
from storage.errors import RegistryError, TooManyRequests

log = logging.getLogger(__name__)

DAY_SECONDS: Final = 86400.0
MAX_CONCURRENT_FAILURES: Final = 300
"""The largest number of failures that a limit counts beyond its burst. If many attempts begin before the burst is used
up, all of them can fail later. By default, there are at most four workers, which together can have 296 attempts in
progress (`registry.auth.password.hashing`)."""


@dataclass(frozen=True, slots=True)
class FailureRate:
    """A limit on failures.

    - `cost_seconds`: the seconds that each failure adds to the wait. In the long run, one failure is allowed per
      `cost_seconds`.
    - `burst`: the number of failures that are allowed in a row before an attempt must wait.
    """

    cost_seconds: float
    burst: int

    @property
    def failure_cost(self) -> FailureCost:
        """The cost of one failure, for the store."""
        return FailureCost(self.cost_seconds, self.cost_seconds * (self.burst + MAX_CONCURRENT_FAILURES))

    def wait_seconds(self, until: float, now: float) -> float:
        """Returns how many seconds the next attempt must wait.

        The store keeps a time for each *throttling key*, a text that stands for an account, an address or both (see the
        end of this file). Each failure moves the time of its keys `cost_seconds` further into the future. `until` is
        the time of one key. `until` and `now` are in seconds since 1970.

        If `until` is so far in the future that the clock must have been ahead when the time was stored, returns 0.0.
        Otherwise logins would be refused until the clock reaches `until`."""
        if until > self.failure_cost.latest_plausible_time(now):
            return 0.0
        # The cost of `burst - 1` failures causes no wait yet, so that `burst` attempts in a row are possible.
        return max(0.0, until - now - self.cost_seconds * (self.burst - 1))


BY_ADDRESS: Final = FailureRate(cost_seconds=6.0, burst=60)
"""Allows ten guesses a minute in the long run. The burst is large because many people can share an address."""
BY_ACCOUNT_AND_ADDRESS: Final = FailureRate(cost_seconds=30.0, burst=10)
"""Allows two guesses a minute in the long run. The burst is enough for a person who tries several passwords."""
BY_ACCOUNT: Final = FailureRate(cost_seconds=60.0, burst=50)
"""Allows 1440 guesses a day at one account in the long run, from all addresses together."""
FAMILIAR_SECONDS: Final = LONGEST_THROTTLING_SECONDS
"""How long an address stays familiar to an account after a login: 30 days, or up to a day less, because a login is
stored at most once a day. The store keeps the end of this period in the table of failures, in which no time is further
in the future than `LONGEST_THROTTLING_SECONDS`."""


class LoginThrottle:
    """Counts failed logins, and decides whether the next login to an account may be tried yet. `clock` returns seconds
    since 1970. An `address` is a client's IP address; empty if it is unknown."""

    def __init__(self, accounts: Accounts, clock: Callable[[], float]) -> None:
        self._accounts = accounts
        self._clock = clock

    def check(self, name: str, address: str) -> None:
        """Checks that a login to the account `name` from `address` may be tried now. Raises TooManyRequests if not. The
        error has the same text for all three limits, so that the text does not reveal which limit applies."""
        now, network = self._clock(), network_of(address)
        wait = 0.0
        if network:
            wait = max(
                BY_ADDRESS.wait_seconds(self._accounts.throttled_until(_address_key(network)), now),
                BY_ACCOUNT_AND_ADDRESS.wait_seconds(self._accounts.throttled_until(_pair_key(name, network)), now),
            )
        account_wait = BY_ACCOUNT.wait_seconds(self._accounts.throttled_until(_account_key(name)), now)
        if account_wait and not self._is_familiar(name, network, now):
            wait = max(wait, account_wait)
        if wait:
            raise TooManyRequests("too many failed logins; try again later", retry_after=math.ceil(wait))

    def check_provider_logins(self, address: str) -> None:
        """Checks that a login through the OpenID provider may be tried now from `address`. Raises TooManyRequests if
        not. Logins through the provider have a separate limit per address, with the rate `BY_ADDRESS`. So other
        people's wrong passwords from the same address do not delay these logins."""
        if network := network_of(address):
            wait = BY_ADDRESS.wait_seconds(self._accounts.throttled_until(_provider_key(network)), self._clock())
            if wait:
                raise TooManyRequests("too many failed logins; try again later", retry_after=math.ceil(wait))

    async def record_provider_failure(self, address: str) -> None:
        """Counts a failed login through the OpenID provider from `address`. Raises StorageFull, StorageFailed."""
        if network := network_of(address):
            await self._accounts.add_failures({_provider_key(network): BY_ADDRESS.failure_cost})

    async def record_failure(
        self, name: str, address: str, *, counts_for_account: bool = True, counts_for_address: bool = True
    ) -> None:
        """Counts a failed login to the account `name` from `address` in the limit per account and address. If
        `counts_for_address` is true, also counts it in the limit per address. If `counts_for_account` is true and the
        address is not familiar, also counts it in the limit per account. A failure from a familiar address is probably
        a mistake of the account's owner. Raises StorageFull, StorageFailed."""
        now, network = self._clock(), network_of(address)
        costs = {}
        if network:
            costs[_pair_key(name, network)] = BY_ACCOUNT_AND_ADDRESS.failure_cost
            if counts_for_address:
                costs[_address_key(network)] = BY_ADDRESS.failure_cost
        if counts_for_account and not self._is_familiar(name, network, now):
            costs[_account_key(name)] = BY_ACCOUNT.failure_cost
        await self._accounts.add_failures(costs)

    async def record_success(self, name: str, address: str) -> None:
        """Records a login: clears the failures in the limit per account and address, and makes the address familiar to
        the account. If the store cannot be written, only logs a warning, so that the login succeeds."""
        network = network_of(address)
        if not network:
            return
        try:
            if self._accounts.throttled_until(_pair_key(name, network)):
                await self._accounts.clear_failures([_pair_key(name, network)])
            remaining_seconds = max(0.0, self._familiar_until(name, network) - self._clock())
            if remaining_seconds < FAMILIAR_SECONDS - DAY_SECONDS:  # written at most once a day
                # Extends the stored time so that the address stays familiar for `FAMILIAR_SECONDS` from now.
                cost = FailureCost(FAMILIAR_SECONDS - remaining_seconds, FAMILIAR_SECONDS)
                await self._accounts.add_failures({_familiar_key(name, network): cost})
        except RegistryError as error:
            log.warning("could not record from which address %s has logged in: %s", name, error)

    def _is_familiar(self, name: str, network: str, now: float) -> bool:
        """Returns whether the address is familiar to the account."""
        return bool(network) and self._familiar_until(name, network) > now

    def _familiar_until(self, name: str, network: str) -> float:
        """Returns the time until which an address is familiar to an account; 0.0 if it is not familiar."""
        # `throttled_until` reads the time of any key. The time of a familiar address throttles nothing.
        return self._accounts.throttled_until(_familiar_key(name, network))


# The keys under which the store counts failures. A `network` is an IPv4 address, or an IPv6 network of 64 bits.


def _address_key(network: str) -> str:
    return f"address {network}"


def _provider_key(network: str) -> str:
    return f"provider {network}"


def _pair_key(name: str, network: str) -> str:
    return f"pair {name} {network}"


def _account_key(name: str) -> str:
    return f"account {name}"


def _familiar_key(name: str, network: str) -> str:
    """Returns the key for the time until which an address is familiar to an account. The table of failures can have
    this key, because the table maps any key to a time."""
    return f"known {name} {network}"
