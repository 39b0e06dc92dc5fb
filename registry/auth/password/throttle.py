"""Throttles password logins after failures. The store counts the failures, so all workers share the counts.

Three limits apply to a login with a password:

- Per address: slows down guessing at many accounts.
- Per account and address: slows down guessing many passwords of one account.
- Per account: slows down guessing from many addresses. It does not apply to *familiar* addresses, from which the
  account has logged in during the last 30 days. Otherwise an attacker could lock a person out.

Each limit allows a burst of failures. After the burst, the next attempt must wait, and each failure adds a fixed number
of seconds to the wait (the generic cell rate algorithm, a form of leaky bucket). All addresses of an IPv6 network with
a prefix of 64 bits count as one address. Accounts that do not exist are throttled like existing accounts.

A login is not throttled if the cache of verified credentials (`registry.auth.credential_cache`) has its password for
the client's address. A repeated wrong password counts once a day for each account and network
(`registry.auth.password.wrong_passwords`).
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
"""Largest number of failures that a limit counts after the burst is used up. Such failures occur because attempts that
run at the same time can all begin before the burst is used up, and all fail later. By default, at most 296 attempts run
at the same time, in at most four workers (`registry.auth.password.hashing`)."""


@dataclass(frozen=True, slots=True)
class FailureRate:
    """A limit on failures.

    - `cost_seconds`: the seconds that each failure adds to the wait. In the long run, the limit allows one failure per
      `cost_seconds`.
    - `burst`: the number of failures in a row that the limit allows before an attempt must wait.
    """

    cost_seconds: float
    burst: int

    @property
    def failure_cost(self) -> FailureCost:
        """The cost of one failure, in the form that the store needs."""
        return FailureCost(self.cost_seconds, self.cost_seconds * (self.burst + MAX_CONCURRENT_FAILURES))

    def wait_seconds(self, until: float, now: float) -> float:
        """Returns how many seconds the next attempt must wait.

        The store keeps a time for each *throttling key*, a text that stands for an account, an address or both. A
        failure moves the time of its keys `cost_seconds` further into the future.

        - `until`: the time of a key, in seconds since 1970. The result is 0.0 if `until` is later than
          `FailureCost.latest_plausible_time`: in this case, the machine's clock was ahead when the time was stored.
        - `now`: the present time, in seconds since 1970."""
        if until > self.failure_cost.latest_plausible_time(now):
            return 0.0
        # The first `burst - 1` failures cause no wait, so that `burst` attempts in a row are possible.
        return max(0.0, until - now - self.cost_seconds * (self.burst - 1))


BY_ADDRESS: Final = FailureRate(cost_seconds=6.0, burst=60)
"""Allows ten guesses a minute in the long run. The burst is large because many people can share an address."""
BY_ACCOUNT_AND_ADDRESS: Final = FailureRate(cost_seconds=30.0, burst=10)
"""Allows two guesses a minute in the long run. The burst is enough for a person who tries several passwords."""
BY_ACCOUNT: Final = FailureRate(cost_seconds=60.0, burst=50)
"""Allows 1440 guesses a day at one account in the long run, from all addresses together."""
FAMILIAR_SECONDS: Final = LONGEST_THROTTLING_SECONDS
"""How long an address stays familiar to an account after a login. It can be up to a day less, because a login is stored
at most once a day. The store keeps a time for each throttling key. The end of this period is stored as the time of the
key that `_familiar_key` returns; this key throttles nothing. The store allows times up to `LONGEST_THROTTLING_SECONDS`
in the future, so the period cannot be longer."""


class LoginThrottle:
    """Counts failed logins, and decides whether a login may be tried now. `clock` returns seconds since 1970. In the
    methods, `address` is the client's IP address; empty if it is unknown."""

    def __init__(self, accounts: Accounts, clock: Callable[[], float]) -> None:
        self._accounts = accounts
        self._clock = clock

    def check(self, name: str, address: str) -> None:
        """Checks that a login to the account `name` from `address` may be tried now. Raises TooManyRequests if not. The
        text of the error does not reveal which limit applies."""
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
        not. These logins have a separate limit per address, with the rate `BY_ADDRESS`. So wrong passwords from the
        same address do not delay them."""
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
        """Counts a failed login to the account `name` from `address`. Raises StorageFull, StorageFailed. The failure
        counts in these limits:

        - per account and address
        - per address, if `counts_for_address` is true
        - per account, if `counts_for_account` is true and the address is not familiar

        If `address` is unknown, the failure counts at most in the limit per account."""
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
        """Records a successful login: clears the failures in the limit per account and address, and makes the address
        familiar to the account. If the store cannot be written, logs a warning and raises no error."""
        network = network_of(address)
        if not network:
            return
        try:
            if self._accounts.throttled_until(_pair_key(name, network)):
                await self._accounts.clear_failures([_pair_key(name, network)])
            remaining_seconds = max(0.0, self._familiar_until(name, network) - self._clock())
            if remaining_seconds < FAMILIAR_SECONDS - DAY_SECONDS:  # so this is written at most once a day
                # Extends the stored time so that the address stays familiar for `FAMILIAR_SECONDS` from now.
                cost = FailureCost(FAMILIAR_SECONDS - remaining_seconds, FAMILIAR_SECONDS)
                await self._accounts.add_failures({_familiar_key(name, network): cost})
        except RegistryError as error:
            log.warning("could not record from which address %s has logged in: %s", name, error)

    def _is_familiar(self, name: str, network: str, now: float) -> bool:
        """Returns whether the address is familiar to the account."""
        return bool(network) and self._familiar_until(name, network) > now

    def _familiar_until(self, name: str, network: str) -> float:
        """Returns the time until which an address is familiar to an account, in seconds since 1970; 0.0 if the address
        is not familiar."""
        # `throttled_until` reads the time of any key. The time of this key throttles nothing.
        return self._accounts.throttled_until(_familiar_key(name, network))


# The throttling keys. A `network` is an IPv4 address, or an IPv6 network with a prefix of 64 bits.


def _address_key(network: str) -> str:
    return f"address {network}"


def _provider_key(network: str) -> str:
    return f"provider {network}"


def _pair_key(name: str, network: str) -> str:
    return f"pair {name} {network}"


def _account_key(name: str) -> str:
    return f"account {name}"


def _familiar_key(name: str, network: str) -> str:
    """Returns the key for the time until which an address is familiar to an account. This key throttles nothing."""
    return f"known {name} {network}"
