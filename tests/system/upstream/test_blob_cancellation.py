"""Fetches of blobs from upstreams that are cancelled, or whose client is closed."""

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


async def test_cancelled_in_a_body(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """Cancelling closes the connection, and the sink is not called again, also if no bytes were arriving."""
    upstream.fault(stall_after=100_000)
    arrived = asyncio.Event()
    loop = asyncio.get_running_loop()
    sink = CollectingSink(lambda offset: loop.call_soon_threadsafe(arrived.set))
    async with upstream_source(registry, upstream.url) as source:
        task = asyncio.create_task(source.fetch_blob(REPO, Digest(held.layers[1].digest), Span(0), sink))
        await arrived.wait()
        await upstream.until_async(lambda: sink.at == 100_000)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await upstream.until_async(lambda: upstream.open == 0)
        assert upstream.requests("blob")[0].end == "gone"


async def test_cancelled_while_the_sink_is_at_it(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """A cancelled fetch ends when the running call of the sink has ended, not before."""
    entered, leave = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hook(offset: int) -> None:
        loop.call_soon_threadsafe(entered.set)
        assert leave.wait(30)

    sink = CollectingSink(hook)
    async with upstream_source(registry, upstream.url) as source:
        task = asyncio.create_task(source.fetch_blob(REPO, Digest(held.layers[1].digest), Span(0), sink))
        await entered.wait()
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=0.05)
        assert not done
        task.cancel()
        leave.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(sink.pieces) == 1


async def test_cancelled_before_the_answer(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """Cancelling before the response closes the connection at once; the sink is never begun."""
    upstream.fault(stall=True)
    sink = CollectingSink()
    async with upstream_source(registry, upstream.url) as source:
        task = asyncio.create_task(source.fetch_blob(REPO, Digest(held.layers[1].digest), Span(0), sink))
        await upstream.arrival(1, "blob")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await upstream.until_async(lambda: upstream.open == 0)
    assert sink.begun == []


@pytest.mark.parametrize("fault", [{"stall": True}, {"stall_after": 100_000}], ids=["before the answer", "in the body"])
async def test_cancelled_asks_no_more(
    registry: StoredRegistry, upstream: Hub, held: ImageTree, fault: dict[str, Any]
) -> None:
    """A cancelled fetch makes no other connection."""
    upstream.fault(**fault)
    sink = CollectingSink()
    async with upstream_source(registry, upstream.url) as source:
        task = asyncio.create_task(source.fetch_blob(REPO, Digest(held.layers[1].digest), Span(0), sink))
        await upstream.arrival(1, "blob")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await upstream.until_async(lambda: upstream.open == 0)
    assert await asyncio.to_thread(_ended_threads)
    assert upstream.opened == 1


def _ended_threads() -> bool:
    """Waits until no thread of an upstream is left."""
    for thread in threading.enumerate():
        if thread.name.startswith("upstream-"):
            thread.join(30)
    return not any(thread.name.startswith("upstream-") for thread in threading.enumerate())


async def test_closed_in_a_body(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """Closing the client ends its running fetches."""
    upstream.fault(stall_after=100_000)
    async with upstream_source(registry, upstream.url) as source:
        task = asyncio.create_task(fetch(source, held.layers[1].digest))
        await upstream.arrival(1, "blob")
        await source.aclose()
        with pytest.raises(UpstreamUnavailable):
            await task
