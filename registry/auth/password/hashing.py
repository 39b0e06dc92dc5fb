"""Passwords: what is taken for one, how it is hashed, and whether one is right.

Ours are argon2id (RFC 9106) with the parameters OWASP names for 19 MiB; those of an htpasswd file are bcrypt. All of it
blocks for tens of milliseconds: on an event loop, it is called through `registry.auth.password.hashing`.

The gate before password hashing, which is slow and takes much memory on purpose.

Two hashings at once over all workers, in threads that give way to everything else, and a bounded queue before them. So
any number of people who try to log in leave the processor and the memory to those who push and pull.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, TypeVar

import argon2
import bcrypt
from argon2.exceptions import Argon2Error, InvalidHashError

from storage.access import AccountInvalid
from storage.errors import TooManyRequests
from storage.leases import Leases

SHORTEST_PASSWORD, LONGEST_PASSWORD = 8, 1024
"""Bytes of a password. The longest bounds what a stranger can have hashed."""
ARGON2_MEMORY_KIB: Final = 19 * 1024
"""KiB for one hashing."""
ARGON2_PASSES, ARGON2_LANES = 2, 1

BCRYPT_HASH: Final = re.compile(r"\$2[aby]\$(0[4-9]|1[0-6])\$[./A-Za-z0-9]{53}")
"""A hash as `htpasswd -B` writes it. Costs above 16 take more than two seconds and are no hash to log in with."""

_UNMATCHED_HASH: Final = (
    f"$argon2id$v=19$m={ARGON2_MEMORY_KIB},t={ARGON2_PASSES},p={ARGON2_LANES}${'A' * 22}${'A' * 43}"
)
"""Zero bytes for salt and hash: checking a password against it costs what any check costs, and it never matches."""


@dataclass(frozen=True, slots=True)
class StoredHash:
    """The hash that is held of an account's password, of either kind; of neither for an account that is not there.
    `highest_cost`: the highest bcrypt cost there is in the htpasswd file, 0 without one."""

    argon2: str | None = None
    bcrypt: str | None = None
    highest_cost: int = 0


def check_password(password: str) -> None:
    """Raises AccountInvalid, which does not show it."""
    length = len(password.encode("utf-8", "surrogatepass"))
    if not SHORTEST_PASSWORD <= length <= LONGEST_PASSWORD:
        raise AccountInvalid(f"a password has {SHORTEST_PASSWORD} to {LONGEST_PASSWORD} bytes; this one has {length}")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in password):
        raise AccountInvalid("a password has no control characters in it")


def hash_password(password: str) -> str:
    """Its hash, with parameters and a fresh salt. Raises AccountInvalid."""
    check_password(password)
    return _hasher().hash(password)


def needs_rehash(held: str) -> bool:
    """It was hashed with other parameters than those of now."""
    return _hasher().check_needs_rehash(held)


def bcrypt_cost_of(held: str) -> int:
    """The cost of a bcrypt hash, a power of two."""
    return int(held[4:6])


def verify_password(password: str, held: StoredHash) -> bool:
    """Whether it is right. A wrong one takes the same time whatever is held, so it does not tell which accounts there
    are, nor where they come from: one argon2, and bcrypt that adds up to the dearest cost of the file."""
    raw = password.encode()
    if held.bcrypt is not None and _bcrypt(raw, held.bcrypt):
        return True
    if _argon2(raw, held.argon2 or _UNMATCHED_HASH) and held.argon2 is not None:
        return True
    if held.highest_cost:
        # 2^c + (2^c + 2^(c+1) + ... + 2^(dearest-1)) is 2^dearest.
        spent = (
            range(bcrypt_cost_of(held.bcrypt), held.highest_cost) if held.bcrypt is not None else (held.highest_cost,)
        )
        for cost in spent:
            _bcrypt(raw, f"$2b${cost:02}${'.' * 53}")
    return False


def _hasher() -> argon2.PasswordHasher:
    return argon2.PasswordHasher(ARGON2_PASSES, ARGON2_MEMORY_KIB, ARGON2_LANES)


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


T = TypeVar("T")

SLOT_NAME: Final = "password"
MOST_HASHINGS: Final = 2
"""Hashings at once, all workers together: 38 MiB and two cores at the most."""
MOST_WAITING: Final = 64
"""That wait in one worker: at 30 ms each, about a second until the last of them has its turn."""
RETRY_AFTER_SECONDS: Final = 2
"""Seconds: the queue is empty again by then."""
NICENESS: Final = 10


class HashingPool:
    """For one process and its event loop."""

    def __init__(self, turns: Leases, *, waiting: int = MOST_WAITING) -> None:
        self._turns = turns
        self._most = waiting
        self._inside = 0
        self._threads = ThreadPoolExecutor(MOST_HASHINGS, "hashing", _lower_priority)

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` gives, called in a thread when it is its turn. Raises TooManyRequests when too many wait, and
        what `work` raises. A cancellation ends the waiting at once; what is being hashed is waited for: it holds its
        slot until it is done."""
        if self._inside >= self._most + MOST_HASHINGS:
            raise TooManyRequests(
                "too many people are logging in; try again in a moment", retry_after=RETRY_AFTER_SECONDS
            )
        self._inside += 1
        try:
            async with self._turns.slot(SLOT_NAME, MOST_HASHINGS):
                hashed = asyncio.get_running_loop().run_in_executor(self._threads, work)
                try:
                    return await asyncio.shield(hashed)
                finally:
                    if not hashed.done():
                        await asyncio.wait({hashed})
        finally:
            self._inside -= 1

    def close(self) -> None:
        """Waits for what is being hashed."""
        self._threads.shutdown()


def _lower_priority() -> None:
    """Lowers the priority of the calling thread: on Linux each has one of its own (setpriority(2))."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
