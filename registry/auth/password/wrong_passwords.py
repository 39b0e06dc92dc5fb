"""Decides which wrong passwords count as failed logins (`WrongPasswords`). A wrong password counts only once a day: the
store, which all workers share, remembers for a day that it was counted.

The throttle thus spares clients that repeat a wrong password without an attack. For example, Docker sends its login for
Docker Hub to every mirror of Docker Hub, again and again.

A wrong password can be the right password of another account, so the store must not reveal it. The store keeps only a
hash of the password's argon2 digest. A person who can read the store can find out a remembered wrong password only by
trying passwords. Each try needs one argon2 hashing for each account, as for the right passwords in the store.
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
"""How many wrong passwords one process looks up in the store in a day, in the long run. In the first day, up to twice
as many lookups are possible. Beyond the limit, every wrong password counts as a failed login without a lookup. The
limit has two purposes:

- It limits what clients without an account can write to the store.
- It limits the argon2 hashings that a client can cause by repeating wrong passwords that the store remembers. These
  passwords do not count as failed logins, so the throttle does not stop the client. Beyond the limit they count, and
  the throttle stops the client.
"""


class WrongPasswords:
    """Decides, in one process, which wrong passwords count as failed logins."""

    def __init__(self, accounts: Accounts, clock: Callable[[], float]) -> None:
        """`clock` returns seconds since 1970."""
        self._accounts = accounts
        self._clock = clock
        self._used_until = 0.0
        """How much of the allowance `MAX_LOOKUPS_A_DAY` is used, stored as a time in seconds since 1970 (the generic
        cell rate algorithm). Each lookup moves the time `DAY_SECONDS / MAX_LOOKUPS_A_DAY` seconds ahead.

        - The time has passed: nothing of the allowance is used.
        - The time is in the future: the used fraction of the allowance is the number of days until this time. If the
          time is a whole day in the future, all of the allowance is used."""

    async def counts_as_failure(self, name: str, address: str, identity: Identity | None, digest: bytes) -> bool:
        """Returns whether a wrong password counts as a failed login.

        - Always True if `digest` is empty, or if this process has used up `MAX_LOOKUPS_A_DAY`.
        - False if the password was counted in the last day, from the same network, for the same account in its present
          state.
        - Otherwise True. The store then remembers for a day that the password was counted.

        Parameters:

        - `name`: the name of the account. `address`: the address of the client.
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
        # The store keeps a time for each key: here, the time until which the password is remembered. `throttled_until`
        # returns this time (0.0 if it has passed) and writes nothing. `mark_once` alone would be enough, but it always
        # runs a write transaction.
        if self._accounts.throttled_until(key):
            return False
        return await self._accounts.mark_once(key, DAY_SECONDS)

    def _take_allowance(self) -> bool:
        """If one more lookup is allowed, counts it and returns True. Otherwise returns False."""
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
    """Returns the key under which the store remembers a wrong password. Each account has different keys, and a change
    of the account changes its keys:

    - Account in the store: a new password changes the salt of `digest`, and any other change changes `version`.
    - Line of the htpasswd file: a change of the line changes `stamp`, a hash of the line."""
    state = ("", "") if identity is None else (str(identity.version), identity.stamp or "")
    text = "\0".join((name, *state, network, "")).encode("utf-8", "surrogatepass")
    return f"wrong {hashlib.blake2b(text + digest, digest_size=16, person=b'wrong password').hexdigest()}"
