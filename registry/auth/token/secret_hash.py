"""The hashes of random secrets, which the store keeps in place of the secrets of API tokens and login sessions.

A hash is the SHA-256 of the secret. It needs no salt, because a secret has 256 random bits, so nobody can guess it.
"""

from __future__ import annotations

import hashlib
import hmac


def hash_secret(secret: str) -> bytes:
    """Returns the hash of a secret. Raises UnicodeEncodeError if the secret is not ASCII."""
    return hashlib.sha256(secret.encode("ascii")).digest()


def has_hash(secret: str, secret_hash: bytes) -> bool:
    """Returns whether the secret has this hash. Takes the same time for each wrong secret. Raises UnicodeEncodeError if
    the secret is not ASCII."""
    return hmac.compare_digest(hash_secret(secret), secret_hash)
