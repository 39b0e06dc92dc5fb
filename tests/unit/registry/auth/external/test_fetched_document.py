"""`FetchedDocument` keeps a document that is fetched from another server. It runs one fetch at a time, pauses between
fetches, and drops a document that has become too old."""

from __future__ import annotations

import asyncio

from registry.auth.external.fetched_document import FetchedDocument, FetchTimes

TIMES = FetchTimes(refresh_age=100.0, max_age=1000.0, pause_after_failure=10.0, pause_after_success=50.0)
"""In seconds."""


class Source:
    """A fake source of the document. The test sets the answer of the next fetch, and `open` lets fetches finish."""

    def __init__(self) -> None:
        self.now = 0.0
        self.fetches = 0
        self.answer: str | None = "one"
        self.open = asyncio.Event()
        self.open.set()
        self.document = FetchedDocument(self.fetch, TIMES, lambda: self.now)

    async def fetch(self) -> str | None:
        self.fetches += 1
        await self.open.wait()
        return self.answer


async def test_concurrent_refreshes_share_one_fetch() -> None:
    """Concurrent refreshes share one fetch. If one of them is cancelled, the fetch continues for the others."""
    source = Source()
    source.open.clear()
    first, second = (asyncio.create_task(source.document.refresh()) for _ in range(2))
    await asyncio.sleep(0)
    source.document.start_refresh()
    first.cancel()
    source.open.set()
    await second
    assert (source.fetches, source.document.current) == (1, "one")


async def test_a_fetch_is_repeated_only_after_a_pause() -> None:
    """A fetch is repeated only after a pause, which is shorter after a failure."""
    source = Source()
    source.answer = None
    await source.document.refresh()
    await source.document.refresh()
    assert (source.fetches, source.document.current) == (1, None)
    source.now, source.answer = 10.0, "one"
    await source.document.refresh()
    assert (source.fetches, source.document.current) == (2, "one")
    source.now = 59.0
    await source.document.refresh()
    assert source.fetches == 2
    source.now = 60.0
    await source.document.refresh()
    assert source.fetches == 3


async def test_a_document_becomes_stale() -> None:
    """A document that cannot be fetched again is still used until its largest age. After that, there is no document."""
    source = Source()
    assert not source.document.is_fresh
    await source.document.refresh()
    assert source.document.is_fresh
    source.answer, source.now = None, 101.0
    assert not source.document.is_fresh
    await source.document.refresh()
    assert source.document.current == "one"
    source.now = 1001.0
    assert source.document.current is None


async def test_closing_cancels_a_fetch() -> None:
    """Closing cancels a running fetch. Callers that wait for the fetch continue without a document, and no further
    fetch starts."""
    source = Source()
    source.open.clear()
    refresh_task = asyncio.create_task(source.document.refresh())
    await asyncio.sleep(0)
    await source.document.aclose()
    await refresh_task
    await source.document.refresh()
    assert source.document.current is None
    assert source.fetches <= 1
