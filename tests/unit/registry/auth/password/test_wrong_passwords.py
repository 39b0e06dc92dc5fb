"""The same wrong password from the same network counts as one failure a day, over all workers and restarts. Each other
wrong password counts. The store keeps nothing from which a wrong password could be found faster than from an argon2
hash: it may be the password of another account, such as one of Docker Hub."""

from __future__ import annotations

import asyncio
from pathlib import Path

import apsw
import pytest
from argon2 import low_level
from argon2.exceptions import HashingError

from registry.auth.password import wrong_passwords
from registry.auth.password.hashing import hash_password
from registry.auth.password.throttle import BY_ACCOUNT_AND_ADDRESS, BY_ADDRESS, DAY_SECONDS
from registry.auth.secret_cache import SecretCache
from storage.composition import prepare_data_dir
from storage.content import Actor
from storage.errors import Unauthorized
from tests.fakes.auth_worker import ADMIN, ALICE, KNOWN_ADDRESS, PASSWORD, AuthClock, AuthWorker, auth_worker

WRONG = "a password of Docker Hub"


async def fail(worker: AuthWorker, password: str = WRONG, name: str = ALICE, address: str = "192.0.2.1") -> None:
    """Logs in with a wrong password."""
    with pytest.raises(Unauthorized):
        await worker.access.credential_verifier.verify_basic(name, password, Actor(address=address))


def failures(worker: AuthWorker, name: str = ALICE, network: str = "192.0.2.1") -> int:
    """Returns the number of failures that the limit per account and address counts."""
    until = worker.accounts.throttled_until(f"pair {name} {network}")
    return round(max(0.0, until - worker.clock()) / BY_ACCOUNT_AND_ADDRESS.cost_seconds)


def remembered_keys(data: Path) -> set[str]:
    """Returns the keys under which the store remembers wrong passwords."""
    db = apsw.Connection(str(data / "entrepot.db"), flags=apsw.SQLITE_OPEN_READONLY)
    rows = db.execute("SELECT key FROM login_pace WHERE key LIKE 'wrong %'").fetchall()
    return {str(row[0]) for row in rows}


def bytes_of_all_files(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["alice", "nobody-here"])
@pytest.mark.slow
async def test_a_wrong_password_counts_once_over_all_workers_and_restarts(
    data: Path, clock: AuthClock, hashed: list[bytes], name: str
) -> None:
    """A wrong password that several workers get, at the same moment or later, and again after a restart, is one failure
    a day. Each worker still hashes it once. This holds for accounts that exist and for others."""
    async with auth_worker(data, clock) as first, auth_worker(data, clock) as second:
        await first.add_user(ALICE)
        await asyncio.gather(*(fail(worker, name=name) for worker in (first, second)))
        assert failures(first, name) == 1
        assert len(hashed) == 2
    async with auth_worker(data, clock) as later:
        await fail(later, name=name)
        assert failures(later, name) == 1
        assert len(hashed) == 3
        clock.now += DAY_SECONDS + 1
        await fail(later, name=name)
        assert failures(later, name) == 1


@pytest.mark.slow
async def test_logins_for_docker_hub_do_not_delay_an_office(data: Path, clock: AuthClock) -> None:
    """The people of an office, behind one address, send their logins for Docker Hub to two workers. They are fewer than
    the failures that an address may have, so the right password is accepted from there."""
    async with auth_worker(data, clock) as first, auth_worker(data, clock) as second:
        await first.add_user(ALICE)
        for number in range(BY_ADDRESS.burst // 2 + 1):
            for worker in (first, second):
                await fail(worker, name=f"hub{number}", address=KNOWN_ADDRESS.address)
        assert await second.access.credential_verifier.verify_basic(ALICE, PASSWORD, KNOWN_ADDRESS)


@pytest.mark.slow
async def test_what_counts_as_the_same_wrong_password(worker: AuthWorker, data: Path, clock: AuthClock) -> None:
    """Another password, another account and another network count. Addresses of one IPv6 network are one client."""
    async with auth_worker(data, clock) as other:
        for each in (worker, other):
            await fail(each)
            await fail(each, WRONG + "!")
            await fail(each, name="bob")
            await fail(each, address="192.0.2.2")
        await fail(worker, address="2001:db8::1")
        await fail(other, address="2001:db8::2")
    assert failures(worker) == 2
    assert failures(worker, "bob") == 1
    assert failures(worker, network="192.0.2.2") == 1
    assert failures(worker, network="2001:db8::/64") == 1


@pytest.mark.slow
async def test_a_wrong_password_counts_again_after_a_change(worker: AuthWorker) -> None:
    """After the account has got another password, or was disabled or enabled, a wrong password is checked again and
    counts again."""
    await fail(worker)
    await worker.accounts.set_password(ALICE, hash_password("a new password"), by=ADMIN)
    await fail(worker)
    assert failures(worker) == 2
    for enabled in (False, True):
        await worker.accounts.set_enabled(ALICE, enabled, by=ADMIN)
        await fail(worker)
    assert failures(worker) == 4


async def test_every_password_counts_for_a_malformed_hash(worker: AuthWorker) -> None:
    """If the stored hash of an account cannot be read, each attempt counts."""
    await worker.accounts.set_password(ALICE, "$argon2id$nonsense", by=ADMIN)
    for number in range(3):
        await fail(worker, f"guess number {number}")
    assert failures(worker) == 3


async def test_a_right_password_is_accepted_after_a_failed_hashing(
    worker: AuthWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the system has no memory for a hashing, the password is refused and counts, but is not cached as a wrong one.
    So the right password is accepted as soon as there is memory."""

    def no_memory(*_: object) -> bytes:
        raise HashingError("Memory allocation error")

    with monkeypatch.context() as patch:
        patch.setattr(low_level, "hash_secret_raw", no_memory)
        await fail(worker, PASSWORD)
    assert failures(worker) == 1
    assert await worker.access.credential_verifier.verify_basic(ALICE, PASSWORD, Actor(address="192.0.2.1"))


@pytest.mark.slow
async def test_the_store_has_only_hashes_of_argon2_digests(
    worker: AuthWorker, data: Path, tmp_path: Path, clock: AuthClock, hashed: list[bytes]
) -> None:
    """The store has a hash of an argon2 digest whose salt depends on the account's name and on the store. So nobody can
    test guesses for several accounts or stores with one hashing. The wrong password is in no file."""
    await fail(worker)
    await fail(worker, name="nobody-here")
    await fail(worker, name="nobody-else")
    assert len(hashed) == 3
    keys = remembered_keys(data)
    prepare_data_dir(tmp_path / "another")
    # Tests copy new stores from a template, so two of them have the same random name.
    apsw.Connection(str(tmp_path / "another" / "entrepot.db")).execute("UPDATE access SET instance = 'another'")
    async with auth_worker(tmp_path / "another", clock) as another:
        await fail(another, name="nobody-here")
    keys |= remembered_keys(tmp_path / "another")
    assert len(keys) == 4
    assert {len(key) for key in keys} == {len("wrong ") + 32}
    assert WRONG.encode() not in bytes_of_all_files(data)


@pytest.mark.slow
async def test_the_store_is_asked_about_a_limited_number_of_wrong_passwords(
    worker: AuthWorker, data: Path, clock: AuthClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker adds a limited number of wrong passwords a day to the store. Beyond it, each worker counts a wrong
    password for itself."""
    monkeypatch.setattr(wrong_passwords, "MAX_LOOKUPS_A_DAY", 2)
    async with auth_worker(data, clock) as other:
        for number in range(4):
            for each in (worker, other):
                await fail(each, f"guess number {number}")
    assert len(remembered_keys(data)) == 2
    assert failures(worker) == 6  # the third and the fourth password count in both workers, the others once


@pytest.mark.slow
async def test_repeated_hashings_of_wrong_passwords_count(
    worker: AuthWorker, hashed: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that repeats more wrong passwords than a worker caches makes it hash them again. Beyond a limited number
    a day, each of these hashings counts as a failure, so that the limits on failures also limit the hashings."""
    monkeypatch.setattr(wrong_passwords, "MAX_LOOKUPS_A_DAY", 4)
    worker.access.credential_verifier._password_check._wrong_cache = SecretCache(max_entries=1)
    for _ in range(3):
        for password in (WRONG, WRONG + "!"):
            await fail(worker, password)
    assert len(hashed) == 6
    assert failures(worker) == 4  # the second round does not count


async def test_a_wrong_password_is_hashed_once_for_an_ipv6_network(worker: AuthWorker, hashed: list[bytes]) -> None:
    """A client that repeats a wrong password from many addresses of its IPv6 network causes one failure and one
    hashing."""
    for number in range(1, 4):
        await fail(worker, address=f"2001:db8::{number}")
    assert failures(worker, network="2001:db8::/64") == len(hashed) == 1
