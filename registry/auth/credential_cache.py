"""The cache of verified credentials, and of the principals (accounts with their rights) that they belong to.

The cache key of a credential is a keyed hash of its Authorization header and the client's address. The hash key is
random and belongs to this process, so a core dump contains no secret, and nobody can test guesses against it. The hash
includes the address because a guesser at another address must not get past the throttle of logins with a password that
is cached for its owner's address.

An entry can be outdated. It holds the *epoch* under which it was verified, a number in the store that every change of
rights increases; `registry.auth.revocation_across_workers` compares it with the current epoch.
"""

from __future__ import annotations

import base64
import os
from hashlib import blake2b
from typing import Final

from registry.auth.authorization_header import Basic, Bearer
from registry.auth.rights.principal import Identity, Principal

MAX_CACHED_LOGINS: Final = 2048
"""The most Basic credentials in the cache: passwords, API tokens, tokens of issuers."""
MAX_CACHED_BEARER_TOKENS: Final = 1024
"""The most bearer tokens in the cache. They have a limit of their own, so that a client that gets many tokens evicts no
passwords, which would have to be hashed again."""


class VerifiedCredential:
    """A verified credential.

    - `identity`: the account and limits that the credential proved.
    - `epoch`: the epoch of the store when the identity was last checked.
    - `until`: when the entry expires, in seconds since 1970; not later than the identity.
    - `key_id`: the id of the store's key that signed the credential. None: the store did not sign it.
    - `principal`: the principal of the identity, or None before it is first computed. It holds an epoch of its own.
    """

    __slots__ = ("epoch", "identity", "key_id", "principal", "until")

    def __init__(self, identity: Identity, epoch: int, until: float, key_id: str | None = None) -> None:
        self.identity = identity
        self.epoch = epoch
        self.until = until if identity.expires is None else min(until, identity.expires)
        self.key_id = key_id
        self.principal: Principal | None = None


class CredentialCache:
    """The verified credentials of one process, by the key that `key_of` returns. Evicts the oldest entries."""

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=16, key=os.urandom(32))  # copied for each key, which is faster than a new one
        self._address, self._address_hash = "", self._hash  # kept because one address often sends several requests
        self._logins: dict[bytes, VerifiedCredential] = {}
        self._tokens: dict[bytes, VerifiedCredential] = {}

    def key_of(self, header: bytes, address: str) -> bytes:
        """Returns the key of an Authorization header that came from `address`."""
        if address != self._address:
            address_hash = self._hash.copy()
            address_hash.update(address.encode() + b"\0")  # separates address and header: no address contains NUL
            self._address, self._address_hash = address, address_hash
        hashed = self._address_hash.copy()
        hashed.update(header)
        return hashed.digest()

    def get(self, key: bytes) -> VerifiedCredential | None:
        """Returns the cached credential, which may be outdated, or None."""
        return self._logins.get(key) or self._tokens.get(key)

    def put(self, key: bytes, verified: VerifiedCredential, credential: Basic | Bearer) -> None:
        """Caches `verified` under `key`, in place of an older entry."""
        is_bearer = isinstance(credential, Bearer)
        entries = self._tokens if is_bearer else self._logins
        entries.pop(key, None)
        if len(entries) >= (MAX_CACHED_BEARER_TOKENS if is_bearer else MAX_CACHED_LOGINS):
            del entries[next(iter(entries))]
        entries[key] = verified

    def remove(self, key: bytes) -> None:
        """Removes an entry, if it exists."""
        self._logins.pop(key, None)
        self._tokens.pop(key, None)

    def __len__(self) -> int:
        return len(self._logins) + len(self._tokens)


def header_of(credential: Basic | Bearer) -> bytes:
    """Returns the Authorization header in the spelling that most clients send. The cache key of a credential is made
    from this header, so a request with another spelling is found in the cache only after its header is parsed."""
    if isinstance(credential, Bearer):
        return b"Bearer " + credential.token.encode("utf-8", "surrogatepass")
    # A user name with a colon can come only from a form. With the scheme Basic, "a:b" with the secret "c" would look
    # like "a" with the secret "b:c".
    scheme = b"Form " if ":" in credential.user else b"Basic "
    return scheme + base64.b64encode(f"{credential.user}:{credential.secret}".encode("utf-8", "surrogatepass"))
