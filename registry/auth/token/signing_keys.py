"""The keys that sign this registry's bearer tokens. The keys are in the store of accounts.

One key at a time signs new tokens. The first key is created when it is needed. `entrepot key rotate` replaces the key
that signs. A replaced key stays valid for about an hour, until all bearer tokens that it signed have expired.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from storage.access import SigningKey
from storage.accounts import Accounts
from storage.content import Actor

SECRET_BYTES: Final = 64
"""The length of a key's secret. It is the block size of SHA-256, and a longer secret does not make HMAC stronger (RFC
2104, section 3)."""
MAX_BEARER_TOKEN_SECONDS: Final = 3600.0
"""The longest lifetime of a bearer token."""
RETIRED_KEY_SECONDS: Final = MAX_BEARER_TOKEN_SECONDS + 60.0
"""How many seconds a key stays valid after it was replaced. All bearer tokens that the key signed expire earlier."""


def make_key(now: float, random: Callable[[int], bytes] = os.urandom) -> SigningKey:
    """Returns a new key, which the caller must store. `now` is in seconds since 1970. `random(n)` returns n random
    bytes."""
    return SigningKey(id=random(9).hex(), secret=random(SECRET_BYTES), created=now)


async def rotate(accounts: Accounts, now: float, by: Actor, *, keep_seconds: float = RETIRED_KEY_SECONDS) -> SigningKey:
    """Stores a new key, which signs all later tokens, and returns this key. `now` is in seconds since 1970. `by` is the
    actor that the audit log names.

    Tokens that older keys signed stay valid for at most `keep_seconds` seconds. If `keep_seconds` is 0.0, they are
    invalid immediately. Raises StorageFull, StorageFailed.
    """
    key = make_key(now)
    await accounts.rotate_key(key, keep_seconds=keep_seconds, by=by)
    return key


class SigningKeys:
    """Reads the keys in the store, and caches them in this process. `clock` returns seconds since 1970.

    The keys are read again when the store's *epoch* has changed: a number that increases when any process changes
    accounts, groups, grants or signing keys.
    """

    def __init__(self, accounts: Accounts, clock: Callable[[], float]) -> None:
        self._accounts = accounts
        self._clock = clock
        self._epoch: int | None = None
        self._cached: dict[str, SigningKey] = {}

    def find(self, key_id: str) -> SigningKey | None:
        """Returns the key with this id. Returns None if there is no such key, or if the key was replaced and is no
        longer valid."""
        key = self._keys().get(key_id)
        if key is not None and key.until is not None and key.until <= self._clock():
            return None
        return key

    async def current(self) -> SigningKey:
        """Returns the key that signs new tokens. If the store has no such key, creates one. Raises StorageFull or
        StorageFailed if the new key cannot be stored."""
        for key in self._keys().values():
            if key.retired is None:  # no newer key has replaced it
                return key
        return await self._accounts.ensure_key(lambda: make_key(self._clock()), by=Actor("system"))

    async def secrets(self) -> list[bytes]:
        """Returns the secrets of all keys, beginning with the key that signs new tokens. Creates this key, and raises
        StorageFull or StorageFailed, as `current` does."""
        current_key = await self.current()
        return [current_key.secret, *(key.secret for key in self._keys().values() if key.id != current_key.id)]

    def _keys(self) -> dict[str, SigningKey]:
        """Returns all keys in the store by their ids, from the cache if the epoch has not changed."""
        epoch = self._accounts.epoch()
        if epoch != self._epoch:
            self._cached = {key.id: key for key in self._accounts.signing_keys()}
            self._epoch = epoch
        return self._cached
