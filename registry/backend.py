"""Opens the backend: the store, a mirror for each upstream registry in the settings, and the router in front of both.

The server uses it, and commands that work on the same data directory while the server runs. The modules of mirrors,
with their HTTP client, are imported only if the settings have an upstream.
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
    """The opened store (`stored`), and the router that passes each call to the store or to a mirror."""

    stored: StoredRegistry
    router: Router


def make_mirror(upstream: Upstream, stored: StoredRegistry, clock: Callable[[], float]) -> Mirror:
    """Returns the mirror of an upstream, which caches in the store. Makes no connection yet. The caller closes the
    mirror by `aclose`, which closes its HTTP client as well."""
    from registry.mirror.mirror import Mirror
    from registry.upstream.client import make_upstream_client

    client = make_upstream_client(upstream, stored.records, stored.leases, clock)
    return Mirror(stored, client, stored.partials, stored.records, stored.leases, upstream, clock)


def preload_mirrors(settings: Settings) -> None:
    """Imports the modules of mirrors if the settings have an upstream. Called before the workers are forked, so that
    they share the memory of these modules."""
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
    may_open_read_only: bool = False,
    clock: Callable[[], float] = time.time,
) -> AsyncIterator[Backend]:
    """A context manager that opens the data directory and the mirrors, for this process and its running event loop.
    Makes no connection to an upstream.

    The data directory must have been prepared by `storage.composition.prepare_data_dir`. `collect_every`: seconds
    between two rounds of garbage collection; None: no rounds. `serving`: the process is a server; until the block ends,
    it fetches the images of `[warm]` in the settings ahead of time, if no other process does, and logs when the disk
    becomes full. `may_open_read_only`: if the disk is too full to open the database for writing, it is opened for
    reading; otherwise that raises StorageFull. `clock`: returns seconds since 1970."""
    async with AsyncExitStack() as stack:
        stored = await stack.enter_async_context(
            open_registry(
                settings.data,
                grace=settings.gc.grace,
                expire=settings.uploads.expire,
                collect_every=collect_every,
                watch_disk_space=serving,
                may_open_read_only=may_open_read_only,
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
            private=[upstream.name for upstream in settings.upstream if upstream.has_private_repositories],
            is_confirmed=stored.records.is_confirmed,
        )
        # A store that was opened read-only cannot cache images. It would also hold the lease for this work, which the
        # store that replaces it needs.
        if serving and mirrors and not stored.is_read_only:
            from registry.mirror.warm.schedule import warm_on_schedule

            await stack.enter_async_context(
                warm_on_schedule(settings.warm, router.locate, stored.metadata.known_blobs, stored.leases)
            )
        yield Backend(stored, router)
