"""Opens the backend: the store, a mirror for each upstream registry in the settings, and the router in front of both.

A *mirror* is a pull-through cache of one upstream. The *hosted registry* has the content that clients push. The server
uses this module, and so do commands that work on the same data directory while the server runs. If the settings have no
upstream, this module does not import the modules of mirrors, because these imports take time and memory.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

from registry.background_work import BackgroundWork
from registry.config import Settings, Upstream
from registry.events.pull_events import PullEvents, ignore_unrecorded, wants_pulls
from registry.naming import NamingRules
from registry.router import Router
from registry.upkeep.budgets import min_free_space
from registry.upkeep.components import UpkeepComponents, upkeep_components
from registry.upkeep.retention.retention_work import ignore_deleted
from storage.composition import open_registry
from storage.metadata.catalog import UNOBSERVED_COMMITS
from storage.patterns import NamePattern
from storage.store.stored_registry import StoredRegistry
from storage.tag_rules import ImmutableTags, TagPattern, TagRule
from storage.upkeep.collector import ignore_removal
from storage.upkeep.evictor import ignore_eviction_end
from storage.upkeep.job_runner import ignore_job_end
from storage.upkeep.pull_recorder import PullRecorder
from storage.upkeep.scrubber import ignore_scrubbed

if TYPE_CHECKING:
    from registry.memory_budget import MemoryBudget
    from registry.mirror.mirror import Mirror
    from registry.mirror.observer import MirrorObserver
    from registry.telemetry.telemetry import Telemetry
    from registry.upstream.hub_search import UpstreamSearch


class Backend(NamedTuple):
    """The store, the mirrors, and the objects that work on them.

    - `store`: the open store, with the content of the hosted registry and of the mirrors.
    - `router`: passes each call to the store or to a mirror.
    - `upkeep`: the objects for the upkeep of the store and the mirrors.
    - `pulls`: records the pulls that this process serves.
    - `pull_events`: adds an event for each pull; None: the settings ask for no events about pulls.
    - `work`: the background work, which only a server starts.
    - `mirrors`: the mirrors, by the names of their upstreams.
    - `upstream_search`: sends searches to the first upstream with the setting `search`; None: no upstream has it."""

    store: StoredRegistry
    router: Router
    upkeep: UpkeepComponents
    pulls: PullRecorder
    pull_events: PullEvents | None
    work: BackgroundWork
    mirrors: Mapping[str, Mirror]
    upstream_search: UpstreamSearch | None


def make_mirror(
    upstream: Upstream,
    store: StoredRegistry,
    clock: Callable[[], float],
    observer: MirrorObserver | None = None,
    pass_through_memory: MemoryBudget | None = None,
) -> Mirror:
    """Returns the mirror of an upstream, which caches the upstream's content in `store`. Does not connect to the
    upstream. The caller must close the mirror with `aclose`, which also closes the mirror's HTTP client. `clock`
    returns seconds since 1970. `observer` counts the mirror's work; None: the work is not counted.
    `pass_through_memory`: the memory budget for blobs that the mirror sends without storing them; None: the mirror
    makes its own budget."""
    from registry.mirror.mirror import Mirror
    from registry.mirror.observer import UNOBSERVED
    from registry.upstream.client import make_upstream_client

    observer = observer or UNOBSERVED
    client = make_upstream_client(upstream, store.records, store.leases, clock, observer=observer)
    return Mirror(
        *(store, client, store.partials, store.records, store.leases, upstream, clock),
        tags=store.upstream_tags,
        observer=observer,
        pass_through_memory=pass_through_memory,
    )


def _make_pass_through_memory(settings: Settings) -> MemoryBudget | None:
    """Returns the memory budget that the mirrors of this process share. While the disk is full, mirrors use this memory
    to send blobs without storing them. Returns None if the settings have no upstream."""
    if not settings.upstream:
        return None
    from registry.mirror.pass_through import new_pass_through_memory

    return new_pass_through_memory()


def immutable_tags(settings: Settings) -> ImmutableTags:
    """Returns the settings' rules about immutable tags."""
    rules = [
        TagRule(tuple(map(NamePattern, rule.repositories)), tuple(map(TagPattern, rule.tags)))
        for rule in settings.immutable
    ]
    return ImmutableTags(rules, mirrored=(upstream.name for upstream in settings.upstream))


def preload_optional_modules(settings: Settings) -> None:
    """Imports the modules of mirrors if the settings have an upstream, and the modules of webhooks if the settings have
    a webhook. The server calls this before it forks the workers, so that they share the memory of these modules."""
    if settings.webhook:
        import registry.events.dispatcher
        import registry.events.webhook_client
    if settings.upstream:
        import registry.mirror.cooldown_watch
        import registry.mirror.mirror
        import registry.mirror.warm.schedule
        import registry.upstream.client  # noqa: F401


def _open_search(settings: Settings) -> UpstreamSearch | None:
    """Returns the object that sends searches to the first upstream with the setting `search`. Returns None if no
    upstream has this setting."""
    upstream = next((upstream for upstream in settings.upstream if upstream.search is not None), None)
    if upstream is None:
        return None
    from registry.upstream.hub_search import open_upstream_search

    return open_upstream_search(upstream, time.monotonic)


@asynccontextmanager
async def open_backend(
    settings: Settings,
    *,
    collect_every: float | None = None,
    is_server: bool = False,
    starts_background_work: bool = True,
    may_open_read_only: bool = False,
    clock: Callable[[], float] = time.time,
    telemetry: Telemetry | None = None,
) -> AsyncIterator[Backend]:
    """A context manager that opens the data directory and the mirrors, for this process and its running event loop.
    Makes no connection to an upstream.

    The data directory must have been prepared by `storage.composition.prepare_data_dir`.

    - `collect_every`: seconds between two rounds of garbage collection; None: no rounds.
    - `is_server`: whether the process is a server. A server logs when the disk becomes full, and does the work that
      `BackgroundWork` describes.
    - `starts_background_work`: whether the background work of a server starts now. False: the caller starts the work
      later, with `Backend.work`.
    - `may_open_read_only`: what happens if the disk is too full to open the database for writing. True: opens the
      database for reading only. False: raises StorageFull.
    - `clock`: returns seconds since 1970.
    - `telemetry`: counts the work of the store and the mirrors; None: this work is not counted."""
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(
            open_registry(
                settings.data,
                grace=settings.gc.grace,
                expire=settings.uploads.expire,
                collect_every=collect_every,
                starts_rounds=not is_server,  # a server starts the rounds with `BackgroundWork`
                watch_disk_space=is_server,
                may_open_read_only=may_open_read_only,
                keep_audit=settings.audit.keep,
                immutable_tags=immutable_tags(settings),
                min_free=min_free_space(settings),
                clock=clock,
                commit_observer=UNOBSERVED_COMMITS if telemetry is None else telemetry,
                # Called for each removal of the garbage collector, except in dry runs.
                on_real_removal=ignore_removal if telemetry is None else telemetry.work.on_removed,
            )
        )
        mirrors: dict[str, Mirror] = {}
        pass_through_memory = _make_pass_through_memory(settings)
        for upstream in settings.upstream:
            observer = None if telemetry is None else telemetry.mirror_observer(upstream.name)
            mirror = make_mirror(upstream, store, clock, observer, pass_through_memory)
            stack.push_async_callback(mirror.aclose)
            mirrors[upstream.name] = mirror
        router = Router(
            store,
            mirrors,
            store.is_known_repository,
            NamingRules.from_settings(settings),
            private=[upstream.name for upstream in settings.upstream if upstream.has_private_repositories],
            # Tells whether a private upstream has confirmed that one of its repositories has a blob.
            is_confirmed=store.records.is_confirmed,
        )
        upstream_search = _open_search(settings)
        if upstream_search is not None:
            stack.push_async_callback(upstream_search.aclose)
        upkeep = upkeep_components(
            *(settings, store, router, clock),
            on_scrubbed=ignore_scrubbed if telemetry is None else telemetry.work.on_scrubbed,
            on_retention=ignore_deleted if telemetry is None else telemetry.work.on_retention,
            on_eviction_end=ignore_eviction_end if telemetry is None else telemetry.work.on_eviction_end,
        )
        pulls = PullRecorder(store.pulls, router.locate, clock)
        pull_events = None
        if wants_pulls(settings):
            on_unrecorded = ignore_unrecorded if telemetry is None else telemetry.events.on_unrecorded_pulls
            pull_events = PullEvents(store.outbox, router.locate, clock, on_unrecorded)
        work = BackgroundWork(
            *(settings, store, router, mirrors, upkeep, pulls, pull_events, clock),
            delivery_observer=None if telemetry is None else telemetry.events,
            activity=None if telemetry is None else telemetry.metrics.activity,
            on_job_ended=ignore_job_end if telemetry is None else telemetry.work.on_job_ended,
        )
        stack.push_async_callback(work.aclose)
        if is_server and starts_background_work:
            await work.start()
        yield Backend(store, router, upkeep, pulls, pull_events, work, mirrors, upstream_search)
