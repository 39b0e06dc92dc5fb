"""A long read transaction, such as that of a backup, does not delay commits."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path

import pytest

from storage.metadata.sqlite.database import BUSY_TIMEOUT_MILLISECONDS, connect
from storage.metadata.sqlite.write_ahead_log import RESTART_LOG_PAGES
from storage.store.stored_registry import StoredRegistry

PAGE_BYTES = 4096
MAX_COMMIT_SECONDS = 0.8 * BUSY_TIMEOUT_MILLISECONDS / 1000
"""A commit that waits for the reader takes as long as SQLite waits for a lock, which is 10 s. Other commits take
milliseconds, and some seconds if the machine stalls."""


@pytest.mark.slow
async def test_commits_are_fast_during_a_long_read(registry: StoredRegistry, data: Path) -> None:
    """During a long read, the write-ahead log cannot start again from its beginning, so it grows. Even when the log is
    longer than `RESTART_LOG_PAGES`, commits do not wait for the reader. After the read, the log starts again and no
    longer grows."""
    time = asyncio.get_running_loop().time
    large_job = {"text": "x" * (400 * PAGE_BYTES)}

    async def commit_seconds() -> float:
        start = time()
        await registry.jobs.add("test", large_job, actor="a test")
        return time() - start

    log = data / "entrepot.db-wal"
    with closing(connect(data / "entrepot.db", read_only=True)) as reading:
        reading.execute("BEGIN; SELECT 1 FROM sqlite_schema")
        while log.stat().st_size < RESTART_LOG_PAGES * PAGE_BYTES:
            await commit_seconds()
        assert max([await commit_seconds() for _ in range(8)]) < MAX_COMMIT_SECONDS
        reading.execute("ROLLBACK")
    for _ in range(12):
        await commit_seconds()
    length = log.stat().st_size
    for _ in range(8):
        await commit_seconds()
    assert log.stat().st_size == length
