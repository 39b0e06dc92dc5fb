"""Fixtures for the tests of authentication: a worker process of the server, whose store has an account."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from argon2 import low_level

from tests.fakes.auth_worker import ALICE, AuthClock, AuthWorker, auth_worker


@pytest.fixture
def clock() -> AuthClock:
    return AuthClock()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
async def worker(data: Path, clock: AuthClock) -> AsyncIterator[AuthWorker]:
    """Yields a worker whose store has the user alice with the password `PASSWORD`."""
    async with auth_worker(data, clock) as opened:
        await opened.add_user(ALICE)
        yield opened


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Returns a list to which each password that argon2 checks is added."""
    calls: list[bytes] = []
    hash_secret_raw = low_level.hash_secret_raw

    def record_and_hash(password: bytes, *parameters: Any) -> bytes:
        calls.append(password)
        return hash_secret_raw(password, *parameters)

    monkeypatch.setattr(low_level, "hash_secret_raw", record_and_hash)
    return calls
