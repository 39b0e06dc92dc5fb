"""What the tests of rights share: a real store with its accounts, and the policy over it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from registry.auth.policy import Policy
from registry.auth.standing import Standing
from storage.accounts import Accounts
from storage.opening import open_registry, prepare
from storage.stored import StoredRegistry

UPSTREAMS = ("docker.io", "private.example")
GUARDED = ("private.example",)


@pytest.fixture
async def stored(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    prepare(tmp_path / "data")
    async with open_registry(tmp_path / "data") as opened:
        yield opened


@pytest.fixture
def accounts(stored: StoredRegistry) -> Accounts:
    return stored.accounts


@pytest.fixture
def policy(accounts: Accounts) -> Policy:
    """With two upstreams, one of which wants a grant of its own."""
    return Policy(accounts, Standing(accounts), upstreams=UPSTREAMS, guarded=GUARDED)
