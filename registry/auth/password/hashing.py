"""Password hashing: the hash functions, and the pool of threads that bounds them.

The store's hashes are argon2id (RFC 9106) with the parameters that OWASP names for 19 MiB; hashes of an htpasswd file
are bcrypt. Each call blocks for tens of milliseconds, so an event loop calls it through `HashingPool`.

The pool runs two hashings at once, all workers together, in threads of low priority with a bounded queue. So logins,
however many, leave processor and memory to pushes and pulls.
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

MIN_PASSWORD_BYTES, MAX_PASSWORD_BYTES = 8, 1024
"""Bytes of a password. The upper bound limits what a stranger can make the server hash."""
ARGON2_MEMORY_KIB: Final = 19 * 1024
"""Memory of one hashing, in KiB."""
ARGON2_PASSES, ARGON2_LANES = 2, 1

BCRYPT_HASH: Final = re.compile(r"\$2[aby]\$(0[4-9]|1[0-6])\$[./A-Za-z0-9]{53}")
"""A hash as `htpasswd -B` writes it. Costs above 16 take more than two seconds and are not accepted."""

_UNMATCHED_HASH: Final = (
    f"$argon2id$v=19$m={ARGON2_MEMORY_KIB},t={ARGON2_PASSES},p={ARGON2_LANES}${'A' * 22}${'A' * 43}"
)
"""A hash whose salt and digest are zero bytes. Checking a password against it takes as long as any check and never
succeeds."""


@dataclass(frozen=True, slots=True)
class StoredHash:
    """The stored hash of an account's password, of one kind or the other; of neither if there is no such account.
    `highest_cost` is the highest bcrypt cost in the htpasswd file, 0 without a file."""

    argon2: str | None = None
    bcrypt: str | None = None
    highest_cost: int = 0


def check_password(password: str) -> None:
    """Raises AccountInvalid, whose text does not show the password, if it is too short, too long or has control
    characters."""
    length = len(password.encode("utf-8", "surrogatepass"))
    if not MIN_PASSWORD_BYTES <= length <= MAX_PASSWORD_BYTES:
        bounds = f"{MIN_PASSWORD_BYTES} to {MAX_PASSWORD_BYTES} bytes"
        raise AccountInvalid(f"a password has {bounds}; this one has {length}")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in password):
        raise AccountInvalid("a password has no control characters in it")


def hash_password(password: str) -> str:
    """Returns the argon2id hash of a password, with its parameters and a fresh salt. Raises AccountInvalid."""
    check_password(password)
    return _hasher().hash(password)


def needs_rehash(held: str) -> bool:
    """Returns whether a hash has other parameters than the current ones."""
    return _hasher().check_needs_rehash(held)


def bcrypt_cost_of(held: str) -> int:
    """Returns the cost of a bcrypt hash, the exponent of two."""
    return int(held[4:6])


def verify_password(password: str, held: StoredHash) -> bool:
    """Returns whether the password is right.

    A wrong password takes the same time whatever is stored, so that the time does not reveal which accounts exist or
    where they come from: one argon2id, and bcrypt calls that add up to the highest cost of the file.
    """
    raw = password.encode()
    if held.bcrypt is not None and _bcrypt(raw, held.bcrypt):
        return True
    if _argon2(raw, held.argon2 or _UNMATCHED_HASH) and held.argon2 is not None:
        return True
    if held.highest_cost:
        # 2^c + (2^c + 2^(c+1) + ... + 2^(highest-1)) is 2^highest.
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
    """Returns whether a bcrypt hash matches. bcrypt reads 72 bytes, so a longer password never matches (bcrypt 5 raises
    ValueError)."""
    try:
        return bcrypt.checkpw(password, held.encode())
    except ValueError:
        return False


T = TypeVar("T")

SLOT_NAME: Final = "password"
MAX_PARALLEL_HASHINGS: Final = 2
"""Hashings at once, all workers together: at most 38 MiB and two cores."""
MAX_WAITING_CALLS: Final = 64
"""Calls that may wait in one worker. At 30 ms each, the last one waits about a second."""
RETRY_AFTER_SECONDS: Final = 2
"""By then the queue is empty again."""
NICENESS: Final = 10


class HashingPool:
    """Runs hashings in threads, for one process and its event loop."""

    def __init__(self, leases: Leases, *, waiting: int = MAX_WAITING_CALLS) -> None:
        self._leases = leases
        self._most = waiting
        self._inside = 0
        self._threads = ThreadPoolExecutor(MAX_PARALLEL_HASHINGS, "hashing", _lower_priority)

    async def run(self, work: Callable[[], T]) -> T:
        """Runs `work` in a thread and returns its result. Raises TooManyRequests if too many calls wait, and whatever
        `work` raises. A cancellation while waiting ends at once; during a hashing it waits for the end, since the
        hashing holds its slot."""
        if self._inside >= self._most + MAX_PARALLEL_HASHINGS:
            raise TooManyRequests(
                "too many people are logging in; try again in a moment", retry_after=RETRY_AFTER_SECONDS
            )
        self._inside += 1
        try:
            async with self._leases.slot(SLOT_NAME, MAX_PARALLEL_HASHINGS):
                hashed = asyncio.get_running_loop().run_in_executor(self._threads, work)
                try:
                    return await asyncio.shield(hashed)
                finally:
                    if not hashed.done():
                        await asyncio.wait({hashed})
        finally:
            self._inside -= 1

    def close(self) -> None:
        """Waits for hashings that are running."""
        self._threads.shutdown()


def _lower_priority() -> None:
    """Lowers the priority of the calling thread. On Linux each thread has its own (setpriority(2))."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
