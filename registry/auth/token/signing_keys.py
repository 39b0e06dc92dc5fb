"""The keys that sign this registry's bearer tokens. The keys are in the store of accounts.

One key at a time signs new tokens. This key is created when a key is first needed, and `entrepot key rotate` replaces
it. A replaced key stays accepted for about an hour, until the last bearer token that it signed has expired.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from storage.access import SigningKey
from storage.accounts import Accounts
from storage.content import Actor

SECRET_BYTES: Final = 64
"""The length of a key's secret: the block size of SHA-256. A longer secret does not make HMAC stronger (RFC 2104,
3)."""
MAX_BEARER_TOKEN_SECONDS: Final = 3600.0
"""The longest lifetime of a bearer token."""
RETIRED_KEY_SECONDS: Final = MAX_BEARER_TOKEN_SECONDS + 60.0
"""How many seconds a key is accepted after it was replaced. All bearer tokens that the key signed expire earlier."""


def make_key(now: float, random: Callable[[int], bytes] = os.urandom) -> SigningKey:
    """Returns a new key, which the caller must store. `now` is in seconds since 1970. `random(n)` returns n random
    bytes."""
    return SigningKey(id=random(9).hex(), secret=random(SECRET_BYTES), created=now)


async def rotate(accounts: Accounts, now: float, by: Actor, *, keep_seconds: float = RETIRED_KEY_SECONDS) -> SigningKey:
    """Stores a new key and returns it. The new key signs all later tokens. `now` is in seconds since 1970. `by` is the
    actor that the audit log names.

    Tokens that older keys signed are accepted for at most `keep_seconds` more. If `keep_seconds` is 0.0, they are
    refused immediately. Raises StorageFull, StorageFailed.
    """
    key = make_key(now)
    await accounts.rotate_key(key, keep_seconds=keep_seconds, by=by)
    return key


class SigningKeys:
    """Reads the keys of the store, and caches them for one process. `clock` returns seconds since 1970.

    The keys are read again when the store's *epoch* has changed. The epoch is a number in the store, which increases
    when any process adds, replaces or removes a key, or changes the rights of an account.
    """

    def __init__(self, accounts: Accounts, clock: Callable[[], float]) -> None:
        self._accounts = accounts
        self._clock = clock
        self._epoch: int | None = None
        self._cached: dict[str, SigningKey] = {}

    def find(self, key_id: str) -> SigningKey | None:
        """Returns the key with this id. Returns None if there is no such key, or if the key was replaced and is not
        accepted any more."""
        key = self._keys().get(key_id)
        if key is not None and key.until is not None and key.until <= self._clock():
            return None
        return key

    async def current(self) -> SigningKey:
        """Returns the key that signs new tokens. If the store has no such key, creates one, and raises StorageFull or
        StorageFailed if the creation fails."""
        for key in self._keys().values():
            if key.retired is None:  # no newer key has replaced it
                return key
        return await self._accounts.ensure_key(lambda: make_key(self._clock()), by=Actor("system"))

    async def secrets(self) -> list[bytes]:
        """Returns the secrets of all keys. The first one is the secret of the key that signs new tokens. If the store
        has no such key, creates one, and raises StorageFull or StorageFailed if the creation fails."""
        current_key = await self.current()
        return [current_key.secret, *(key.secret for key in self._keys().values() if key.id != current_key.id)]

    def _keys(self) -> dict[str, SigningKey]:
        """Returns all keys in the store by their ids, from the cache if the epoch has not changed."""
        epoch = self._accounts.epoch()
        if epoch != self._epoch:
            self._cached = {key.id: key for key in self._accounts.signing_keys()}
            self._epoch = epoch
        return self._cached
