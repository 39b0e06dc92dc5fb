"""Remembers in the store which wrong passwords were counted as failed logins, so that each counts once a day over all
workers and restarts.

The reason is that docker sends its login for Docker Hub to every mirror of Docker Hub, again and again. For a mirror,
this password is wrong. All people of an office can share one address. If each worker counted each of their passwords
once, and again after a restart, the address would soon have too many failed logins, and be throttled.

A wrong password can be the right one of another account, so the store must not help to find it. It has only a hash of
the argon2 digest that the check of the password has computed anyway. Whoever reads the store needs one argon2 hashing
for each guess and account, as for the passwords of the accounts themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final

from registry.auth.password.throttle import DAY_SECONDS
from registry.auth.rights.principal import Identity
from registry.client_addresses import network_of
from storage.accounts import Accounts

MAX_LOOKUPS_A_DAY: Final = 20_000
"""The number of wrong passwords for which one process asks the store in a day, in the long run. Up to twice as many are
possible in the first day. The limit has two purposes:

- It limits what clients without an account can write.
- It limits the hashings that a client can cause with many wrong passwords, more than a process caches. Each time that
  the client sends such a password, the process has to hash the password again. As long as the store remembers the
  password, this does not count as a failed login, so the throttle does not stop the client. But beyond the limit, the
  process does not ask the store. Every wrong password then counts, and the throttle soon refuses the client without a
  hashing.
"""


class WrongPasswords:
    """Decides for one process which wrong passwords count. `clock` returns seconds since 1970."""

    def __init__(self, accounts: Accounts, clock: Callable[[], float]) -> None:
        self._accounts = accounts
        self._clock = clock
        self._used_until = 0.0
        """A time in seconds since 1970 that shows how much of the allowance `MAX_LOOKUPS_A_DAY` is used: nothing if the
        time has passed, all of it if the time is a day ahead. Each lookup moves it further into the future (the generic
        cell rate algorithm)."""

    async def counts_as_failure(self, name: str, address: str, identity: Identity | None, digest: bytes) -> bool:
        """Returns whether a wrong password counts as a failed login. False if it was counted in the last day, from the
        same network, for the same account in its present state. After too many lookups, every wrong password counts.

        `identity` is the identity that the right password would have proved; None: the account does not exist, is
        disabled or has no password. `digest` is the argon2 digest of the wrong password; empty if there is none, and
        then the password counts. Raises StorageFull, StorageFailed.
        """
        if not digest:
            return True
        key = _key(name, network_of(address), identity, digest)
        if not self._take_allowance():
            return True
        # The store keeps the key of a counted password for a day, among the keys that delay logins. `mark_once` also
        # looks for the key, but as part of a write. This read avoids most of these writes.
        if self._accounts.throttled_until(key):
            return False
        return await self._accounts.mark_once(key, DAY_SECONDS)

    def _take_allowance(self) -> bool:
        """Returns whether this process may ask the store for one more wrong password, and counts the lookup."""
        now, cost = self._clock(), DAY_SECONDS / MAX_LOOKUPS_A_DAY
        used_until = max(now, self._used_until)
        # A time more than a day ahead is ignored: it was stored while the clock was ahead.
        if used_until > now + DAY_SECONDS:
            used_until = now
        if used_until + cost > now + DAY_SECONDS:
            return False
        self._used_until = used_until + cost
        return True


def _key(name: str, network: str, identity: Identity | None, digest: bytes) -> str:
    """Returns the key under which the store remembers a wrong password. The digest depends on a salt, which differs
    between accounts, and changes when an account in the store gets a new password. Other changes of the account also
    change the key: they change the version of an account in the store, or the stamp (a hash of the line) of an account
    in an htpasswd file."""
    state = ("", "") if identity is None else (str(identity.version), identity.stamp or "")
    text = "\0".join((name, *state, network, "")).encode("utf-8", "surrogatepass")
    return f"wrong {hashlib.blake2b(text + digest, digest_size=16, person=b'wrong password').hexdigest()}"
