"""Opens the backend: the store, a mirror for each upstream registry in the settings, and the router in front of both.

A *mirror* is a pull-through cache of one upstream. The *hosted registry* has the content that clients push. The server
uses this module, and so do commands that work on the same data directory while the server runs. This module imports
the modules of mirrors, and their HTTP client, only if the settings have an upstream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from registry.config import Settings, Upstream
from registry.naming import NamingRules
from registry.router import Router
from registry.upkeep.budgets import min_free_space, scope_definitions
from registry.upkeep.components import UpkeepComponents, upkeep_components
from registry.upkeep.retention import retention_work
from registry.upkeep.scrub_job import scrub_on_schedule
from storage.composition import open_registry
from storage.errors import StorageFailed, StorageFull
from storage.metadata.catalog import UNOBSERVED_COMMITS
from storage.patterns import NamePattern
from storage.store.stored_registry import StoredRegistry
from storage.tag_rules import ImmutableTags, TagPattern, TagRule
from storage.upkeep.job_runner import JobRunner
from storage.upkeep.job_schedule import queue_jobs
from storage.upkeep.pull_recorder import PullRecorder
from storage.upkeep.schedule import cancel_all
from storage.upkeep.usage_counting import keep_counted

if TYPE_CHECKING:
    from registry.mirror.mirror import Mirror
    from registry.mirror.observer import MirrorObserver
    from registry.telemetry.telemetry import Telemetry


class Backend(NamedTuple):
    """The opened store, which is the hosted registry; the router that passes each call to it or to a mirror; the work
    of upkeep on them; and the recorder of the pulls that this process serves."""

    store: StoredRegistry
    router: Router
    upkeep: UpkeepComponents
    pulls: PullRecorder


def make_mirror(
    upstream: Upstream, store: StoredRegistry, clock: Callable[[], float], observer: MirrorObserver | None = None
) -> Mirror:
    """Returns the mirror of an upstream, which caches the upstream's content in `store`. Makes no connection yet. The
    caller closes the mirror with `aclose`, which also closes the mirror's HTTP client. `clock` returns seconds since
    1970. `observer` counts the mirror's work; None: nobody does."""
    from registry.mirror.mirror import Mirror
    from registry.mirror.observer import UNOBSERVED
    from registry.upstream.client import make_upstream_client

    observer = observer or UNOBSERVED
    client = make_upstream_client(upstream, store.records, store.leases, clock, observer=observer)
    return Mirror(
        *(store, client, store.partials, store.records, store.leases, upstream, clock),
        tags=store.upstream_tags,
        observer=observer,
    )


def immutable_tags(settings: Settings) -> ImmutableTags:
    """Returns the rules about immutable tags in the settings."""
    rules = [
        TagRule(tuple(map(NamePattern, rule.repositories)), tuple(map(TagPattern, rule.tags)))
        for rule in settings.immutable
    ]
    return ImmutableTags(rules, mirrored=(upstream.name for upstream in settings.upstream))


def preload_mirrors(settings: Settings) -> None:
    """Imports the modules of mirrors if the settings have an upstream. The server calls this before it forks the
    workers, so that they share the memory of these modules."""
    if settings.upstream:
        import registry.mirror.cooldown_watch
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
    telemetry: Telemetry | None = None,
) -> AsyncIterator[Backend]:
    """A context manager that opens the data directory and the mirrors, for this process and its running event loop.
    Makes no connection to an upstream.

    The data directory must have been prepared by `storage.composition.prepare_data_dir`.

    - `collect_every`: seconds between two rounds of garbage collection; None: no rounds.
    - `serving`: whether the process is a server. Until the block ends, a server stores the pulls that it serves. Unless
      another process does so, it also runs the queued jobs, queues those that are due, fetches the images in the
      setting `[warm]` before clients request them, and looks at tags whose cooldown runs. It logs when the disk becomes
      full.
    - `may_open_read_only`: what happens if the disk is too full to open the database for writing. True: it is opened
      only for reading. False: raises StorageFull.
    - `clock`: returns seconds since 1970.
    - `telemetry`: counts what the store and the mirrors do; None: nobody does."""
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
                immutable_tags=immutable_tags(settings),
                min_free=min_free_space(settings),
                clock=clock,
                commit_observer=UNOBSERVED_COMMITS if telemetry is None else telemetry,
            )
        )
        mirrors: dict[str, Mirror] = {}
        for upstream in settings.upstream:
            observer = None if telemetry is None else telemetry.mirror_observer(upstream.name)
            mirror = make_mirror(upstream, store, clock, observer)
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
            if cooldowns := {upstream.name: upstream.cooldown for upstream in settings.upstream if upstream.cooldown}:
                from registry.mirror.cooldown_watch import round_interval, watch_young_tags

                watched = [mirrors[name] for name in cooldowns]
                interval = round_interval(cooldowns.values())
                await stack.enter_async_context(watch_young_tags(watched, interval, store.leases))
        upkeep = upkeep_components(settings, store, router, clock)
        pulls = PullRecorder(store.pulls, router.locate, clock)
        if serving and not store.is_read_only:
            stack.push_async_callback(_store_last_pulls, pulls)
            runner = JobRunner(store.jobs, store.leases, upkeep.works)
            if telemetry is not None:
                runner.on_ended = telemetry.work.on_job_ended
                store.collector.on_removed = telemetry.work.on_removed
                upkeep.evictor.on_evicted = telemetry.work.on_evicted
            background = [runner.run(), pulls.run(), *_schedules(settings, store, clock)]
            background.append(keep_counted(store.usage, store.leases, scope_definitions(settings)))
            if upkeep.evictor.limits:
                store.metadata.on_mirrored = upkeep.evictor.check_soon
                background.append(upkeep.evictor.run())
            if settings.scrub.every:
                background.append(scrub_on_schedule(settings.scrub, store, clock))
            stack.push_async_callback(cancel_all, [asyncio.create_task(work) for work in background])
        yield Backend(store, router, upkeep, pulls)


def _schedules(
    settings: Settings, store: StoredRegistry, clock: Callable[[], float]
) -> list[Coroutine[Any, Any, None]]:
    """Returns the functions to run in the background that queue jobs at the intervals in the settings."""
    if not settings.retention or not settings.upkeep.retention_every or settings.read_only:
        return []
    every = settings.upkeep.retention_every
    actor = retention_work.ACTOR.name
    return [queue_jobs(store.jobs, store.leases, retention_work.KIND, every, clock, actor=actor)]


async def _store_last_pulls(pulls: PullRecorder) -> None:
    """Stores the last pulls before the store is closed. If that fails, they are lost."""
    with suppress(StorageFull, StorageFailed):
        await pulls.store()
