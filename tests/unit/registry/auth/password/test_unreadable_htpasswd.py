"""Failed logins while the htpasswd file cannot be read: the right passwords of its users are then refused, so their
failures must not delay the other people at their address."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import bcrypt
import pytest

from registry.auth.password.throttle import BY_ACCOUNT_AND_ADDRESS, BY_ADDRESS, FailureRate
from storage.errors import Unauthorized
from tests.fakes.auth_worker import ALICE, KNOWN_ADDRESS, AuthClock, AuthWorker, auth_worker

CAROLS_PASSWORD = "carols password"


def remove(path: Path) -> None:
    path.unlink()


def break_encoding(path: Path) -> None:
    path.write_bytes(b"\xff\xfe" + path.read_bytes())


def forbid(path: Path) -> None:
    """Makes the file one that nobody can read, not even root."""
    path.unlink()
    path.mkdir()


def break_line(path: Path) -> None:
    path.write_text("carol:not a hash\n")


@pytest.fixture
def htpasswd_file(tmp_path: Path) -> Path:
    """Writes an htpasswd file with a line for carol, and returns its path."""
    path = tmp_path / "htpasswd"
    path.write_text(f"carol:{bcrypt.hashpw(CAROLS_PASSWORD.encode(), bcrypt.gensalt(4)).decode()}\n")
    return path


@pytest.fixture
async def worker(data: Path, clock: AuthClock, htpasswd_file: Path) -> AsyncIterator[AuthWorker]:
    """Yields a worker with the file, whose store has the user alice."""
    async with auth_worker(data, clock, {"auth": {"htpasswd": str(htpasswd_file)}}) as opened:
        await opened.add_user(ALICE)
        yield opened


def failures(worker: AuthWorker, key: str, rate: FailureRate) -> int:
    """Returns the number of failures that a limit counts under the key."""
    until = worker.accounts.throttled_until(f"{key} {KNOWN_ADDRESS.address}")
    return round(max(0.0, until - worker.clock()) / rate.cost_seconds)


async def fail(worker: AuthWorker, name: str, password: str) -> None:
    with pytest.raises(Unauthorized):
        await worker.access.credential_verifier.verify_basic(name, password, KNOWN_ADDRESS)


@pytest.mark.parametrize("damage", [remove, forbid, break_encoding, break_line])
async def test_the_address_is_not_throttled(
    worker: AuthWorker, htpasswd_file: Path, damage: Callable[[Path], None]
) -> None:
    """While the file cannot be read, or has an invalid line for the name, the right password of its user is refused but
    is no failure of the address. It is one of the user, so that names stay throttled whether they exist or not."""
    damage(htpasswd_file)
    await fail(worker, "carol", CAROLS_PASSWORD)
    assert failures(worker, "address", BY_ADDRESS) == 0
    assert failures(worker, "pair carol", BY_ACCOUNT_AND_ADDRESS) == 1


@pytest.mark.parametrize("damage", [remove, break_line])
async def test_guesses_at_accounts_of_the_store_count(
    worker: AuthWorker, htpasswd_file: Path, damage: Callable[[Path], None]
) -> None:
    """While the file cannot be read, a wrong password of an account in the store counts as always."""
    damage(htpasswd_file)
    await fail(worker, "alice", "a guess")
    assert failures(worker, "address", BY_ADDRESS) == 1
    assert failures(worker, "pair alice", BY_ACCOUNT_AND_ADDRESS) == 1


@pytest.mark.parametrize("name", ["carol", "nobody-here"])
async def test_guesses_count_while_the_file_can_be_read(worker: AuthWorker, name: str) -> None:
    """While the file can be read, every wrong password is a failure of the address."""
    await fail(worker, name, "a guess")
    assert failures(worker, "address", BY_ADDRESS) == 1


async def test_the_log_says_what_to_do(
    worker: AuthWorker, htpasswd_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says once that the file cannot be read, what follows, and what to do. When it can be read again, its
    users can log in."""
    away = htpasswd_file.with_name("away")
    os.rename(htpasswd_file, away)
    with caplog.at_level(logging.WARNING, "registry.auth.password.htpasswd"):
        for _ in range(3):
            await fail(worker, "carol", CAROLS_PASSWORD)
    assert [record.getMessage() for record in caplog.records] == [
        f"htpasswd: {htpasswd_file} cannot be read: no such file or directory. Until it can be read, nobody can log in "
        "with its accounts. Repair the file or its permissions; the server then reads it without a restart"
    ]
    os.rename(away, htpasswd_file)
    assert await worker.access.credential_verifier.verify_basic("carol", CAROLS_PASSWORD, KNOWN_ADDRESS)
