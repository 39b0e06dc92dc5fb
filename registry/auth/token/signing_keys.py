"""The keys that sign this store's tokens: bearer tokens and login sessions.

One key signs at a time. The first token of a store creates it, and `entrepot key rotate` replaces it. The tokens that a
replaced key signed are accepted until they expire.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from storage.access import SigningKey
from storage.accounts import Accounts
from storage.content import Actor

SECRET_BYTES: Final = 64
"""The length of a key: the block size of SHA-256, because a longer key makes HMAC no stronger (RFC 2104, 3)."""
MAX_BEARER_TOKEN_SECONDS: Final = 3600.0
"""The longest lifetime of a bearer token."""
RETIRED_KEY_SECONDS: Final = MAX_BEARER_TOKEN_SECONDS + 60.0
"""How long a replaced key is accepted. All bearer tokens that it signed expire earlier."""


def make_key(now: float, random: Callable[[int], bytes] = os.urandom) -> SigningKey:
    """Returns a new key, which the caller must store. `now` is in seconds since 1970. `random(n)` returns n random
    bytes."""
    return SigningKey(random(9).hex(), random(SECRET_BYTES), now)


async def rotate(accounts: Accounts, now: float, by: Actor, *, keep: float = RETIRED_KEY_SECONDS) -> SigningKey:
    """Stores a new key that signs from now on, and returns it. Tokens that older keys signed are accepted for `keep`
    seconds at most; 0.0: they are refused from now on. `by` is the actor for the audit log. Raises StorageFull,
    StorageFailed."""
    key = make_key(now)
    await accounts.rotate_key(key, keep=keep, by=by)
    return key


class SigningKeys:
    """The keys of the store, with a cache. `clock` returns seconds since 1970.

    The cache is read again when the store's epoch has changed. The epoch is a number that every change of accounts,
    grants, tokens and keys increases, so a worker also notices a key that another worker made or removed.
    """

    def __init__(self, accounts: Accounts, clock: Callable[[], float]) -> None:
        self._accounts = accounts
        self._clock = clock
        self._epoch: int | None = None
        self._cached: dict[str, SigningKey] = {}

    def find(self, key_id: str) -> SigningKey | None:
        """Returns the key with this id, or None if there is none or it is not accepted any more."""
        key = self._keys().get(key_id)
        if key is not None and key.until is not None and key.until <= self._clock():
            return None
        return key

    async def current(self) -> SigningKey:
        """Returns the key that signs new tokens. Creates one if the store has none. Raises StorageFull,
        StorageFailed."""
        for key in self._keys().values():
            if key.retired is None:  # no newer key has replaced it
                return key
        return await self._accounts.ensure_key(lambda: make_key(self._clock()), by=Actor("system"))

    async def secrets(self) -> list[bytes]:
        """Returns the secrets of all keys, beginning with the key that signs. Creates that key if there is none. Raises
        StorageFull, StorageFailed."""
        current = await self.current()
        return [current.secret, *(key.secret for key in self._keys().values() if key.id != current.id)]

    def _keys(self) -> dict[str, SigningKey]:
        """Returns the current keys of the store by their ids."""
        epoch = self._accounts.epoch()
        if epoch != self._epoch:
            self._cached = {key.id: key for key in self._accounts.signing_keys()}
            self._epoch = epoch
        return self._cached
