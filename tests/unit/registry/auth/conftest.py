"""Fixtures: one worker over a store with an account."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import argon2
import pytest

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
    """Returns the list of passwords that argon2 has checked so far."""
    calls: list[bytes] = []
    verify = argon2.PasswordHasher.verify

    def counted(self: argon2.PasswordHasher, held: str, password: bytes) -> bool:
        calls.append(password)
        return verify(self, held, password)

    monkeypatch.setattr(argon2.PasswordHasher, "verify", counted)
    return calls
