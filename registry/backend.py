"""Opens the backend: the store, a mirror of each upstream, and the router over them. For the server, and for commands
that work beside it.

A server without mirrors needs no HTTP client: what mirrors need is imported only where there are any.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

from registry.config import Settings, Upstream
from registry.naming import NamingRules
from registry.router import Router
from storage.composition import open_registry
from storage.interface import Registry
from storage.store.stored_registry import StoredRegistry

if TYPE_CHECKING:
    from registry.mirror.mirror import Mirror


class Backend(NamedTuple):
    """The opened store, and the router over it and the mirrors."""

    stored: StoredRegistry
    router: Router


def make_mirror(upstream: Upstream, stored: StoredRegistry, clock: Callable[[], float]) -> Mirror:
    """Returns an upstream's mirror over the store. Makes no connection. Its `aclose` closes its client as well."""
    from registry.mirror.mirror import Mirror
    from registry.upstream.client import make_upstream_client

    client = make_upstream_client(upstream, stored.records, stored.leases, clock)
    return Mirror(stored, client, stored.partials, stored.records, stored.leases, upstream, clock)


def preload_mirrors(settings: Settings) -> None:
    """Imports the modules that mirrors need, where there are any. Called before the fork, so that the workers share
    that memory."""
    if settings.upstream:
        import registry.mirror.mirror
        import registry.mirror.warm.schedule
        import registry.upstream.client  # noqa: F401


@asynccontextmanager
async def open_backend(
    settings: Settings,
    *,
    collect_every: float | None = None,
    serving: bool = False,
    may_freeze: bool = False,
    clock: Callable[[], float] = time.time,
) -> AsyncIterator[Backend]:
    """Opens the (prepared) data directory and the mirrors, for this process and its running event loop. Makes no
    connection to an upstream.

    `serving`: this process is a server. It warms the references of `[warm]` meanwhile, one process at a time, and logs
    when the disk is full. `clock`: seconds since 1970. `collect_every`, in seconds, and `may_freeze`: see
    `storage.composition.open_registry`."""
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
        router = Router(
            stored,
            mirrors,
            stored.is_known_repository,
            NamingRules.from_settings(settings),
            private=[upstream.name for upstream in settings.upstream if upstream.private],
            is_confirmed=stored.records.is_confirmed,
        )
        # A read-only registry can store nothing, and would keep the lease from the one that replaces it.
        if serving and mirrors and not stored.is_read_only:
            from registry.mirror.warm.schedule import warm_on_schedule

            await stack.enter_async_context(
                warm_on_schedule(settings.warm, router.locate, stored.metadata.known_blobs, stored.leases)
            )
        yield Backend(stored, router)
