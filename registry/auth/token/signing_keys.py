"""The keys that sign tokens. The first token of a store creates one; `entrepot key rotate` replaces it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from storage.access import SigningKey
from storage.accounts import Accounts
from storage.content import Actor

SECRET_BYTES: Final = 64
"""The block size of SHA-256; HMAC makes no use of a longer key (RFC 2104, 3)."""
LONGEST_BEARER_TOKEN_SECONDS: Final = 3600.0
"""The longest lifetime of a bearer token."""
RETIRED_KEY_SECONDS: Final = LONGEST_BEARER_TOKEN_SECONDS + 60.0
"""How long a replaced key is accepted: no bearer token that it signed lives longer."""


def make_key(now: float, random: Callable[[int], bytes] = os.urandom) -> SigningKey:
    """Returns a new key, not stored yet. `now` is in seconds since 1970."""
    return SigningKey(random(9).hex(), random(SECRET_BYTES), now)


async def rotate(accounts: Accounts, now: float, by: Actor, *, keep: float = RETIRED_KEY_SECONDS) -> SigningKey:
    """Stores a new key that signs from now on, and returns it. Tokens that older keys signed are accepted for at most
    `keep` seconds. Raises StorageFull, StorageFailed."""
    key = make_key(now)
    await accounts.rotate_key(key, keep=keep, by=by)
    return key


class SigningKeys:
    """The store's current keys, cached under the accounts' epoch. `clock` gives seconds since 1970."""

    def __init__(self, accounts: Accounts, clock: Callable[[], float]) -> None:
        self._accounts = accounts
        self._clock = clock
        self._epoch: int | None = None
        self._cached: dict[str, SigningKey] = {}

    def find(self, key_id: str) -> SigningKey | None:
        """Returns a key that is still accepted, or None."""
        key = self._keys().get(key_id)
        if key is not None and key.until is not None and key.until <= self._clock():
            return None
        return key

    async def current(self) -> SigningKey:
        """Returns the key that signs. Creates it for the first token of a store. Raises StorageFull, StorageFailed."""
        for key in self._keys().values():
            if key.retired is None:
                return key
        return await self._accounts.ensure_key(lambda: make_key(self._clock()), by=Actor("system"))

    async def secrets(self) -> list[bytes]:
        """Returns the secrets of all keys, that of the current one first. Raises StorageFull, StorageFailed."""
        current = await self.current()
        return [current.secret, *(key.secret for key in self._keys().values() if key.id != current.id)]

    def _keys(self) -> dict[str, SigningKey]:
        epoch = self._accounts.epoch()
        if epoch != self._epoch:
            self._cached = {key.id: key for key in self._accounts.signing_keys()}
            self._epoch = epoch
        return self._cached
