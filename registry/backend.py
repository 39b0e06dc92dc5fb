"""Opens the backend: the store, a mirror for each upstream registry in the settings, and the router in front of both.

A *mirror* is a pull-through cache of one upstream. The *hosted registry* has the content that clients push. The server
uses this module, and so do commands that work on the same data directory while the server runs. This module imports
the modules of mirrors, and their HTTP client, only if the settings have an upstream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

from registry.config import Settings, Upstream
from registry.naming import NamingRules
from registry.router import Router
from registry.upkeep.components import UpkeepComponents, upkeep_components
from registry.upkeep.scrub_job import scrub_on_schedule
from storage.composition import open_registry
from storage.interface import Registry
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_runner import JobRunner
from storage.upkeep.schedule import cancel_all

if TYPE_CHECKING:
    from registry.mirror.mirror import Mirror


class Backend(NamedTuple):
    """The opened store, which is the hosted registry; the router that passes each call to it or to a mirror; and the
    work of upkeep on them."""

    store: StoredRegistry
    router: Router
    upkeep: UpkeepComponents


def make_mirror(upstream: Upstream, store: StoredRegistry, clock: Callable[[], float]) -> Mirror:
    """Returns the mirror of an upstream, which caches the upstream's content in `store`. Makes no connection yet. The
    caller closes the mirror with `aclose`, which also closes the mirror's HTTP client. `clock` returns seconds since
    1970."""
    from registry.mirror.mirror import Mirror
    from registry.upstream.client import make_upstream_client

    client = make_upstream_client(upstream, store.records, store.leases, clock)
    return Mirror(store, client, store.partials, store.records, store.leases, upstream, clock)


def preload_mirrors(settings: Settings) -> None:
    """Imports the modules of mirrors if the settings have an upstream. The server calls this before it forks the
    workers, so that they share the memory of these modules."""
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

    The data directory must have been prepared by `storage.composition.prepare_data_dir`.

    - `collect_every`: seconds between two rounds of garbage collection; None: no rounds.
    - `serving`: whether the process is a server. Until the block ends, a server runs the queued jobs and fetches the
      images in the setting `[warm]` before clients request them, unless another process does that. It also logs when
      the disk becomes full.
    - `may_open_read_only`: what happens if the disk is too full to open the database for writing. True: it is opened
      only for reading. False: raises StorageFull.
    - `clock`: returns seconds since 1970."""
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(
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
            mirror = make_mirror(upstream, store, clock)
            stack.push_async_callback(mirror.aclose)
            mirrors[upstream.name] = mirror
        router = Router(
            store,
            mirrors,
            store.is_known_repository,
            NamingRules.from_settings(settings),
            private=[upstream.name for upstream in settings.upstream if upstream.has_private_repositories],
            is_confirmed=store.records.is_confirmed,
        )
        # A store that was opened read-only cannot cache images. A schedule on it would still hold the lease (a lock
        # between processes) for this work, so that the writable store that replaces it later could not get the lease.
        if serving and mirrors and not store.is_read_only:
            from registry.mirror.warm.schedule import warm_on_schedule

            await stack.enter_async_context(
                warm_on_schedule(settings.warm, router.locate, store.metadata.known_blobs, store.leases)
            )
        upkeep = upkeep_components(settings, store, router)
        if serving and not store.is_read_only:
            runner = JobRunner(store.jobs, store.leases, upkeep.works)
            stack.push_async_callback(cancel_all, [asyncio.create_task(runner.run())])
            if settings.scrub.every:
                schedule = asyncio.create_task(scrub_on_schedule(settings.scrub, store, clock))
                stack.push_async_callback(cancel_all, [schedule])
        yield Backend(store, router, upkeep)
