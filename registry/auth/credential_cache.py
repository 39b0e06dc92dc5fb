"""The cache of verified credentials, and of their principals. A principal is the account that a credential belongs to,
with its rights.

The *cache key* of a credential is a hash of its Authorization header and the client's address. The cache
stores the hash instead of the header, so it contains no secret. Each cache keys the hash with random bytes.

The limits on failed logins do not apply to a login with a cached password. Because the hash includes the address, this
exception is only for clients at the address that sent the right password.

An entry can be outdated, because rights and accounts change. The *epoch* is a number in the store that every change of
rights increases. An entry contains the epoch at which its credential was last checked.
`registry.auth.revocation_across_workers` compares this epoch with the current epoch.
"""

from __future__ import annotations

import base64
import os
from hashlib import blake2b
from typing import Final

from registry.auth.authorization_header import Basic, Bearer
from registry.auth.rights.principal import Identity, Principal

MAX_CACHED_BASIC_CREDENTIALS: Final = 2048
"""The largest number of Basic credentials in the cache. Their secrets are passwords, API tokens and tokens of trusted
issuers."""
MAX_CACHED_BEARER_TOKENS: Final = 1024
"""The largest number of Bearer credentials in the cache. The limit is separate, so that a client with many bearer
tokens does not evict passwords, which take long to verify."""


class VerifiedCredential:
    """An entry of the cache: the identity that a verified credential has proved.

    - `identity`: the account, and the limits of the credential.
    - `epoch`: the epoch of the store when the identity was last checked.
    - `expires`: when the entry expires, in seconds since 1970. The entry does not expire later than the identity.
    - `principal`: the principal of the identity; None until a request first needs the principal. `principal.epoch` is
      the epoch at which the rights were read. It can differ from `epoch`.
    """

    __slots__ = ("epoch", "expires", "identity", "principal")

    def __init__(self, identity: Identity, epoch: int, expires: float) -> None:
        self.identity = identity
        self.epoch = epoch
        self.expires = expires if identity.expires is None else min(expires, identity.expires)
        self.principal: Principal | None = None


class CredentialCache:
    """The verified credentials of one process, by the cache key that `key_of` returns. Basic and Bearer credentials
    have separate limits. At a limit, a new entry evicts the oldest entry of its type."""

    def __init__(self) -> None:
        # The hash is keyed once and copied for each cache key, because a copy is faster than a new keyed hash.
        self._hash = blake2b(digest_size=16, key=os.urandom(32))
        # The hash of the last client's address is kept, because one client often sends several requests in a row.
        self._address, self._address_hash = "", self._hash
        self._basic_entries: dict[bytes, VerifiedCredential] = {}
        self._bearer_entries: dict[bytes, VerifiedCredential] = {}

    def key_of(self, header: bytes, address: str) -> bytes:
        """Returns the cache key of a credential. `header` is the value of the Authorization header, `address` is the
        address of the client."""
        if address != self._address:
            address_hash = self._hash.copy()
            address_hash.update(address.encode() + b"\0")  # separates address and header: no address contains NUL
            self._address, self._address_hash = address, address_hash
        hashed = self._address_hash.copy()
        hashed.update(header)
        return hashed.digest()

    def get(self, key: bytes) -> VerifiedCredential | None:
        """Returns the entry under the cache key `key`, or None if there is none. The entry can be outdated."""
        return self._basic_entries.get(key) or self._bearer_entries.get(key)

    def put(self, key: bytes, verified: VerifiedCredential, credential: Basic | Bearer) -> None:
        """Stores the entry `verified` under the cache key `key`. Replaces the old entry under this key, if there is
        one. `credential` is the credential that the client sent; its type decides which of the two limits applies."""
        is_bearer = isinstance(credential, Bearer)
        entries = self._bearer_entries if is_bearer else self._basic_entries
        entries.pop(key, None)
        if len(entries) >= (MAX_CACHED_BEARER_TOKENS if is_bearer else MAX_CACHED_BASIC_CREDENTIALS):
            del entries[next(iter(entries))]
        entries[key] = verified

    def remove(self, key: bytes) -> None:
        """Removes the entry under the cache key `key`, if there is one."""
        self._basic_entries.pop(key, None)
        self._bearer_entries.pop(key, None)

    def __len__(self) -> int:
        return len(self._basic_entries) + len(self._bearer_entries)


def header_of(credential: Basic | Bearer) -> bytes:
    """Returns the usual form of the Authorization header for a credential. The cache keys of all entries are made from
    headers in this form.

    A client can send the header in another form, such as `bearer` in lower case. A lookup with the header as the client
    sent it then finds nothing, and a second lookup, after the header was parsed, uses the usual form.
    """
    if isinstance(credential, Bearer):
        return b"Bearer " + credential.token.encode("utf-8", "surrogatepass")
    # In the urlencoded form of a POST to `/token`, a user name can contain a colon. The scheme "Form" keeps the cache
    # key of the user "a:b" with the secret "c" different from the key of the user "a" with the secret "b:c".
    scheme = b"Form " if ":" in credential.user else b"Basic "
    return scheme + base64.b64encode(f"{credential.user}:{credential.secret}".encode("utf-8", "surrogatepass"))
