"""Throttles failed logins. The failures are counted in the store, so the counts are common to all workers.

There are three limits. Each is a leaky bucket (GCRA): a failure costs some seconds, and after a burst of failures the
next attempt must wait until enough time has passed. Accounts that do not exist are treated like those that do.

- Per address, against guessing at many accounts. An IPv6 network of 64 bits counts as one address.
- Per account and address, against guessing many passwords of one account.
- Per account, against guessing from many addresses. Anyone can cause such failures, so this limit does not apply to
  *familiar* addresses, from which the account has logged in during the last 30 days. So an attacker cannot lock a
  person out, unless both share an address.

Credentials that are in the cache of verified credentials are not throttled, and a repeated wrong password is counted
once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from registry.client_addresses import network_of
from storage.accounts import Accounts
from storage.errors import RegistryError, TooManyRequests

log = logging.getLogger(__name__)

DAY_SECONDS: Final = 86400.0


@dataclass(frozen=True, slots=True)
class FailureRate:
    """A limit on failures: one failure in `cost_seconds` in the long run, and `burst` failures without a wait."""

    cost_seconds: float
    burst: int

    def wait(self, until: float, now: float) -> float:
        """Returns how many seconds the next attempt must wait. `until` is the time at which the costs of all earlier
        failures have passed, in seconds since 1970."""
        return max(0.0, until - now - self.cost_seconds * (self.burst - 1))


BY_ADDRESS: Final = FailureRate(6.0, 60)
"""Allows ten guesses a minute in the long run. The burst is large because many people may share an address."""
BY_ACCOUNT_AND_ADDRESS: Final = FailureRate(30.0, 10)
"""Allows two guesses a minute in the long run. The burst is enough for a person who tries several passwords."""
BY_ACCOUNT: Final = FailureRate(60.0, 50)
"""Allows 1440 guesses a day at one account, from all addresses together."""
FAMILIAR_SECONDS: Final = 30 * DAY_SECONDS
"""How long an address stays familiar after a login."""


class LoginThrottle:
    """Decides when the next login to an account may be tried. `clock` returns seconds since 1970."""

    def __init__(self, accounts: Accounts, clock: Callable[[], float]) -> None:
        self._accounts = accounts
        self._clock = clock

    def check(self, name: str, address: str) -> None:
        """Checks that a login to the account `name` from `address` may be tried now. Raises TooManyRequests if not; the
        text is the same for all three limits."""
        now, network = self._clock(), network_of(address)
        wait = 0.0
        if network:
            wait = max(
                BY_ADDRESS.wait(self._accounts.throttled_until(_address_key(network)), now),
                BY_ACCOUNT_AND_ADDRESS.wait(self._accounts.throttled_until(_pair_key(name, network)), now),
            )
        by_account = BY_ACCOUNT.wait(self._accounts.throttled_until(_account_key(name)), now)
        if by_account and not self._is_familiar(name, network, now):
            wait = max(wait, by_account)
        if wait:
            raise TooManyRequests("too many failed logins; try again later", retry_after=math.ceil(wait))

    async def record_failure(self, name: str, address: str) -> None:
        """Counts a failed login. A failure from a familiar address is not counted in the limit per account, because it
        is probably a mistake of the account's owner."""
        now, network = self._clock(), network_of(address)
        costs = {}
        if network:
            costs = {
                _address_key(network): BY_ADDRESS.cost_seconds,
                _pair_key(name, network): BY_ACCOUNT_AND_ADDRESS.cost_seconds,
            }
        if not self._is_familiar(name, network, now):
            costs[_account_key(name)] = BY_ACCOUNT.cost_seconds
        await self._accounts.add_failures(costs)

    async def record_success(self, name: str, address: str) -> None:
        """Resets the limit of this account and address, and makes the address familiar. If the store cannot be written,
        logs a warning and returns, so that the login succeeds."""
        network = network_of(address)
        if not network:
            return
        try:
            if self._accounts.throttled_until(_pair_key(name, network)):
                await self._accounts.clear_failures([_pair_key(name, network)])
            remaining = max(0.0, self._accounts.throttled_until(_familiar_key(name, network)) - self._clock())
            if remaining < FAMILIAR_SECONDS - DAY_SECONDS:  # renewed once a day, not at every login
                await self._accounts.add_failures({_familiar_key(name, network): FAMILIAR_SECONDS - remaining})
        except RegistryError as error:
            log.warning("could not record the address of a login: %s", error)

    def _is_familiar(self, name: str, network: str, now: float) -> bool:
        """Returns whether the account has logged in from this address in the last `FAMILIAR_SECONDS`."""
        return bool(network) and self._accounts.throttled_until(_familiar_key(name, network)) > now


def _address_key(network: str) -> str:
    return f"address {network}"


def _pair_key(name: str, network: str) -> str:
    return f"pair {name} {network}"


def _account_key(name: str) -> str:
    return f"account {name}"


def _familiar_key(name: str, network: str) -> str:
    """Returns the key under which the store has the time until which an address is familiar. This is not a failure, but
    the store keeps it like one: as a time that ends."""
    return f"known {name} {network}"
