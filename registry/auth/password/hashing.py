"""Password hashing: the hash functions, and the thread pool that runs them.

The hashes in the store are argon2id (RFC 9106), with the parameters that OWASP recommends for 19 MiB of memory. The
hashes in an htpasswd file are bcrypt. A *hashing* is the computation of one hash, for a new password or to check a
password. A hashing blocks for tens of milliseconds, so code on the event loop runs it with `HashingPool`.

All workers together run at most two hashings at the same time, in threads of low priority. In each worker, a limited
number of further hashings may wait. So even a large number of logins leaves most of the processor time and memory to
pushes and pulls.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import os
import re
import threading
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, TypeVar

import argon2
import bcrypt
from argon2 import low_level
from argon2.exceptions import Argon2Error, InvalidHashError

from registry.single_flight import start_detached
from storage.access import AccountInvalid
from storage.errors import TooManyRequests
from storage.leases import Leases

MIN_PASSWORD_BYTES, MAX_PASSWORD_BYTES = 8, 1024
"""The lengths of the shortest and the longest allowed password. The second one limits the work that a client without an
account can cause."""
ARGON2_MEMORY_KIB: Final = 19 * 1024
"""The memory that one argon2id hashing uses, in KiB."""
ARGON2_PASSES, ARGON2_LANES = 2, 1
"""The number of passes over the memory, and the degree of parallelism (RFC 9106, 3.1)."""

BCRYPT_HASH: Final = re.compile(r"\$2[aby]\$(0[4-9]|1[0-6])\$[./A-Za-z0-9]{53}")
"""A bcrypt hash, as `htpasswd -B` writes it. A cost above 16 is not accepted, because a check would take more than two
seconds."""

SALT_BYTES: Final = 16
"""The length of a salt that this registry makes (RFC 9106, 3.1)."""
_DIGEST_BYTES: Final = 32
"""The length of a digest that this registry makes."""


@dataclass(frozen=True, slots=True)
class StoredHash:
    """The hash of an account's password, and the data that `compare_password` needs to take the same time for all
    accounts.

    - `argon2`: the hash of an account in the store, or None.
    - `bcrypt`: the hash of an account in the htpasswd file, or None.
    - `highest_bcrypt_cost`: the highest bcrypt cost of all lines in the htpasswd file; 0 if the file has no line.
    - `dummy_salt`: the salt with which the password is hashed if `argon2` is None.

    If both hashes are None, no password is right: the account does not exist, is disabled, or has no password.
    """

    argon2: str | None = None
    bcrypt: str | None = None
    highest_bcrypt_cost: int = 0
    dummy_salt: bytes = bytes(SALT_BYTES)


@dataclass(frozen=True, slots=True)
class PasswordComparison:
    """The result of comparing a password with an account's hash.

    - `is_right`: whether the password matches the hash.
    - `digest`: the argon2 digest of a wrong password. A caller can keep it, to recognize the password when a client
      sends it again. The digest depends on the salt: that of the account's argon2 hash, or `dummy_salt` if there is no
      such hash. Empty if the password is right, if the account's argon2 hash is malformed, or if the hashing failed.
    """

    is_right: bool
    digest: bytes = field(default=b"", repr=False)


def check_password(password: str) -> None:
    """Checks that a new password is acceptable. Raises AccountInvalid if it is too short or too long, or if it has
    control characters or unpaired surrogates. The error text does not contain the password."""
    length = len(password.encode("utf-8", "surrogatepass"))
    if not MIN_PASSWORD_BYTES <= length <= MAX_PASSWORD_BYTES:
        bounds = f"{MIN_PASSWORD_BYTES} to {MAX_PASSWORD_BYTES} bytes"
        raise AccountInvalid(f"a password has {bounds}; this one has {length}")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in password):
        raise AccountInvalid("a password must not contain control characters")


def hash_password(password: str) -> str:
    """Returns the argon2id hash of a password, as a text that also contains the parameters and a new random salt.
    Raises AccountInvalid if the password is not acceptable."""
    check_password(password)
    return _hasher().hash(password)


def needs_rehash(argon2_hash: str) -> bool:
    """Returns whether an argon2id hash was made with other parameters than those of new hashes."""
    return _hasher().check_needs_rehash(argon2_hash)


def bcrypt_cost_of(bcrypt_hash: str) -> int:
    """Returns the cost of a bcrypt hash. If the cost is higher by 1, a check of the hash takes twice the time."""
    return int(bcrypt_hash[4:6])  # the two digits after `$2b$`


def compare_password(password: str, stored: StoredHash) -> PasswordComparison:
    """Compares a password with an account's hash.

    A wrong password takes the same time for all accounts. So the time reveals neither whether the account exists, nor
    whether it is in the store or in the htpasswd file. This time is the sum of an argon2id hashing and a bcrypt hashing
    with the highest cost in the htpasswd file. For a password of more than 72 bytes, which bcrypt refuses, it is the
    time of the argon2id hashing.
    """
    password_bytes = password.encode()
    if stored.bcrypt is not None and _matches_bcrypt(password_bytes, stored.bcrypt):
        return PasswordComparison(True)
    if stored.argon2 is None:
        digest = _argon2_digest(password_bytes, stored.dummy_salt, _CURRENT_PARAMETERS)
    else:
        digest, right_digest = _digest_and_right_digest(password_bytes, stored.argon2)
        if digest and hmac.compare_digest(digest, right_digest):
            return PasswordComparison(True)
    if stored.highest_bcrypt_cost:
        # A bcrypt check of cost c takes the time 2^c. All checks of a wrong password have to take the time 2^highest:
        #
        # - If the account has a line of cost c, the check above took the time 2^c. Dummy checks of the costs from c to
        #   highest-1 take the rest: 2^c + ... + 2^(highest-1) = 2^highest - 2^c.
        # - If the account has no line, one dummy check has the highest cost.
        if stored.bcrypt is not None:
            dummy_costs = range(bcrypt_cost_of(stored.bcrypt), stored.highest_bcrypt_cost)
        else:
            dummy_costs = range(stored.highest_bcrypt_cost, stored.highest_bcrypt_cost + 1)
        for cost in dummy_costs:
            _matches_bcrypt(password_bytes, f"$2b${cost:02}${'.' * 53}")
    return PasswordComparison(False, digest)


def _hasher() -> argon2.PasswordHasher:
    return argon2.PasswordHasher(ARGON2_PASSES, ARGON2_MEMORY_KIB, ARGON2_LANES)


_CURRENT_PARAMETERS: Final = argon2.Parameters(
    type=argon2.Type.ID,
    version=low_level.ARGON2_VERSION,
    salt_len=SALT_BYTES,
    hash_len=_DIGEST_BYTES,
    time_cost=ARGON2_PASSES,
    memory_cost=ARGON2_MEMORY_KIB,
    parallelism=ARGON2_LANES,
)
"""The parameters of new hashes, and of the hashing of a password for an account without an argon2 hash."""


_DEFAULT_VERSION: Final = 0x10
"""The argon2 version of a hash that states no version: version 1.0, which is encoded as 0x10."""


def _digest_and_right_digest(password: bytes, argon2_hash: str) -> tuple[bytes, bytes]:
    """Hashes a password with the salt and the parameters of `argon2_hash`. Returns the digest of the password, and the
    digest that `argon2_hash` contains. The first digest is empty if `argon2_hash` is malformed, or if the hashing
    fails."""
    try:
        parameters = argon2.extract_parameters(argon2_hash)
        if "$v=" not in argon2_hash:
            parameters.version = _DEFAULT_VERSION  # here the library returns a wrong version
        salt, right_digest = (_decode_unpadded_base64(part) for part in argon2_hash.split("$")[-2:])
        return _argon2_digest(password, salt, parameters), right_digest
    except (InvalidHashError, ValueError, OverflowError):
        return b"", b""


def _argon2_digest(password: bytes, salt: bytes, parameters: argon2.Parameters) -> bytes:
    """Returns the argon2 digest of a password. If the hashing fails, for example because memory is short, returns an
    empty digest."""
    try:
        return low_level.hash_secret_raw(
            password,
            salt,
            parameters.time_cost,
            parameters.memory_cost,
            parameters.parallelism,
            parameters.hash_len,
            parameters.type,
            parameters.version,
        )
    except Argon2Error:
        return b""


def _decode_unpadded_base64(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _matches_bcrypt(password: bytes, bcrypt_hash: str) -> bool:
    """Returns whether a password matches a bcrypt hash. A password of more than 72 bytes never matches, because bcrypt
    5 raises ValueError for it."""
    try:
        return bcrypt.checkpw(password, bcrypt_hash.encode())
    except ValueError:
        return False


T = TypeVar("T")

SLOT_NAME: Final = "password"
"""The name of the slots that all workers share. A slot is the right to run one hashing."""
MAX_PARALLEL_HASHINGS: Final = 2
"""The largest number of hashings at the same time in all workers together: the number of slots. Two hashings use at
most 38 MiB and two cores."""
MAX_WAITING_CALLS: Final = 64
"""The largest number of calls of `HashingPool.run` and `HashingPool.start` that wait for a slot in one worker. With two
slots and 30 ms for an argon2id hashing, the last of these calls waits for about a second, if no other worker uses the
slots."""
RESERVED_PLACES: Final = 8
"""The number of calls that may wait in one worker in addition to `MAX_WAITING_CALLS`. These *reserved places* are for
sites with few calls (`MAX_RESERVED_PLACES_PER_SITE`), so that one site cannot keep all other sites from logging in.

A *site* is a network whose addresses may all belong to one customer of an internet provider
(`registry.client_addresses.site_of`). One site can take all places that are not reserved. A limit on these places would
refuse logins where all clients belong to one site: if all clients are in one private network, or if they come through a
proxy that `trusted_proxies` does not list."""
MAX_RESERVED_PLACES_PER_SITE: Final = 2
"""A new call of a site gets a reserved place only if fewer than this number of the site's calls are pending
(`HashingPool`). All pending calls of the site count, whether they are in reserved places or not."""
RETRY_AFTER_SECONDS: Final = 2
"""The time after which a client should try again if its login was refused because too many calls were waiting."""
NICENESS: Final = 10
"""The niceness of the hashing threads. Other threads have the niceness 0; 19 is the lowest priority."""


class HashingPool:
    """Runs hashings in threads, for one process and its event loop. A call of `run` or `start` is *pending* while it
    waits for a slot or has one. `leases` has the slots, which all workers share. `max_waiting` is the largest number of
    calls that wait for a slot, without the calls in the reserved places.

    In the methods, `site` is the site of the client that logs in. A call that belongs to no login has the site None,
    and may take any place, even a reserved place."""

    def __init__(self, leases: Leases, *, max_waiting: int = MAX_WAITING_CALLS) -> None:
        self._leases = leases
        self._places = max_waiting + MAX_PARALLEL_HASHINGS
        """The largest number of pending calls, without the calls in the reserved places."""
        self._pending_calls = 0
        """The number of pending calls."""
        self._pending_calls_by_site: dict[str, int] = {}
        """The number of pending calls of each site that has any."""
        self._threads = ThreadPoolExecutor(MAX_PARALLEL_HASHINGS, "hashing", _lower_priority)

    def check_queue(self, site: str | None = None) -> None:
        """Raises TooManyRequests if `start` would refuse a call of this site, because too many calls are pending."""
        has_few_calls = site is None or self._pending_calls_by_site.get(site, 0) < MAX_RESERVED_PLACES_PER_SITE
        if self._pending_calls >= self._places + (RESERVED_PLACES if has_few_calls else 0):
            raise TooManyRequests(
                "too many people are logging in; try again in a moment", retry_after=RETRY_AFTER_SECONDS
            )

    def start(self, work: Callable[[], T], site: str | None = None) -> asyncio.Task[T]:
        """Returns a task that runs the hashing `work` in a thread. The call is pending until the task ends. Raises
        TooManyRequests if too many calls are pending."""
        self._begin_call(site)
        task = start_detached(self._run_in_slot(work))
        task.add_done_callback(lambda _: self._end_call(site))
        return task

    async def run(self, work: Callable[[], T]) -> T:
        """Runs the hashing `work` in a thread and returns its result. Raises TooManyRequests if too many calls are
        pending, and the errors of `work`.

        If the call is cancelled while it waits for a slot, `work` does not run. If it is cancelled during the hashing,
        it ends only when the hashing has ended, because a thread cannot be stopped and must keep its slot."""
        self._begin_call(None)
        try:
            return await self._run_in_slot(work)
        finally:
            self._end_call(None)

    async def _run_in_slot(self, work: Callable[[], T]) -> T:
        """Waits for a slot, and runs `work` in a thread."""
        async with self._leases.slot(SLOT_NAME, MAX_PARALLEL_HASHINGS):
            hash_future = asyncio.get_running_loop().run_in_executor(self._threads, work)
            try:
                return await asyncio.shield(hash_future)
            finally:
                if not hash_future.done():
                    await asyncio.wait({hash_future})

    def _begin_call(self, site: str | None) -> None:
        """Counts a pending call. Raises TooManyRequests if too many calls are pending."""
        self.check_queue(site)
        self._pending_calls += 1
        if site is not None:
            self._pending_calls_by_site[site] = self._pending_calls_by_site.get(site, 0) + 1

    def _end_call(self, site: str | None) -> None:
        self._pending_calls -= 1
        if site is not None:
            self._pending_calls_by_site[site] -= 1
            if not self._pending_calls_by_site[site]:
                del self._pending_calls_by_site[site]

    def close(self) -> None:
        """Waits until the running hashings have ended, and stops the threads. Blocks the calling thread."""
        self._threads.shutdown()


def _lower_priority() -> None:
    """Lowers the priority of the calling thread, if the system allows it. On Linux, each thread has a priority of its
    own (setpriority(2))."""
    with suppress(OSError):
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))
