"""The keys that sign tokens: made when the first token is, replaced by `entrepot key rotate`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from storage.access import SigningKey
from storage.accounts import Accounts
from storage.content import Actor

SECRET_BYTES: Final = 64
"""Bytes: the block size of SHA-256, which is all that HMAC can use (RFC 2104, 3)."""
LONGEST_BEARER_TOKEN_SECONDS: Final = 3600.0
"""Seconds a token of `/token` may live, the most."""
RETIRED_KEY_SECONDS: Final = LONGEST_BEARER_TOKEN_SECONDS + 60.0
"""Seconds for which a key that was replaced is taken: no token that it signed lives longer."""


def make_key(now: float, random: Callable[[int], bytes] = os.urandom) -> SigningKey:
    """A new one, not stored yet. `now` is in seconds since 1970."""
    return SigningKey(random(9).hex(), random(SECRET_BYTES), now)


async def rotate(accounts: Accounts, now: float, by: Actor, *, keep: float = RETIRED_KEY_SECONDS) -> SigningKey:
    """A new key signs from now on. Tokens signed by those before are taken for `keep` seconds at the most. Raises
    StorageFull, StorageFailed."""
    key = make_key(now)
    await accounts.rotate_key(key, keep=keep, by=by)
    return key


class SigningKeys:
    """The keys as of now, read again when anything has changed."""

    def __init__(self, accounts: Accounts, clock: Callable[[], float]) -> None:
        self._accounts = accounts
        self._clock = clock
        self._epoch: int | None = None
        self._keys: dict[str, SigningKey] = {}

    def find(self, key_id: str) -> SigningKey | None:
        """None: there is no such key (any more)."""
        key = self._fresh().get(key_id)
        if key is not None and key.until is not None and key.until <= self._clock():
            return None
        return key

    async def signing(self) -> SigningKey:
        """The one that signs. The first token of a store makes it. Raises StorageFull, StorageFailed."""
        for key in self._fresh().values():
            if key.retired is None:
                return key
        return await self._accounts.ensure_key(lambda: make_key(self._clock()), by=Actor("system"))

    async def secrets(self) -> list[bytes]:
        """Those of all keys that count, the one that signs first. Raises StorageFull, StorageFailed."""
        signing = await self.signing()
        return [signing.secret, *(key.secret for key in self._fresh().values() if key.id != signing.id)]

    def _fresh(self) -> dict[str, SigningKey]:
        epoch = self._accounts.epoch()
        if epoch != self._epoch:
            self._keys = {key.id: key for key in self._accounts.signing_keys()}
            self._epoch = epoch
        return self._keys
