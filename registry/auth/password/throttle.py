"""Throttles failed logins. The store counts failures, so the counts hold for all workers.

There are three counts, each a leaky bucket (GCRA): a failure costs some seconds, and after a burst of failures the next
attempt has to wait until enough time has passed. Accounts that do not exist are counted like those that do.

- By address (an IPv6 network of 64 bits counts as one): against trying many accounts.
- By account and address: against trying many passwords of one account.
- By account: against doing so from many addresses. Since anyone can cause these failures, this count only holds back
  addresses from which the account has not logged in lately. So an attacker cannot lock an owner out from where they
  work, unless both share the address.

Credentials that were verified lately from the same address are cached (`registry.auth.credential_verifier`) and are not
throttled; nor are wrong passwords that have been counted already (`registry.auth.password.password_check`).
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
    """A failure costs `cost` seconds; `burst` failures in a row cause no wait."""

    cost: float
    burst: int

    def wait(self, until: float, now: float) -> float:
        """Returns the seconds until the next attempt, given that earlier failures are paid for at `until`."""
        return max(0.0, until - now - self.cost * (self.burst - 1))


BY_ADDRESS: Final = FailureRate(6.0, 60)
"""Many people may share an address, and each mistypes now and then. Allows ten guesses a minute in the long run."""
BY_PAIR: Final = FailureRate(30.0, 10)
"""Ten tries are enough for a person who looks for the right password. Allows two a minute in the long run."""
BY_ACCOUNT: Final = FailureRate(60.0, 50)
"""Allows 1440 guesses a day at one account, from any number of addresses."""
FAMILIAR_SECONDS: Final = 30 * DAY_SECONDS
"""How long an address counts as one from which an account has logged in."""


class LoginThrottle:
    """Decides when an account may try to log in again."""

    def __init__(self, accounts: Accounts, clock: Callable[[], float]) -> None:
        """`clock`: seconds since 1970."""
        self._accounts = accounts
        self._clock = clock

    def check(self, name: str, address: str) -> None:
        """Raises TooManyRequests, with the same text for all reasons, if it is too early for another attempt."""
        now, network = self._clock(), network_of(address)
        wait = 0.0
        if network:
            wait = max(
                BY_ADDRESS.wait(self._accounts.throttled_until(_address_key(network)), now),
                BY_PAIR.wait(self._accounts.throttled_until(_pair_key(name, network)), now),
            )
        by_account = BY_ACCOUNT.wait(self._accounts.throttled_until(_account_key(name)), now)
        if by_account and not self._is_familiar(name, network, now):
            wait = max(wait, by_account)
        if wait:
            raise TooManyRequests("too many failed logins; try again later", retry_after=math.ceil(wait))

    async def record_failure(self, name: str, address: str) -> None:
        """Counts a failed attempt. From an address that is familiar to the account, the failure does not count against
        the account: it is probably the owner's own mistake."""
        now, network = self._clock(), network_of(address)
        costs = {}
        if network:
            costs = {_address_key(network): BY_ADDRESS.cost, _pair_key(name, network): BY_PAIR.cost}
        if not self._is_familiar(name, network, now):
            costs[_account_key(name)] = BY_ACCOUNT.cost
        await self._accounts.add_failures(costs)

    async def record_success(self, name: str, address: str) -> None:
        """Clears the failures of this account from this address, and makes the address familiar. A full disk does not
        prevent the login."""
        network = network_of(address)
        if not network:
            return
        try:
            if self._accounts.throttled_until(_pair_key(name, network)):
                await self._accounts.clear_failures([_pair_key(name, network)])
            left = max(0.0, self._accounts.throttled_until(_familiar_key(name, network)) - self._clock())
            if left < FAMILIAR_SECONDS - DAY_SECONDS:
                await self._accounts.add_failures({_familiar_key(name, network): FAMILIAR_SECONDS - left})
        except RegistryError as error:
            log.warning("could not record the address of a login: %s", error)

    def _is_familiar(self, name: str, network: str, now: float) -> bool:
        return bool(network) and self._accounts.throttled_until(_familiar_key(name, network)) > now


def _address_key(network: str) -> str:
    return f"address {network}"


def _pair_key(name: str, network: str) -> str:
    return f"pair {name} {network}"


def _account_key(name: str) -> str:
    return f"account {name}"


def _familiar_key(name: str, network: str) -> str:
    """Returns the key under which the store keeps until when the address is familiar. This is not a failure, but is
    kept in the same way."""
    return f"known {name} {network}"
