"""A long read transaction, such as that of a backup, does not hold up commits."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path

import pytest

from storage.metadata.sqlite.commit_thread import RESTART_LOG_PAGES
from storage.metadata.sqlite.database import connect
from storage.store.stored_registry import StoredRegistry

PAGE = 4096
LONGEST_SECONDS = 3.0


@pytest.mark.slow
async def test_commits_go_on_while_the_log_cannot_start_again(registry: StoredRegistry, data: Path) -> None:
    """During a long read, the log grows past the length at which a checkpoint would wait for readers. Each commit is
    fast nevertheless. After the read, the log starts again from its beginning."""
    time = asyncio.get_running_loop().time
    large = {"text": "x" * (400 * PAGE)}

    async def seconds_of_a_commit() -> float:
        start = time()
        await registry.jobs.add("test", large, actor="a test")
        return time() - start

    log = data / "entrepot.db-wal"
    with closing(connect(data / "entrepot.db", read_only=True)) as reading:
        reading.execute("BEGIN; SELECT 1 FROM sqlite_schema")
        while log.stat().st_size < RESTART_LOG_PAGES * PAGE:
            await seconds_of_a_commit()
        assert max([await seconds_of_a_commit() for _ in range(8)]) < LONGEST_SECONDS
        reading.execute("ROLLBACK")
    for _ in range(12):
        await seconds_of_a_commit()
    length = log.stat().st_size
    for _ in range(8):
        await seconds_of_a_commit()
    assert log.stat().st_size == length
