"""Passwords: which are accepted, what a check costs, and the pool that limits how many passwords are hashed at a
time."""

from __future__ import annotations

import asyncio
import os
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import argon2
import bcrypt
import pytest
from argon2 import low_level

from registry.auth.password import hashing
from registry.auth.password.hashing import (
    MAX_PARALLEL_HASHINGS,
    MAX_RESERVED_PLACES_PER_SITE,
    MAX_WAITING_CALLS,
    NICENESS,
    RESERVED_PLACES,
    HashingPool,
    PasswordComparison,
    StoredHash,
    check_password,
    compare_password,
    hash_password,
    needs_rehash,
)
from storage.access import AccountInvalid
from storage.data_dir.file_leases import FileLeases
from storage.data_dir.system import System
from storage.errors import TooManyRequests

PASSWORD = "correct horse battery"


def bcrypt_of(password: str, cost: int = 4) -> str:
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(cost)).decode()


@pytest.mark.parametrize(
    "bad_password", ["", "1234567", "x" * 1025, "pass\nword12", "pass\x00word", "pässwörd\x7f", "a\ud800b" * 5]
)
def test_bad_passwords_are_refused(bad_password: str) -> None:
    """A password is refused if it is too short, is too long, has control characters, or has half of a surrogate pair.
    The error does not show the password."""
    with pytest.raises(AccountInvalid) as refused:
        check_password(bad_password)
    assert not bad_password or bad_password not in refused.value.message


@pytest.mark.parametrize("right", ["12345678", "x" * 1024, "pass word:with ümlaut", "ключ ключ"])
@pytest.mark.slow
def test_accepted_passwords_match_their_hash(right: str) -> None:
    """An accepted password matches its own hash, and no other password does."""
    stored_hash = StoredHash(argon2=hash_password(right))
    assert compare_password(right, stored_hash).is_right
    assert not compare_password(right + "x", stored_hash).is_right


def test_parameters_of_a_hash() -> None:
    """A hash names argon2id with 19 MiB, two passes and one lane. A hash with other parameters has to be replaced."""
    stored_hash = hash_password(PASSWORD)
    assert stored_hash.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert not needs_rehash(stored_hash)
    assert needs_rehash(argon2.PasswordHasher(1, 8192, 1).hash(PASSWORD))


@pytest.mark.parametrize(
    "hasher",
    [
        argon2.PasswordHasher(1, 8192, 2),
        argon2.PasswordHasher(2, 1024, 1, hash_len=16, salt_len=8),
        argon2.PasswordHasher(1, 1024, 1, type=argon2.Type.I),
        argon2.PasswordHasher(1, 1024, 1, type=argon2.Type.D, hash_len=70),
    ],
)
def test_hashes_with_other_parameters(hasher: argon2.PasswordHasher) -> None:
    """A hash that the library made with other parameters matches its password and no other. The digest of a wrong
    password is neither empty nor the digest in the hash."""
    stored_hash = hasher.hash(PASSWORD)
    assert compare_password(PASSWORD, StoredHash(argon2=stored_hash)).is_right
    wrong = compare_password(PASSWORD + "x", StoredHash(argon2=stored_hash))
    assert not wrong.is_right
    assert len(wrong.digest) == hasher.hash_len
    assert hasher.verify(stored_hash, PASSWORD)


def test_a_hash_without_a_version() -> None:
    """A hash of the form that names no version is of version 1.0. It matches its password and no other."""
    versioned = low_level.hash_secret(PASSWORD.encode(), b"some salt", 1, 64, 1, 32, argon2.Type.ID, version=0x10)
    stored = StoredHash(argon2=versioned.decode().replace("$v=16", ""))
    assert compare_password(PASSWORD, stored).is_right
    assert not compare_password(PASSWORD + "x", stored).is_right


def test_no_password_matches_a_missing_or_malformed_hash() -> None:
    """No password matches if the account does not exist, or if its hash is malformed."""
    assert not compare_password(PASSWORD, StoredHash()).is_right
    assert not compare_password("", StoredHash()).is_right
    parameters = "$argon2id$v=19$m=64,t=1,p=1"
    for malformed in (
        "$argon2id$nonsense",
        f"{parameters}$c29tZXNhbHQ$",
        f"{parameters}$$AAAAAAAAAAAAAAAA",
        f"{parameters}$c29tZXNhbHQ$ü*",
        "$argon2id$v=19$m=-1,t=1,p=1$c29tZXNhbHQ$AAAAAAAAAAAAAAAA",
        "$argon2id$v=19$m=64,t=99999999999,p=1$c29tZXNhbHQ$AAAAAAAAAAAAAAAA",
    ):
        comparison = compare_password(PASSWORD, StoredHash(argon2=malformed))
        assert (comparison.is_right, comparison.digest) == (False, b"")
    assert not compare_password(PASSWORD, StoredHash(bcrypt="$2b$04$" + "." * 53, highest_bcrypt_cost=4)).is_right


@pytest.mark.parametrize("stored", [StoredHash(), StoredHash(argon2=hash_password(PASSWORD))])
def test_no_password_matches_if_the_memory_does_not_suffice(
    monkeypatch: pytest.MonkeyPatch, stored: StoredHash
) -> None:
    """If the system has no memory for a hashing, the password is refused, whether or not the account exists."""

    def fail(*_: object) -> bytes:
        raise argon2.exceptions.HashingError("Memory allocation error")

    monkeypatch.setattr(low_level, "hash_secret_raw", fail)
    assert compare_password(PASSWORD, stored) == PasswordComparison(False)


def test_no_long_password_matches_a_bcrypt_hash() -> None:
    """A password of more than 72 bytes matches no bcrypt hash. It does not match the hash of its first 72 bytes either,
    and raises no exception."""
    stored_hash = StoredHash(bcrypt=bcrypt_of("x" * 72), highest_bcrypt_cost=4)
    assert compare_password("x" * 72, stored_hash).is_right
    assert not compare_password("x" * 73, stored_hash).is_right


@pytest.fixture
def library_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Returns a list to which each check by one of the two hash libraries adds its cost: the rounds of bcrypt, or the
    memory of argon2 in KiB."""
    calls: list[tuple[str, int]] = []
    check, hash_secret_raw = bcrypt.checkpw, low_level.hash_secret_raw

    def counted_bcrypt(password: bytes, stored_hash: bytes) -> bool:
        calls.append(("bcrypt", 2 ** int(stored_hash[4:6])))
        return check(password, stored_hash)

    def counted_argon2(password: bytes, salt: bytes, passes: int, memory: int, *parameters: Any) -> bytes:
        calls.append(("argon2", memory))
        return hash_secret_raw(password, salt, passes, memory, *parameters)

    monkeypatch.setattr(bcrypt, "checkpw", counted_bcrypt)
    monkeypatch.setattr(low_level, "hash_secret_raw", counted_argon2)
    return calls


def cost_of_wrong_password(library_calls: list[tuple[str, int]], stored_hash: StoredHash) -> dict[str, int]:
    """Returns for each library what it costs to check a wrong password against `stored_hash`."""
    library_calls.clear()
    assert not compare_password("a wrong password", stored_hash).is_right
    return {name: sum(cost for library, cost in library_calls if library == name) for name in ("argon2", "bcrypt")}


@pytest.mark.slow
def test_a_wrong_password_costs_the_same_for_every_kind_of_account(library_calls: list[tuple[str, int]]) -> None:
    """The check of a wrong password costs the same for an account of the store, for a line of the htpasswd file
    (whatever the cost of its hash), and for an account that does not exist."""
    for highest_cost in (0, 4, 7):
        stored_hashes = [
            StoredHash(highest_bcrypt_cost=highest_cost),
            StoredHash(argon2=hash_password(PASSWORD), highest_bcrypt_cost=highest_cost),
        ]
        if highest_cost:
            stored_hashes += [
                StoredHash(bcrypt=bcrypt_of(PASSWORD, each), highest_bcrypt_cost=highest_cost)
                for each in range(4, highest_cost + 1)
            ]
        costs = [cost_of_wrong_password(library_calls, each) for each in stored_hashes]
        assert costs == [{"argon2": hashing.ARGON2_MEMORY_KIB, "bcrypt": 2**highest_cost if highest_cost else 0}] * len(
            stored_hashes
        )


@pytest.mark.slow
def test_unknown_accounts_and_wrong_passwords_take_equal_time() -> None:
    """The check for an unknown account and the check of a wrong password take about the same CPU time: the medians
    differ by less than a factor of two."""
    stored_hashes = [StoredHash(argon2=hash_password(PASSWORD)), StoredHash()]
    times: list[list[float]] = [[], []]
    for _ in range(7):
        for each, measured_seconds in zip(stored_hashes, times, strict=True):
            started = time.thread_time()
            compare_password("a wrong password", each)
            measured_seconds.append(time.thread_time() - started)
    seconds_of_known, seconds_of_unknown = map(statistics.median, times)
    assert max(seconds_of_known, seconds_of_unknown) < 2 * min(seconds_of_known, seconds_of_unknown)


@pytest.fixture
def leases(tmp_path: Path) -> Iterator[FileLeases]:
    """Yields the leases by which all worker processes share the slots for hashing."""
    opened = FileLeases(tmp_path / "turns", System())
    yield opened
    opened.close()


@pytest.mark.slow
async def test_all_workers_together_hash_two_passwords_at_a_time(tmp_path: Path, leases: FileLeases) -> None:
    """Two passwords are hashed at a time, and not more, however many callers and worker processes there are."""
    other = FileLeases(tmp_path / "turns", System())
    pools = [HashingPool(leases), HashingPool(other)]
    run_together = threading.Barrier(MAX_PARALLEL_HASHINGS)
    running, most_running, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal running, most_running
        with lock:
            running += 1
            most_running = max(most_running, running)
        run_together.wait(30)  # fails if no other hashing may run at the same time
        compare_password(PASSWORD, StoredHash())
        with lock:
            running -= 1

    await asyncio.gather(*(pools[each % 2].run(work) for each in range(10)))
    assert most_running == MAX_PARALLEL_HASHINGS
    for pool in pools:
        pool.close()
    other.close()


async def test_the_queue_has_a_largest_length(leases: FileLeases) -> None:
    """When the queue is full, a further call is refused at once. The calls in the queue are still done."""
    pool = HashingPool(leases, max_waiting=3)
    finish = threading.Event()
    places = MAX_PARALLEL_HASHINGS + 3 + RESERVED_PLACES
    accepted = [asyncio.create_task(pool.run(lambda: finish.wait(30))) for _ in range(places)]
    await asyncio.sleep(0)
    with pytest.raises(TooManyRequests) as refused:
        await pool.run(lambda: True)
    assert refused.value.retry_after >= 1
    finish.set()
    assert await asyncio.gather(*accepted) == [True] * places
    assert await pool.run(lambda: 1) == 1
    pool.close()


async def test_a_site_cannot_fill_the_queue(leases: FileLeases) -> None:
    """Calls of one site get all places but the reserved ones, which are for sites with few calls. When the calls have
    ended, the site gets its places again. Calls without a site get every place."""
    pool = HashingPool(leases, max_waiting=3)
    for _ in range(2):
        finish = threading.Event()
        calls = range(MAX_PARALLEL_HASHINGS + 3)
        accepted = [pool.start(lambda done=finish: done.wait(30), "attacker") for _ in calls]  # type: ignore[misc]
        for refused_call in (lambda: pool.check_queue("attacker"), lambda: pool.start(lambda: True, "attacker")):
            with pytest.raises(TooManyRequests):
                refused_call()
        for site in ("office", "cluster"):
            accepted += [pool.start(lambda: True, site) for _ in range(MAX_RESERVED_PLACES_PER_SITE)]
            with pytest.raises(TooManyRequests):
                pool.check_queue(site)
        accepted += [pool.start(lambda: True) for _ in range(RESERVED_PLACES - 2 * MAX_RESERVED_PLACES_PER_SITE)]
        for full_for in ("another", None):
            with pytest.raises(TooManyRequests):
                pool.check_queue(full_for)
        finish.set()
        assert all(await asyncio.gather(*accepted))
    assert not pool._pending_calls_by_site
    pool.close()


async def test_a_single_site_gets_as_many_places_as_many_sites_without_the_reserve(leases: FileLeases) -> None:
    """If all clients have one address, as behind a proxy that is not trusted, the reserve takes no place from them: the
    worker hashes two of their passwords, and `MAX_WAITING_CALLS` may wait."""
    pool = HashingPool(leases)
    accepted = [pool.start(lambda: True, "proxy") for _ in range(MAX_PARALLEL_HASHINGS + MAX_WAITING_CALLS)]
    with pytest.raises(TooManyRequests):
        pool.start(lambda: True, "proxy")
    assert all(await asyncio.gather(*accepted))
    pool.close()


async def test_cancelled_calls(leases: FileLeases) -> None:
    """If a call in the queue is cancelled, its work is not done. If a running call is cancelled, it keeps its slot
    until the work is done."""
    pool = HashingPool(leases, max_waiting=1)
    finish, started = threading.Event(), threading.Semaphore(0)

    def work() -> bool:
        started.release()
        return finish.wait(30)

    running = [asyncio.create_task(pool.run(work)) for _ in range(MAX_PARALLEL_HASHINGS)]
    for _ in running:
        assert await asyncio.to_thread(started.acquire, True, 10)
    waiting_task = asyncio.create_task(pool.run(work))
    await asyncio.sleep(0)
    waiting_task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting_task
    running[0].cancel()
    await asyncio.sleep(0)
    assert not running[0].done()
    async with leases.try_slot("password", MAX_PARALLEL_HASHINGS) as has_slot:
        assert not has_slot
    finish.set()
    with pytest.raises(asyncio.CancelledError):
        await running[0]
    assert await running[1]
    async with leases.try_slot("password", MAX_PARALLEL_HASHINGS) as has_slot:
        assert has_slot
    pool.close()


async def test_hashing_threads_have_low_priority(leases: FileLeases) -> None:
    """Hashing threads have a lower priority than the other threads of the process."""
    pool = HashingPool(leases)
    process_niceness = os.getpriority(os.PRIO_PROCESS, 0)
    thread_niceness = await pool.run(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    assert thread_niceness == max(process_niceness, NICENESS)
    assert os.getpriority(os.PRIO_PROCESS, 0) == process_niceness
    pool.close()


async def test_exceptions_reach_the_caller(leases: FileLeases) -> None:
    """If the work raises an exception, the caller gets the exception, and the slot is free again."""
    pool = HashingPool(leases)
    for _ in range(MAX_PARALLEL_HASHINGS + 1):
        with pytest.raises(AccountInvalid):
            await pool.run(lambda: hash_password("short"))
    pool.close()
