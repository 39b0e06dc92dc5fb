"""Opens a store whose time a test can set (`clocked_store`), for tests of upkeep jobs such as garbage collection."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from storage.composition import open_registry, prepare_data_dir
from storage.names import Digest, RepositoryName
from storage.pulls import PullCount
from storage.store.stored_registry import StoredRegistry

APP = RepositoryName("team/app")
DAY = 86400.0  # seconds
START = 1_700_000_000.0
"""The time that the clock shows at first, in seconds since 1970."""


class Clock:
    """A clock for a store. A call returns `now`, in seconds since 1970, which a test can set."""

    def __init__(self, now: float = START) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def pass_days(self, days: float) -> None:
        self.now += days * DAY


@asynccontextmanager
async def clocked_store(folder: Path, clock: Clock) -> AsyncIterator[StoredRegistry]:
    """Opens a store in `folder` until the block ends. Creates the folder if it is missing."""
    prepare_data_dir(folder)
    async with open_registry(folder, clock=clock) as opened:
        yield opened


async def pull(store: StoredRegistry, repo: RepositoryName, digest: Digest, clock: Clock) -> None:
    """Records a pull of a pushed manifest at the current time of the clock."""
    await store.pulls.save([PullCount(repo, digest, "", clock(), 1)])
