"""`PullEvents` makes an event for each pull. It keeps a limited number of pulls in memory."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from registry.events.pull_events import MAX_PULLS, PullEvents
from storage.content import digest_of
from storage.errors import NameUnknown
from storage.names import RepositoryName
from tests.fakes.upkeep_store import APP, Clock, clocked_store


async def test_too_many_pulls_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Pulls beyond the limit get no event. A counter and a line in the log give their number."""

    async def locate(_: RepositoryName) -> NoReturn:
        raise NameUnknown("it was deleted meanwhile")

    clock = Clock()
    counts: list[int] = []
    async with clocked_store(tmp_path, clock) as store:
        events = PullEvents(store.outbox, locate, clock, on_unrecorded=counts.append)
        for _ in range(MAX_PULLS + 3):
            events.add((APP, digest_of(b"manifest")), "alice", "192.0.2.1", "request")
        await events.store()
        await events.store()
    assert counts == [3]
    assert [record.getMessage() for record in caplog.records if "have no event" in record.getMessage()] == [
        "3 pulls have no event, because there were more than 10000 within 5 seconds, or because earlier pulls could "
        "not be stored"
    ]
