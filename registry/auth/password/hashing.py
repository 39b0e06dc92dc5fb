"""Password hashing: the hash functions, and the thread pool that runs them.

The store's hashes are argon2id (RFC 9106) with the parameters that OWASP recommends for 19 MiB. The hashes of an
htpasswd file are bcrypt. Each hashing blocks for tens of milliseconds, so an event loop calls it through `HashingPool`.

All workers together run at most two hashings at the same time, in threads of low priority, and the queue is bounded. So
many logins do not take processor and memory from pushes and pulls.
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
"""The shortest and the longest password. The upper bound limits the work that a client without an account can cause."""
ARGON2_MEMORY_KIB: Final = 19 * 1024
"""The memory of one hashing."""
ARGON2_PASSES, ARGON2_LANES = 2, 1
"""The number of iterations, and the degree of parallelism (RFC 9106, 3.1)."""

BCRYPT_HASH: Final = re.compile(r"\$2[aby]\$(0[4-9]|1[0-6])\$[./A-Za-z0-9]{53}")
"""A bcrypt hash, as `htpasswd -B` writes it. A cost above 16 is not accepted, because it takes more than two
seconds."""

_UNMATCHABLE_HASH: Final = (
    f"$argon2id$v=19$m={ARGON2_MEMORY_KIB},t={ARGON2_PASSES},p={ARGON2_LANES}${'A' * 22}${'A' * 43}"
)
"""A hash that no password matches: its salt and digest are zero bytes. Checking a password against it takes as long as
against a real hash."""


@dataclass(frozen=True, slots=True)
class StoredHash:
    """The hash of an account's password.

    - `argon2`: the hash, if the account is in the store.
    - `bcrypt`: the hash, if the account is in the htpasswd file.
    - `highest_cost`: the highest bcrypt cost of all lines in the htpasswd file; 0 without a file.

    Without `argon2` and `bcrypt`, no password is right: there is no such account, or it has no password.
    """

    argon2: str | None = None
    bcrypt: str | None = None
    highest_cost: int = 0


def check_password(password: str) -> None:
    """Checks that a new password is acceptable. Raises AccountInvalid if it is too short, too long or has control
    characters. The error text does not contain the password."""
    length = len(password.encode("utf-8", "surrogatepass"))
    if not MIN_PASSWORD_BYTES <= length <= MAX_PASSWORD_BYTES:
        bounds = f"{MIN_PASSWORD_BYTES} to {MAX_PASSWORD_BYTES} bytes"
        raise AccountInvalid(f"a password has {bounds}; this one has {length}")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in password):
        raise AccountInvalid("a password has no control characters in it")


def hash_password(password: str) -> str:
    """Returns the argon2id hash of a password in its text form, which contains the parameters and a new random salt.
    Raises AccountInvalid if the password is not acceptable."""
    check_password(password)
    return _hasher().hash(password)


def needs_rehash(argon2_hash: str) -> bool:
    """Returns whether an argon2id hash was made with other parameters than the current ones."""
    return _hasher().check_needs_rehash(argon2_hash)


def bcrypt_cost_of(bcrypt_hash: str) -> int:
    """Returns the cost of a bcrypt hash. The time to check it is proportional to two to the power of the cost."""
    return int(bcrypt_hash[4:6])


def verify_password(password: str, stored: StoredHash) -> bool:
    """Returns whether a password is right.

    Every wrong password takes the same time, so the time does not reveal whether the account exists or where it is
    stored. The time is that of one argon2id hashing, plus that of one bcrypt hashing with the highest cost in the
    htpasswd file.
    """
    raw = password.encode()
    if stored.bcrypt is not None and _matches_bcrypt(raw, stored.bcrypt):
        return True
    if _matches_argon2(raw, stored.argon2 or _UNMATCHABLE_HASH) and stored.argon2 is not None:
        return True
    if stored.highest_cost:
        # The check above took 2^c for a line of cost c. With dummy checks of the costs c, c+1, ..., highest-1, the sum
        # is 2^highest. Without a line, one dummy check of the highest cost takes the same time.
        if stored.bcrypt is not None:
            dummy_costs = range(bcrypt_cost_of(stored.bcrypt), stored.highest_cost)
        else:
            dummy_costs = range(stored.highest_cost, stored.highest_cost + 1)
        for cost in dummy_costs:
            _matches_bcrypt(raw, f"$2b${cost:02}${'.' * 53}")
    return False


def _hasher() -> argon2.PasswordHasher:
    return argon2.PasswordHasher(ARGON2_PASSES, ARGON2_MEMORY_KIB, ARGON2_LANES)


def _matches_argon2(password: bytes, argon2_hash: str) -> bool:
    try:
        return _hasher().verify(argon2_hash, password)
    except (Argon2Error, InvalidHashError):
        return False


def _matches_bcrypt(password: bytes, bcrypt_hash: str) -> bool:
    """Returns whether a password matches a bcrypt hash. A password of more than 72 bytes never matches, because bcrypt
    5 raises ValueError for it."""
    try:
        return bcrypt.checkpw(password, bcrypt_hash.encode())
    except ValueError:
        return False


T = TypeVar("T")

SLOT_NAME: Final = "password"
"""The name of the slots that workers share. A slot is the right to run one hashing."""
MAX_PARALLEL_HASHINGS: Final = 2
"""The most hashings at the same time in all workers together. Two take at most 38 MiB and two cores."""
MAX_WAITING_CALLS: Final = 64
"""The most calls that wait in one worker. A hashing takes 30 ms, so the last call waits for about a second."""
RETRY_AFTER_SECONDS: Final = 2
"""When a refused client should try again. The queue is empty by then."""
NICENESS: Final = 10
"""The priority of the threads (`nice`); 19 is the lowest."""


class HashingPool:
    """Runs hashings in threads, for one process and its event loop. `leases` has the slots that all workers share. At
    most `waiting` calls wait for a slot."""

    def __init__(self, leases: Leases, *, waiting: int = MAX_WAITING_CALLS) -> None:
        self._leases = leases
        self._max_waiting = waiting
        self._pending_calls = 0
        self._threads = ThreadPoolExecutor(MAX_PARALLEL_HASHINGS, "hashing", _lower_priority)

    async def run(self, work: Callable[[], T]) -> T:
        """Runs `work` in a thread and returns its result. Raises TooManyRequests if too many calls wait, and whatever
        `work` raises. A caller that is cancelled while it waits for a slot returns at once. A caller that is cancelled
        during the hashing returns at its end, because a thread cannot be stopped and must keep its slot."""
        if self._pending_calls >= self._max_waiting + MAX_PARALLEL_HASHINGS:
            raise TooManyRequests(
                "too many people are logging in; try again in a moment", retry_after=RETRY_AFTER_SECONDS
            )
        self._pending_calls += 1
        try:
            async with self._leases.slot(SLOT_NAME, MAX_PARALLEL_HASHINGS):
                hashed = asyncio.get_running_loop().run_in_executor(self._threads, work)
                try:
                    return await asyncio.shield(hashed)
                finally:
                    if not hashed.done():
                        await asyncio.wait({hashed})
        finally:
            self._pending_calls -= 1

    def close(self) -> None:
        """Waits for running hashings and ends the threads."""
        self._threads.shutdown()


def _lower_priority() -> None:
    """Lowers the priority of the calling thread. On Linux each thread has a priority of its own (setpriority(2))."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
