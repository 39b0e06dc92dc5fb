"""Passwords: what is taken for one, how it is hashed, and whether one is right.

Ours are argon2id (RFC 9106) with the parameters OWASP names for 19 MiB; those of an htpasswd file are bcrypt. All of it
blocks for tens of milliseconds: on an event loop, it is called through `registry.auth.hashing`.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Final

import argon2
import bcrypt
from argon2.exceptions import Argon2Error, InvalidHashError

from storage.access import AccountInvalid

SHORTEST, LONGEST = 8, 1024
"""Bytes of a password. The longest bounds what a stranger can have hashed."""
MEMORY: Final = 19 * 1024
"""KiB for one hashing."""
PASSES, LANES = 2, 1

BCRYPT: Final = re.compile(r"\$2[aby]\$(0[4-9]|1[0-6])\$[./A-Za-z0-9]{53}")
"""A hash as `htpasswd -B` writes it. Costs above 16 take more than two seconds and are no hash to log in with."""

_UNMATCHED: Final = f"$argon2id$v=19$m={MEMORY},t={PASSES},p={LANES}${'A' * 22}${'A' * 43}"
"""Zero bytes for salt and hash: checking a password against it costs what any check costs, and it never matches."""


@dataclass(frozen=True, slots=True)
class Held:
    """The hash that is held of an account's password, of either kind; of neither for an account that is not there.
    `dearest`: the highest bcrypt cost there is in the htpasswd file, 0 without one."""

    argon2: str | None = None
    bcrypt: str | None = None
    dearest: int = 0


def check_password(password: str) -> None:
    """Raises AccountInvalid, which does not show it."""
    length = len(password.encode("utf-8", "surrogatepass"))
    if not SHORTEST <= length <= LONGEST:
        raise AccountInvalid(f"a password has {SHORTEST} to {LONGEST} bytes; this one has {length}")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in password):
        raise AccountInvalid("a password has no control characters in it")


def hash_password(password: str) -> str:
    """Its hash, with parameters and a fresh salt. Raises AccountInvalid."""
    check_password(password)
    return _hasher().hash(password)


def needs_rehash(held: str) -> bool:
    """It was hashed with other parameters than those of now."""
    return _hasher().check_needs_rehash(held)


def cost_of(held: str) -> int:
    """The cost of a bcrypt hash, a power of two."""
    return int(held[4:6])


def verify(password: str, held: Held) -> bool:
    """Whether it is right. A wrong one takes the same time whatever is held, so it does not tell which accounts there
    are, nor where they come from: one argon2, and bcrypt that adds up to the dearest cost of the file."""
    raw = password.encode()
    if held.bcrypt is not None and _bcrypt(raw, held.bcrypt):
        return True
    if _argon2(raw, held.argon2 or _UNMATCHED) and held.argon2 is not None:
        return True
    if held.dearest:
        # 2^c + (2^c + 2^(c+1) + ... + 2^(dearest-1)) is 2^dearest.
        spent = range(cost_of(held.bcrypt), held.dearest) if held.bcrypt is not None else (held.dearest,)
        for cost in spent:
            _bcrypt(raw, f"$2b${cost:02}${'.' * 53}")
    return False


def _hasher() -> argon2.PasswordHasher:
    return argon2.PasswordHasher(PASSES, MEMORY, LANES)


def _argon2(password: bytes, held: str) -> bool:
    try:
        return _hasher().verify(held, password)
    except (Argon2Error, InvalidHashError):
        return False


def _bcrypt(password: bytes, held: str) -> bool:
    """bcrypt reads 72 bytes; what is longer was never hashed by it and matches nothing (bcrypt 5 refuses to look)."""
    try:
        return bcrypt.checkpw(password, held.encode())
    except ValueError:
        return False
