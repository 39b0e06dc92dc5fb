"""Remembers in the store which wrong passwords were counted as failed logins, so that each counts once a day over all
workers and restarts.

Docker sends its login for Docker Hub to every mirror of Docker Hub, again and again. If this registry is a mirror, that
password is wrong here. All people of an office can share one address. If each worker counted the password of each
person, and counted it again after a restart, the address would soon have too many failed logins, and be throttled.

A wrong password can be the right password of another account, so nobody must find a wrong password with the help of the
store. The store has only a hash of the argon2 digest that the check of the password has computed anyway. Whoever reads
the store needs one argon2 hashing for each guess and account, as for the right passwords in the store.
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
"""The number of wrong passwords that one process looks up in the store in a day, in the long run. Up to twice as many
lookups are possible in the first day. Beyond the limit, every wrong password counts as a failed login without a lookup.
The limit has two purposes:

- It limits what clients without an account can write to the store.
- It limits the hashings that a client can cause. A client can repeat more wrong passwords than a process caches, and
  the process has to hash each of them again. While the store remembers these passwords, they do not count as failed
  logins, and the throttle does not stop the client. Beyond the limit, they count, and the throttle soon refuses the
  client without a hashing.
"""


class WrongPasswords:
    """Decides for one process which wrong passwords count. `clock` returns seconds since 1970."""

    def __init__(self, accounts: Accounts, clock: Callable[[], float]) -> None:
        self._accounts = accounts
        self._clock = clock
        self._used_until = 0.0
        """A time in seconds since 1970 that shows how much of the allowance `MAX_LOOKUPS_A_DAY` is used: nothing if the
        time has passed, all of it if the time is a day in the future. Each lookup moves the time further into the
        future (the generic cell rate algorithm)."""

    async def counts_as_failure(self, name: str, address: str, identity: Identity | None, digest: bytes) -> bool:
        """Returns whether a wrong password counts as a failed login. False if it was counted in the last day, from the
        same network, for the same account in its present state. True if `digest` is empty, or if this process has used
        up `MAX_LOOKUPS_A_DAY`.

        - `identity`: the identity that the right password would have proved. None if the account does not exist, is
          disabled or has no password.
        - `digest`: the argon2 digest of the wrong password, or empty if there is no digest.

        Raises StorageFull, StorageFailed.
        """
        if not digest:
            return True
        key = _key(name, network_of(address), identity, digest)
        if not self._take_allowance():
            return True
        # The store keeps the key of a counted password for a day, in the table of the throttling keys. `mark_once` also
        # looks for the key, but as part of a write. `throttled_until` only reads, and so avoids most of these writes.
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
    """Returns the key under which the store remembers a wrong password. The key differs between accounts, and changes
    when the account changes. A new password of an account in the store changes the salt of the digest. Other changes of
    such an account change its version. A change of a line in the htpasswd file changes its stamp (a hash of the
    line)."""
    state = ("", "") if identity is None else (str(identity.version), identity.stamp or "")
    text = "\0".join((name, *state, network, "")).encode("utf-8", "surrogatepass")
    return f"wrong {hashlib.blake2b(text + digest, digest_size=16, person=b'wrong password').hexdigest()}"
