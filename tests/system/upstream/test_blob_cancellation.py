"""Tests of downloads of blobs from upstreams. The tests cancel a running download, or close its upstream client. The
downloaded bytes go to a sink, an object that the caller passes to `fetch_blob`."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from storage.content import Span
from storage.errors import UpstreamUnavailable
from storage.names import Digest
from storage.store.stored_registry import StoredRegistry
from tests.fakes.hub.hub import Hub
from tests.fakes.upstream_content import ImageTree
from tests.fakes.upstream_source import REPO, CollectingSink, fetch, upstream_source


async def test_cancelled_during_a_body(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """Cancelling a download whose body has stalled closes the connection."""
    upstream.fault(stall_after=100_000)
    arrived = asyncio.Event()
    loop = asyncio.get_running_loop()
    sink = CollectingSink(lambda offset: loop.call_soon_threadsafe(arrived.set))
    async with upstream_source(registry, upstream.url) as source:
        task = asyncio.create_task(source.fetch_blob(REPO, Digest(image.layers[1].digest), Span(0), sink))
        await arrived.wait()
        await upstream.until_async(lambda: sink.next_offset == 100_000)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await upstream.until_async(lambda: upstream.open == 0)
        assert upstream.requests("blob")[0].end == "gone"


async def test_cancelled_during_a_call_of_the_sink(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """A cancelled download ends only after the running call of the sink has ended, even if it is cancelled a second
    time. The sink is not called again."""
    entered, may_return = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hook(offset: int) -> None:
        loop.call_soon_threadsafe(entered.set)
        assert may_return.wait(30)

    sink = CollectingSink(hook)
    async with upstream_source(registry, upstream.url) as source:
        task = asyncio.create_task(source.fetch_blob(REPO, Digest(image.layers[1].digest), Span(0), sink))
        await entered.wait()
        task.cancel()
        finished, _ = await asyncio.wait([task], timeout=0.05)
        assert not finished
        task.cancel()
        may_return.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(sink.pieces) == 1


async def test_cancelled_before_the_response(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """Cancelling a download before the response closes the connection, and the sink is not called."""
    upstream.fault(stall=True)
    sink = CollectingSink()
    async with upstream_source(registry, upstream.url) as source:
        task = asyncio.create_task(source.fetch_blob(REPO, Digest(image.layers[1].digest), Span(0), sink))
        await upstream.arrival(1, "blob")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await upstream.until_async(lambda: upstream.open == 0)
    assert sink.begin_calls == []


@pytest.mark.parametrize("fault", [{"stall": True}, {"stall_after": 100_000}], ids=["before the answer", "in the body"])
async def test_cancelled_download_opens_no_further_connection(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, fault: dict[str, Any]
) -> None:
    """A cancelled download does not open another connection, and its thread ends."""
    upstream.fault(**fault)
    sink = CollectingSink()
    async with upstream_source(registry, upstream.url) as source:
        task = asyncio.create_task(source.fetch_blob(REPO, Digest(image.layers[1].digest), Span(0), sink))
        await upstream.arrival(1, "blob")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await upstream.until_async(lambda: upstream.open == 0)
    assert await asyncio.to_thread(_have_threads_ended)
    assert upstream.opened == 1


def _have_threads_ended() -> bool:
    """Waits for the threads of upstream clients. Returns whether all have ended."""
    for thread in threading.enumerate():
        if thread.name.startswith("upstream-"):
            thread.join(30)
    return not any(thread.name.startswith("upstream-") for thread in threading.enumerate())


async def test_client_closed_during_a_body(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """Closing the upstream client ends its running downloads with an error."""
    upstream.fault(stall_after=100_000)
    async with upstream_source(registry, upstream.url) as source:
        task = asyncio.create_task(fetch(source, image.layers[1].digest))
        await upstream.arrival(1, "blob")
        await source.aclose()
        with pytest.raises(UpstreamUnavailable):
            await task
