"""A right password that a process has just verified is not hashed again for other addresses. The tests count hashings.
They check that this helps nobody to guess, and that a change of the account counts at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import argon2
import bcrypt
import pytest

from registry.auth.password import password_check
from registry.auth.password.hashing import (
    MAX_PARALLEL_HASHINGS,
    MAX_WAITING_CALLS,
    RESERVED_PLACES,
    PasswordComparison,
    StoredHash,
    compare_password,
    hash_password,
)
from registry.auth.password.throttle import BY_ACCOUNT, BY_ACCOUNT_AND_ADDRESS
from registry.auth.rights.principal import Identity
from storage.content import Actor
from storage.errors import TooManyRequests, Unauthorized
from tests.fakes.auth_worker import ADMIN, ALICE, PASSWORD, AuthClock, AuthWorker, auth_worker

NEW_PASSWORD = "another password"
PLACES = MAX_PARALLEL_HASHINGS + MAX_WAITING_CALLS + RESERVED_PLACES
"""The number of hashings that a worker runs or has in its queue, if they are of many sites."""


def client(number: int) -> Actor:
    """Returns a client at an address of its own. The first 250 clients are in different sites."""
    return Actor(address=f"10.1.{number % 250}.{number // 250 + 1}")


async def log_in(worker: AuthWorker, number: int, password: str = PASSWORD, name: str = ALICE) -> Identity:
    """Logs in from the address of the client with this number."""
    return await worker.access.credential_verifier.verify_basic(name, password, client(number))


async def outcomes(worker: AuthWorker, numbers: range, password: str = PASSWORD) -> set[type]:
    """Returns the types of the results and errors of concurrent logins from the addresses of these clients."""
    logins = (log_in(worker, number, password) for number in numbers)
    return {type(each) for each in await asyncio.gather(*logins, return_exceptions=True)}


@asynccontextmanager
async def full_queue(worker: AuthWorker) -> AsyncIterator[None]:
    """Fills the worker's queue for hashing until the block ends."""
    finish = threading.Event()
    calls = [asyncio.create_task(worker.access.hashing_pool.run(lambda: finish.wait(30))) for _ in range(PLACES)]
    await asyncio.sleep(0)
    try:
        yield
    finally:
        finish.set()
        await asyncio.gather(*calls)


async def test_many_machines_with_one_password(worker: AuthWorker, hashed: list[bytes]) -> None:
    """300 machines that log in at the same moment with the same right password, each from its own address, all succeed
    with one hashing. Later logins from further addresses need none."""
    assert await outcomes(worker, range(300)) == {Identity}
    assert await outcomes(worker, range(300, 400)) == {Identity}
    assert hashed == [PASSWORD.encode()]


@pytest.mark.slow
async def test_many_machines_with_one_weakly_hashed_password(
    worker: AuthWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the stored hash has weaker parameters, many logins at the same moment cause one new hash."""
    weak = argon2.PasswordHasher(1, 8192, 1).hash(PASSWORD)
    await worker.accounts.set_password(ALICE, weak, by=ADMIN)
    new_hashes: list[str] = []

    def record_and_hash(password: str) -> str:
        new_hashes.append(hash_password(password))
        return new_hashes[-1]

    monkeypatch.setattr(password_check, "hash_password", record_and_hash)
    assert await outcomes(worker, range(100)) == {Identity}
    while worker.accounts.password_hash(ALICE) == weak:
        await worker.accounts.clear_failures([])  # an empty write, which waits for all earlier writes
    assert await outcomes(worker, range(100, 200)) == {Identity}
    assert len(new_hashes) == 1


@pytest.mark.slow
async def test_a_right_password_is_hashed_again_after_an_hour(worker: AuthWorker, hashed: list[bytes]) -> None:
    """A right password is accepted from new addresses without a hashing for one hour after its hashing."""
    await log_in(worker, 1)
    worker.clock.now += 3599
    await log_in(worker, 2)
    assert len(hashed) == 1
    worker.clock.now += 2
    await log_in(worker, 3)
    assert len(hashed) == 2


@pytest.mark.slow
async def test_each_wrong_password_is_hashed_and_counted(worker: AuthWorker, hashed: list[bytes]) -> None:
    """While the right password is remembered, each wrong password still costs a hashing for each address, and a counted
    failure. After too many of them, the remembered password is refused at this address as well, and nowhere else."""
    await log_in(worker, 1)
    hashed.clear()
    for number in (2, 3):
        with pytest.raises(Unauthorized):
            await log_in(worker, number, "the same guess")
    assert hashed == [b"the same guess"] * 2
    for attempt in range(BY_ACCOUNT_AND_ADDRESS.burst - 1):
        with pytest.raises(Unauthorized):
            await log_in(worker, 2, f"guess number {attempt}")
    assert len(hashed) == BY_ACCOUNT_AND_ADDRESS.burst + 1
    for password in ("one guess more", PASSWORD):
        with pytest.raises(TooManyRequests):
            await log_in(worker, 2, password)
    assert len(hashed) == BY_ACCOUNT_AND_ADDRESS.burst + 1
    assert await log_in(worker, 3)


@pytest.mark.slow
async def test_concurrent_equal_wrong_passwords_are_counted_for_each_address(
    worker: AuthWorker, hashed: list[bytes]
) -> None:
    """If many addresses send the same wrong password at the same moment, they share one hashing. Each of them has a
    counted failure. They are one guess, so the account has one: machines with an old password do not delay others."""
    assert await outcomes(worker, range(70), "the old password") == {Unauthorized}
    assert hashed == [b"the old password"]
    for number in range(70):
        assert worker.accounts.throttled_until(f"pair alice {client(number).address}") > worker.clock()
    assert worker.accounts.throttled_until("account alice") == worker.clock() + BY_ACCOUNT.cost_seconds
    assert await log_in(worker, 100)


@pytest.mark.slow
async def test_a_full_queue_gives_no_free_guesses(worker: AuthWorker, hashed: list[bytes]) -> None:
    """While the queue for hashing is full, a wrong password is refused with 429, not hashed and not counted. The right
    password gets the same answer, even if it is remembered: otherwise a client could guess without any cost. A client
    whose login is cached with its address is not affected."""
    await log_in(worker, 1)
    async with full_queue(worker):
        for password in (PASSWORD, "a guess"):
            with pytest.raises(TooManyRequests):
                await log_in(worker, 2, password)
        assert await log_in(worker, 1)
    assert await log_in(worker, 2)
    assert hashed == [PASSWORD.encode()]


@pytest.mark.slow
async def test_a_login_in_a_full_queue_gives_no_free_guesses(worker: AuthWorker) -> None:
    """While the queue is full, nobody can find out which password another client is logging in with: the same password
    from another address gets 429 like a wrong one."""
    finish = threading.Event()
    pool = worker.access.hashing_pool
    calls = [asyncio.create_task(pool.run(lambda: finish.wait(30))) for _ in range(PLACES - 2)]
    await asyncio.sleep(0)
    first = asyncio.create_task(log_in(worker, 1))
    wrong = asyncio.create_task(log_in(worker, 2, "a guess"))
    for _ in range(5):
        await asyncio.sleep(0)
    try:
        for password in (PASSWORD, "a guess"):
            with pytest.raises(TooManyRequests):
                async with asyncio.timeout(5):
                    await log_in(worker, 3, password)
    finally:
        finish.set()
        await asyncio.gather(*calls)
    assert await first
    with pytest.raises(Unauthorized):
        await wrong


@pytest.mark.slow
async def test_logins_of_the_same_moment_give_no_free_guesses(worker: AuthWorker, hashed: list[bytes]) -> None:
    """If logins of the same moment fill the queue, each later one of them gets 429, also the one with the remembered
    password. So no guess is refused without a cost while the right one would be accepted."""
    await log_in(worker, 0)
    hashed.clear()
    guesses = (log_in(worker, number, f"guess number {number}") for number in range(1, PLACES + 1))
    results = await asyncio.gather(*guesses, log_in(worker, 200), return_exceptions=True)
    assert [type(each) for each in results] == [Unauthorized] * PLACES + [TooManyRequests]
    assert len(hashed) == PLACES


@pytest.mark.slow
async def test_changes_of_the_account_count_at_once(
    worker: AuthWorker, data: Path, clock: AuthClock, hashed: list[bytes]
) -> None:
    """After another worker has changed the password, or disabled or removed the account, a remembered password is
    refused from every address, with a hashing like every wrong password."""
    async with auth_worker(data, clock) as other:
        await log_in(worker, 1)
        await other.accounts.set_password(ALICE, hash_password(NEW_PASSWORD), by=ADMIN)
        with pytest.raises(Unauthorized):
            await log_in(worker, 2)
        first = await log_in(worker, 3, NEW_PASSWORD)
        await other.accounts.set_enabled(ALICE, False, by=ADMIN)
        with pytest.raises(Unauthorized):
            await log_in(worker, 4, NEW_PASSWORD)
        assert hashed == [PASSWORD.encode(), PASSWORD.encode(), NEW_PASSWORD.encode(), NEW_PASSWORD.encode()]
        await other.accounts.set_enabled(ALICE, True, by=ADMIN)
        later = await log_in(worker, 5, NEW_PASSWORD)
        assert later.version != first.version
        await other.accounts.remove_account(ALICE, by=ADMIN)
        with pytest.raises(Unauthorized):
            await log_in(worker, 6, NEW_PASSWORD)


async def test_a_change_during_a_hashing(worker: AuthWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """If an account is disabled and enabled again while its password is hashed, the logins that began before are
    refused. A login that begins after it does not use their hashing, and succeeds."""
    hashed: list[str] = []
    started, finish = threading.Event(), threading.Event()

    def compare(password: str, stored: StoredHash) -> PasswordComparison:
        hashed.append(password)
        if len(hashed) == 1:
            started.set()
            finish.wait(30)
        return compare_password(password, stored)

    monkeypatch.setattr(password_check, "compare_password", compare)
    before = [asyncio.create_task(log_in(worker, number)) for number in (1, 2)]
    assert await asyncio.to_thread(started.wait, 30)
    for enabled in (False, True):
        await worker.accounts.set_enabled(ALICE, enabled, by=ADMIN)
    assert await log_in(worker, 3)
    finish.set()
    assert {type(each) for each in await asyncio.gather(*before, return_exceptions=True)} == {Unauthorized}
    assert len(hashed) == 2


async def test_changes_of_the_htpasswd_file_count_at_once(data: Path, clock: AuthClock, tmp_path: Path) -> None:
    """A remembered password of a line in the htpasswd file is refused from every address when the line has changed."""
    file = tmp_path / "htpasswd"

    def write(password: str) -> None:
        file.write_text(f"carol:{bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()}\n")

    write(PASSWORD)
    async with auth_worker(data, clock, {"auth": {"htpasswd": str(file)}}) as worker:
        assert (await log_in(worker, 1, name="carol")).stamp
        write(NEW_PASSWORD)
        with pytest.raises(Unauthorized):
            await log_in(worker, 2, name="carol")
        assert await log_in(worker, 3, NEW_PASSWORD, name="carol")


@pytest.mark.slow
async def test_remembered_passwords_are_keyed_hashes(worker: AuthWorker) -> None:
    """What a process remembers of passwords after logins contains no password."""
    await log_in(worker, 1)
    with pytest.raises(Unauthorized):
        await log_in(worker, 2, "a wrong password")
    passwords = worker.access.credential_verifier._password_check
    assert len(passwords._right_cache) == len(passwords._wrong_cache) == 1
    assert not passwords._comparisons
    remembered = repr((vars(passwords._right_cache), vars(passwords._wrong_cache)))
    assert PASSWORD not in remembered
    assert "a wrong password" not in remembered
