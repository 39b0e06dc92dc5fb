"""Passwords: which are accepted, what a check costs, and the pool that bounds hashing."""

from __future__ import annotations

import asyncio
import os
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import argon2
import bcrypt
import pytest

from registry.auth.password import hashing
from registry.auth.password.hashing import (
    MAX_PARALLEL_HASHINGS,
    NICENESS,
    HashingPool,
    StoredHash,
    check_password,
    hash_password,
    needs_rehash,
    verify_password,
)
from storage.access import AccountInvalid
from storage.data_dir.file_leases import FileLeases
from storage.data_dir.system import System
from storage.errors import TooManyRequests

WORD = "correct horse battery"


def bcrypt_of(password: str, cost: int = 4) -> str:
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(cost)).decode()


@pytest.mark.parametrize(
    "wrong", ["", "1234567", "x" * 1025, "pass\nword12", "pass\x00word", "pässwörd\x7f", "a\ud800b" * 5]
)
def test_password_refused(wrong: str) -> None:
    """A password that is too short, too long, or has control characters or half a surrogate pair is refused. The error
    does not show it."""
    with pytest.raises(AccountInvalid) as refused:
        check_password(wrong)
    assert not wrong or wrong not in refused.value.message


@pytest.mark.parametrize("right", ["12345678", "x" * 1024, "pass word:with ümlaut", "ключ ключ"])
def test_password_taken(right: str) -> None:
    """An accepted password matches its own hash, and no other password does."""
    held = StoredHash(argon2=hash_password(right))
    assert verify_password(right, held)
    assert not verify_password(right + "x", held)


def test_parameters() -> None:
    """The hash of a password names argon2id with 19 MiB, two passes and one lane. A hash with other parameters has to
    be made anew."""
    held = hash_password(WORD)
    assert held.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert not needs_rehash(held)
    assert needs_rehash(argon2.PasswordHasher(1, 8192, 1).hash(WORD))


def test_nothing_matches_no_account() -> None:
    """No password is right for an account that does not exist, or against a malformed hash."""
    assert not verify_password(WORD, StoredHash())
    assert not verify_password("", StoredHash())
    assert not verify_password(WORD, StoredHash(argon2="$argon2id$nonsense"))
    assert not verify_password(WORD, StoredHash(bcrypt="$2b$04$" + "." * 53, highest_bcrypt_cost=4))


def test_bcrypt_reads_72_bytes() -> None:
    """A password of more than 72 bytes matches no bcrypt hash, not even that of its first 72 bytes, and raises
    nothing."""
    held = StoredHash(bcrypt=bcrypt_of("x" * 72), highest_bcrypt_cost=4)
    assert verify_password("x" * 72, held)
    assert not verify_password("x" * 73, held)


@pytest.fixture
def spent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Returns a list to which each call of the two hash libraries adds its cost."""
    calls: list[tuple[str, int]] = []
    check, verify_argon2 = bcrypt.checkpw, argon2.PasswordHasher.verify

    def counted_bcrypt(password: bytes, held: bytes) -> bool:
        calls.append(("bcrypt", 2 ** int(held[4:6])))
        return check(password, held)

    def counted_argon2(self: argon2.PasswordHasher, held: str, password: bytes) -> bool:
        calls.append(("argon2", argon2.extract_parameters(held).memory_cost))
        return verify_argon2(self, held, password)

    monkeypatch.setattr(bcrypt, "checkpw", counted_bcrypt)
    monkeypatch.setattr(argon2.PasswordHasher, "verify", counted_argon2)
    return calls


def cost(spent: list[tuple[str, int]], held: StoredHash) -> dict[str, int]:
    """Returns what it costs to check a wrong password against the hash `held`."""
    spent.clear()
    assert not verify_password("a wrong password", held)
    return {kind: sum(of for which, of in spent if which == kind) for kind in ("argon2", "bcrypt")}


def test_a_wrong_password_costs_the_same_whatever_is_held(spent: list[tuple[str, int]]) -> None:
    """To check a wrong password costs the same for an account of the store, for a line of the htpasswd file (whatever
    the cost of its hash), and for an account that does not exist."""
    for dearest in (0, 4, 7):
        held = [
            StoredHash(highest_bcrypt_cost=dearest),
            StoredHash(argon2=hash_password(WORD), highest_bcrypt_cost=dearest),
        ]
        if dearest:
            held += [
                StoredHash(bcrypt=bcrypt_of(WORD, each), highest_bcrypt_cost=dearest) for each in range(4, dearest + 1)
            ]
        costs = [cost(spent, each) for each in held]
        assert costs == [{"argon2": hashing.ARGON2_MEMORY_KIB, "bcrypt": 2**dearest if dearest else 0}] * len(held)


def test_time_of_unknown_and_wrong() -> None:
    """The median CPU times of checks for unknown accounts and of checks of wrong passwords are within a factor of
    two."""
    held = [StoredHash(argon2=hash_password(WORD)), StoredHash()]
    times: list[list[float]] = [[], []]
    for _ in range(7):
        for each, found in zip(held, times, strict=True):
            begun = time.thread_time()
            verify_password("a wrong password", each)
            found.append(time.thread_time() - begun)
    known, unknown = map(statistics.median, times)
    assert max(known, unknown) < 2 * min(known, unknown)


@pytest.fixture
def turns(tmp_path: Path) -> Iterator[FileLeases]:
    opened = FileLeases(tmp_path / "turns", System())
    yield opened
    opened.close()


async def test_two_at_once_over_all_workers(tmp_path: Path, turns: FileLeases) -> None:
    """Two hashings run at a time, however many callers and processes there are."""
    other = FileLeases(tmp_path / "turns", System())
    gates = [HashingPool(turns), HashingPool(other)]
    running, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        verify_password(WORD, StoredHash())
        with lock:
            running -= 1

    await asyncio.gather(*(gates[each % 2].run(work) for each in range(10)))
    assert most == MAX_PARALLEL_HASHINGS
    for gate in gates:
        gate.close()
    other.close()


async def test_queue_is_bounded(turns: FileLeases) -> None:
    """When the queue is full, a further call is refused at once. Calls in the queue get their turn."""
    gate = HashingPool(turns, max_waiting=3)
    free = threading.Event()
    inside = [asyncio.create_task(gate.run(lambda: free.wait(30))) for _ in range(MAX_PARALLEL_HASHINGS + 3)]
    await asyncio.sleep(0)
    with pytest.raises(TooManyRequests) as refused:
        await gate.run(lambda: True)
    assert refused.value.retry_after >= 1
    free.set()
    assert await asyncio.gather(*inside) == [True] * (MAX_PARALLEL_HASHINGS + 3)
    assert await gate.run(lambda: 1) == 1
    gate.close()


async def test_who_leaves_the_queue_makes_room(turns: FileLeases) -> None:
    """A cancelled call in the queue is not hashed. A cancelled call that is being hashed holds its slot until the
    hashing is done."""
    gate = HashingPool(turns, max_waiting=1)
    free, begun = threading.Event(), threading.Semaphore(0)

    def work() -> bool:
        begun.release()
        return free.wait(30)

    inside = [asyncio.create_task(gate.run(work)) for _ in range(MAX_PARALLEL_HASHINGS)]
    for _ in inside:
        assert await asyncio.to_thread(begun.acquire, True, 10)
    waiting = asyncio.create_task(gate.run(work))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    inside[0].cancel()
    await asyncio.sleep(0)
    assert not inside[0].done()
    async with turns.try_slot("password", MAX_PARALLEL_HASHINGS) as has:
        assert not has
    free.set()
    with pytest.raises(asyncio.CancelledError):
        await inside[0]
    assert await inside[1]
    async with turns.try_slot("password", MAX_PARALLEL_HASHINGS) as has:
        assert has
    gate.close()


async def test_threads_give_way(turns: FileLeases) -> None:
    """Hashing threads have a lower priority than the process."""
    gate = HashingPool(turns)
    here = os.getpriority(os.PRIO_PROCESS, 0)
    there = await gate.run(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    assert there == max(here, NICENESS)
    assert os.getpriority(os.PRIO_PROCESS, 0) == here
    gate.close()


async def test_what_work_raises(turns: FileLeases) -> None:
    """An exception of the work reaches the caller, and the slot is free again."""
    gate = HashingPool(turns)
    for _ in range(MAX_PARALLEL_HASHINGS + 1):
        with pytest.raises(AccountInvalid):
            await gate.run(lambda: hash_password("short"))
    gate.close()
