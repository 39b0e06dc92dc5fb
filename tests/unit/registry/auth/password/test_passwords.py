"""Passwords: what is taken for one, what checking one costs, and the gate before that."""

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
    MOST_HASHINGS,
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
    """Too short, too long, with a control character or half a character: no password, and not shown in the message."""
    with pytest.raises(AccountInvalid) as refused:
        check_password(wrong)
    assert not wrong or wrong not in refused.value.message


@pytest.mark.parametrize("right", ["12345678", "x" * 1024, "pass word:with ümlaut", "ключ ключ"])
def test_password_taken(right: str) -> None:
    """What is taken matches its hash, and nothing else does."""
    held = StoredHash(argon2=hash_password(right))
    assert verify_password(right, held)
    assert not verify_password(right + "x", held)


def test_parameters() -> None:
    """A hash says argon2id with 19 MiB, two passes and one lane; one of other parameters is to be made anew."""
    held = hash_password(WORD)
    assert held.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert not needs_rehash(held)
    assert needs_rehash(argon2.PasswordHasher(1, 8192, 1).hash(WORD))


def test_nothing_matches_no_account() -> None:
    """Against an account that is not there no password is right, neither is one against a hash that is none."""
    assert not verify_password(WORD, StoredHash())
    assert not verify_password("", StoredHash())
    assert not verify_password(WORD, StoredHash(argon2="$argon2id$nonsense"))
    assert not verify_password(WORD, StoredHash(bcrypt="$2b$04$" + "." * 53, highest_cost=4))


def test_bcrypt_reads_72_bytes() -> None:
    """A longer password matches no bcrypt hash, also not that of its first 72 bytes; it is no error either."""
    held = StoredHash(bcrypt=bcrypt_of("x" * 72), highest_cost=4)
    assert verify_password("x" * 72, held)
    assert not verify_password("x" * 73, held)


@pytest.fixture
def spent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What each checking costs, as the two libraries are asked for it."""
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
    """What a wrong password costs against `held`."""
    spent.clear()
    assert not verify_password("a wrong password", held)
    return {kind: sum(of for which, of in spent if which == kind) for kind in ("argon2", "bcrypt")}


def test_a_wrong_password_costs_the_same_whatever_is_held(spent: list[tuple[str, int]]) -> None:
    """One of the store, one of the file with any cost, and one that is nowhere: the same work, so the same time."""
    for dearest in (0, 4, 7):
        held = [StoredHash(highest_cost=dearest), StoredHash(argon2=hash_password(WORD), highest_cost=dearest)]
        if dearest:
            held += [StoredHash(bcrypt=bcrypt_of(WORD, each), highest_cost=dearest) for each in range(4, dearest + 1)]
        costs = [cost(spent, each) for each in held]
        assert costs == [{"argon2": hashing.ARGON2_MEMORY_KIB, "bcrypt": 2**dearest if dearest else 0}] * len(held)


def test_time_of_unknown_and_wrong() -> None:
    """By the processor's clock as well: their medians are within a factor of two."""
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
    """However many ask, in however many processes, two are hashed at a time."""
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
    assert most == MOST_HASHINGS
    for gate in gates:
        gate.close()
    other.close()


async def test_queue_is_bounded(turns: FileLeases) -> None:
    """Who finds too many before them is told at once to come back later; those who wait have their turn."""
    gate = HashingPool(turns, waiting=3)
    free = threading.Event()
    inside = [asyncio.create_task(gate.run(lambda: free.wait(30))) for _ in range(MOST_HASHINGS + 3)]
    await asyncio.sleep(0)
    with pytest.raises(TooManyRequests) as refused:
        await gate.run(lambda: True)
    assert refused.value.retry_after >= 1
    free.set()
    assert await asyncio.gather(*inside) == [True] * (MOST_HASHINGS + 3)
    assert await gate.run(lambda: 1) == 1
    gate.close()


async def test_who_leaves_the_queue_makes_room(turns: FileLeases) -> None:
    """A client that gives up while it waits is hashed for no more; one that is being hashed for keeps its slot until
    that is done."""
    gate = HashingPool(turns, waiting=1)
    free, begun = threading.Event(), threading.Semaphore(0)

    def work() -> bool:
        begun.release()
        return free.wait(30)

    inside = [asyncio.create_task(gate.run(work)) for _ in range(MOST_HASHINGS)]
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
    async with turns.try_slot("password", MOST_HASHINGS) as has:
        assert not has
    free.set()
    with pytest.raises(asyncio.CancelledError):
        await inside[0]
    assert await inside[1]
    async with turns.try_slot("password", MOST_HASHINGS) as has:
        assert has
    gate.close()


async def test_threads_give_way(turns: FileLeases) -> None:
    """Hashing has a lower priority than the process has."""
    gate = HashingPool(turns)
    here = os.getpriority(os.PRIO_PROCESS, 0)
    there = await gate.run(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    assert there == max(here, NICENESS)
    assert os.getpriority(os.PRIO_PROCESS, 0) == here
    gate.close()


async def test_what_work_raises(turns: FileLeases) -> None:
    """An error of the work is the caller's, and the slot is free again."""
    gate = HashingPool(turns)
    for _ in range(MOST_HASHINGS + 1):
        with pytest.raises(AccountInvalid):
            await gate.run(lambda: hash_password("short"))
    gate.close()
