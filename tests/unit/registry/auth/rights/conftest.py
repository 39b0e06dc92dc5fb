"""Fixtures for the tests of rights: a store on disk, its accounts, and the policy over these accounts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from registry.auth.revocation import RevocationCheck
from registry.auth.rights.policy import Policy
from registry.naming import NamingRules
from storage.accounts import Accounts
from storage.composition import open_registry, prepare_data_dir
from storage.store.stored_registry import StoredRegistry

UPSTREAMS = ("docker.io", "private.example")
GUARDED = ("private.example",)
"""The private upstreams. A pull from them needs a grant whose pattern names the upstream."""


@pytest.fixture
async def stored(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data") as opened:
        yield opened


@pytest.fixture
def accounts(stored: StoredRegistry) -> Accounts:
    return stored.accounts


@pytest.fixture
def policy(accounts: Accounts) -> Policy:
    """Returns the policy of a registry with two upstreams. `private.example` is private: a pull from it needs a grant
    whose pattern names it."""
    return Policy(accounts, RevocationCheck(accounts), naming=NamingRules(UPSTREAMS), guarded=GUARDED)
