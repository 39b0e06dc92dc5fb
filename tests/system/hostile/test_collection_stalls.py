"""Tests that a garbage collection with much to delete does not block a worker, even at the start of the server."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.composition import layout_of
from storage.metadata.sqlite.database import connect
from tests.fakes.server_process import RegistryServer, running_server
from tests.system.hostile import large_store
from tests.system.hostile.ping_watcher import PingWatcher, Stall
from tests.system.hostile.stalls import MAX_STALL_MS, SETTLE_SECONDS, TRIES

pytestmark = [pytest.mark.alone, pytest.mark.real_disk]

# Settings with which the garbage collection runs every second.
FREQUENT_COLLECTION = {"ENTREPOT_GC__GRACE": "1s", "ENTREPOT_GC__INTERVAL": "1s", "ENTREPOT_UPLOADS__EXPIRE": "1h"}
TIMEOUT_SECONDS = 60.0
ENOUGH_DELETED = 100
"""The number of deleted links or folders after which the measurement ends."""


def _links(data: Path) -> int:
    """Returns the number of remaining links between repositories and blobs."""
    db = connect(layout_of(data).metadata, read_only=True)
    try:
        return int(db.execute("SELECT count(*) FROM blob_link").get)
    finally:
        db.close()


def _folders(data: Path) -> int:
    """Returns the number of remaining folders of upload sessions."""
    return len(os.listdir(layout_of(data).uploads))


def _slowest_ping(server: RegistryServer, count_remaining: Callable[[Path], int], max_remaining: int) -> Stall:
    """Pings the workers until `count_remaining` counts at most `max_remaining` links or folders. Returns the slowest
    ping."""
    with PingWatcher(server) as watcher:
        watcher.begin()
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while count_remaining(server.data) > max_remaining:
            assert time.monotonic() < deadline, f"{count_remaining(server.data)} are left"
            threading.Event().wait(SETTLE_SECONDS)
        return max(watcher.end(), key=lambda each: each.blocked_ms)


@pytest.mark.parametrize(
    ("build", "count_remaining", "count"),
    [
        (large_store.build_links, _links, large_store.GARBAGE),
        (large_store.build_sessions, _folders, large_store.FOLDERS),
    ],
    ids=["links", "sessions"],
)
def test_garbage_collection_does_not_block_a_worker(
    tmp_path: Path, build: Callable[[Path], None], count_remaining: Callable[[Path], int], count: int
) -> None:
    """The store has 100,000 links to blobs that no manifest refers to, or 2,000 stale upload sessions and 20,000
    folders of upload sessions that the database does not know. The garbage collection deletes them, from the start of
    the server on. Meanwhile, a worker delays every ping by less than 50 ms. The test makes up to ten tries, and one of
    them must succeed."""
    slowest_pings = []
    for attempt in range(TRIES):
        folder = tmp_path / str(attempt)
        build(folder / "data")
        with running_server(folder, env=FREQUENT_COLLECTION) as server:
            slowest_pings.append(_slowest_ping(server, count_remaining, count - ENOUGH_DELETED))
        if slowest_pings[-1].blocked_ms < MAX_STALL_MS:
            break
    assert min(ping.blocked_ms for ping in slowest_pings) < MAX_STALL_MS, slowest_pings
