"""One upstream's mirror, put together. Apart from `registry.backend`, since it brings the HTTP clients along, which a
server that mirrors nothing need not load.

What is hosted and what is mirrored, opened together: for the server, and for commands that work beside it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from registry.config import Settings, Upstream
from registry.mirror.mirror import Mirror
from registry.router import ReadableCheck, Router, everything_readable
from registry.upstream.client import make_upstream_client
from storage.composition import open_registry
from storage.interface import Registry
from storage.store.stored_registry import StoredRegistry


def make_mirror(upstream: Upstream, stored: StoredRegistry, clock: Callable[[], float]) -> Mirror:
    """Nothing is contacted yet. Its `aclose` ends it, the source included."""
    source = make_upstream_client(upstream, stored.records, stored.leases, clock)
    return Mirror(stored, source, stored.partials, stored.records, stored.leases, upstream, clock)


def preload_mirrors(settings: Settings) -> None:
    """Loads what mirrors need, where there are any. Called before a fork, the workers share that memory."""
    if settings.upstream:
        import registry.backend  # noqa: F401


@asynccontextmanager
async def open_router(
    settings: Settings,
    *,
    collect_every: float | None = None,
    serving: bool = False,
    may_freeze: bool = False,
    clock: Callable[[], float] = time.time,
    readable: ReadableCheck = everything_readable,
) -> AsyncIterator[Router]:
    """The router over the (prepared) data directory and a mirror of each upstream, for this process and its running
    event loop. No upstream is contacted. `collect_every`, in seconds: see `storage.composition.open_registry`.
    `serving`: this is the server. What `[warm]` names is warmed meanwhile, by one process at a time, and the log says
    when the disk is full. `may_freeze`: see `storage.composition.open_registry`. `readable`: see `Router`."""
    async with AsyncExitStack() as stack:
        stored = await stack.enter_async_context(
            open_registry(
                settings.data,
                grace=settings.gc.grace,
                expire=settings.uploads.expire,
                collect_every=collect_every,
                watch_disk_space=serving,
                may_open_read_only=may_freeze,
                keep_audit=settings.audit.keep,
                clock=clock,
            )
        )
        mirrors: dict[str, Registry] = {}
        for upstream in settings.upstream:
            mirror = make_mirror(upstream, stored, clock)
            stack.push_async_callback(mirror.aclose)
            mirrors[upstream.name] = mirror
        default = settings.default_upstream
        router = Router(
            stored,
            mirrors,
            stored.known,
            default=default,
            prefixes=settings.hosted.prefixes,
            readable=readable,
            private=[upstream.name for upstream in settings.upstream if upstream.private],
            confirmed=stored.records.confirmed,
        )
        # A read-only registry can store nothing, and would keep the lease from the one that replaces it.
        if serving and mirrors and not stored.is_read_only:
            from registry.mirror.warm.schedule import warm_on_schedule

            await stack.enter_async_context(
                warm_on_schedule(settings.warm, router.locate, stored.metadata.known_blobs, stored.leases)
            )
        yield router
