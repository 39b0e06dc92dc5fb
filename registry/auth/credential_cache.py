"""The cache of verified credentials, with the principals that they make.

A credential is looked up by a keyed hash of its Authorization header and the client's address. The key is random and
belongs to this process, so nobody can search the cache for a secret, nor recognise one in a core dump. The address is
part of the hash because a right password that was guessed elsewhere has to look like a wrong one there.
"""

from __future__ import annotations

import base64
import os
from hashlib import blake2b
from typing import Final

from registry.auth.authorization_header import Basic, Bearer
from registry.auth.rights.principal import Identity, Principal

MOST_LOGINS: Final = 2048
"""Cached Basic credentials: passwords, API tokens, tokens of issuers."""
MOST_TOKENS: Final = 1024
"""Cached bearer tokens. They are counted apart, since anyone can get many of them, while a password that is evicted has
to be hashed again."""


class VerifiedCredential:
    """A credential that proved `identity`, which was valid under `epoch` of the accounts. It counts until `until`
    (seconds since 1970). `key_id` is the store's key that signed it, if one did. `principal` is what the identity made
    last, under the epoch that the principal holds."""

    __slots__ = ("epoch", "identity", "key_id", "principal", "until")

    def __init__(self, identity: Identity, epoch: int, until: float, key_id: str | None = None) -> None:
        self.identity = identity
        self.epoch = epoch
        self.until = until if identity.expires is None else min(until, identity.expires)
        self.key_id = key_id
        self.principal: Principal | None = None


class CredentialCache:
    """Verified credentials of one process, by `key_of` their headers. Evicts the oldest."""

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=16, key=os.urandom(32))  # copying it costs half of what making one does
        self._address, self._address_hash = "", self._hash  # successive requests often come from one address
        self._logins: dict[bytes, VerifiedCredential] = {}
        self._tokens: dict[bytes, VerifiedCredential] = {}

    def key_of(self, header: bytes, address: str) -> bytes:
        """Returns the key of an Authorization header that came from `address`."""
        if address != self._address:
            begun = self._hash.copy()
            begun.update(address.encode() + b"\0")  # an address holds no NUL, so this separates the two
            self._address, self._address_hash = address, begun
        hashed = self._address_hash.copy()
        hashed.update(header)
        return hashed.digest()

    def get(self, key: bytes) -> VerifiedCredential | None:
        """Returns what was cached, which may be outdated."""
        return self._logins.get(key) or self._tokens.get(key)

    def put(self, key: bytes, verified: VerifiedCredential, credential: Basic | Bearer) -> None:
        """Caches a verified credential in place of an older one."""
        entries, most = (self._tokens, MOST_TOKENS) if isinstance(credential, Bearer) else (self._logins, MOST_LOGINS)
        entries.pop(key, None)
        if len(entries) >= most:
            del entries[next(iter(entries))]
        entries[key] = verified

    def drop(self, key: bytes) -> None:
        """Removes an entry, if it exists."""
        self._logins.pop(key, None)
        self._tokens.pop(key, None)

    def __len__(self) -> int:
        return len(self._logins) + len(self._tokens)


def header_of(credential: Basic | Bearer) -> bytes:
    """Returns the header that most clients send for a credential. Other spellings of it have other keys, and are found
    in the cache only after the header was parsed."""
    if isinstance(credential, Bearer):
        return b"Bearer " + credential.token.encode("utf-8", "surrogatepass")
    # No header holds a user name with a colon, but a form may: it must not look like a shorter name.
    scheme = b"Form " if ":" in credential.user else b"Basic "
    return scheme + base64.b64encode(f"{credential.user}:{credential.secret}".encode("utf-8", "surrogatepass"))
