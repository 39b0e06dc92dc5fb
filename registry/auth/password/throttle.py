"""Guessing is slowed: failed attempts to log in cost time, counted in the store, so over all workers.

Three counts, each a leaky bucket (GCRA): a failure costs some seconds, and beyond a burst the next attempt has to wait
until enough of them have passed. Accounts that are not there are counted like those that are.

- By address (an IPv6 network of 64 bits is one): whoever tries many accounts.
- By account and address: whoever tries many passwords of one account.
- By account: whoever does so from many addresses. Anybody can cause that, so it holds back only addresses from which
  the account has not logged in lately. Who attacks an account cannot lock its owner out from where they work,
  unless they share the address.

A credential that was verified a while ago from the same address is remembered (`registry.auth.credential_verifier`) and
does not come here at all; nor does a wrong one that has been counted already (`registry.auth.password.password_check`).
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
    """A failure costs `cost` seconds; `burst` of them in a row are free of waiting."""

    cost: float
    burst: int

    def wait(self, until: float, now: float) -> float:
        """Seconds until the next attempt, where failures so far are paid for at `until`."""
        return max(0.0, until - now - self.cost * (self.burst - 1))


BY_ADDRESS: Final = FailureRate(6.0, 60)
"""Many people may share an address, and each mistypes now and then; ten guesses a minute in the long run."""
BY_PAIR: Final = FailureRate(30.0, 10)
"""Ten tries are enough for somebody who looks for the right password; two a minute in the long run."""
BY_ACCOUNT: Final = FailureRate(60.0, 50)
"""1440 guesses a day at one account, however many addresses there are."""
FAMILIAR_SECONDS: Final = 30 * DAY_SECONDS
"""Seconds for which an address stays one from which an account has logged in."""


class LoginThrottle:
    def __init__(self, accounts: Accounts, clock: Callable[[], float]) -> None:
        """`clock`: seconds since 1970."""
        self._accounts = accounts
        self._clock = clock

    def check(self, name: str, address: str) -> None:
        """Raises TooManyRequests, alike for all reasons, when it is not time for another attempt."""
        now, network = self._clock(), network_of(address)
        wait = 0.0
        if network:
            wait = max(
                BY_ADDRESS.wait(self._accounts.pace(_address_key(network)), now),
                BY_PAIR.wait(self._accounts.pace(_pair_key(name, network)), now),
            )
        by_account = BY_ACCOUNT.wait(self._accounts.pace(_account_key(name)), now)
        if by_account and not self._is_familiar(name, network, now):
            wait = max(wait, by_account)
        if wait:
            raise TooManyRequests("too many failed logins; try again later", retry_after=math.ceil(wait))

    async def failed(self, name: str, address: str) -> None:
        """Counts an attempt whose password was wrong, or whose account is not there. From an address the account knows,
        it does not count against the account: it is its owner's own mistake."""
        now, network = self._clock(), network_of(address)
        costs = {}
        if network:
            costs = {_address_key(network): BY_ADDRESS.cost, _pair_key(name, network): BY_PAIR.cost}
        if not self._is_familiar(name, network, now):
            costs[_account_key(name)] = BY_ACCOUNT.cost
        await self._accounts.note_failure(costs)

    async def record_success(self, name: str, address: str) -> None:
        """Its failures from this address are forgiven, and the address is one the account knows. A disk that is full
        keeps nobody out."""
        network = network_of(address)
        if not network:
            return
        try:
            if self._accounts.pace(_pair_key(name, network)):
                await self._accounts.clear_failures([_pair_key(name, network)])
            left = max(0.0, self._accounts.pace(_familiar_key(name, network)) - self._clock())
            if left < FAMILIAR_SECONDS - DAY_SECONDS:
                await self._accounts.note_failure({_familiar_key(name, network): FAMILIAR_SECONDS - left})
        except RegistryError as error:
            log.warning("that an account has logged in from an address could not be noted: %s", error)

    def _is_familiar(self, name: str, network: str, now: float) -> bool:
        return bool(network) and self._accounts.pace(_familiar_key(name, network)) > now


def _address_key(network: str) -> str:
    return f"address {network}"


def _pair_key(name: str, network: str) -> str:
    return f"pair {name} {network}"


def _account_key(name: str) -> str:
    return f"account {name}"


def _familiar_key(name: str, network: str) -> str:
    """Not a failure, but kept in the same way: until when the address is known."""
    return f"known {name} {network}"
