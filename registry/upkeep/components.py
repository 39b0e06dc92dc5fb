"""The objects of an opened registry that background jobs, the management API and the upkeep commands use
(`UpkeepComponents`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from registry.config import Settings
from registry.router import Router
from registry.upkeep.backup_work import backup_work
from registry.upkeep.budgets import cache_limits
from registry.upkeep.eviction import EVICTION_KIND, eviction_work
from registry.upkeep.fsck import FSCK, fsck_work
from registry.upkeep.retention.judgement import RetentionJudge
from registry.upkeep.retention.preview import RetentionPreview
from registry.upkeep.retention.retention_work import KIND as RETENTION_KIND
from registry.upkeep.retention.retention_work import OnDeleted, RetentionWork, ignore_deleted
from registry.upkeep.scrub_job import scrub_work
from registry.upkeep.warm_work import WARM_KIND, warm_work
from storage.cached_images import Cooldowns
from storage.jobs import JSON
from storage.names import Digest, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.collection_job import GC, collection_work
from storage.upkeep.evictor import Evictor, OnEvictionEnd, ignore_eviction_end
from storage.upkeep.job_runner import JobContext, Work
from storage.upkeep.scrubber import SCRUB_KIND, OnScrubbed, ignore_scrubbed
from storage.upstream_tags import Sighting


@dataclass(frozen=True, slots=True)
class UpkeepComponents:
    """The opened registry and the kinds of jobs that run on it.

    - `store`: the registry in the data directory. Its attributes, such as `store.jobs`, give access to all data there.
    - `router`: passes calls on to `store` and to the mirrors.
    - `work_by_kind`: maps each kind of job to the function that runs it.
    - `evictor`: keeps the cache of mirrored content within its limits.
    - `retention_preview`: shows what retention would delete."""

    settings: Settings
    store: StoredRegistry
    router: Router
    work_by_kind: Mapping[str, Work]
    evictor: Evictor
    retention_preview: RetentionPreview


def upkeep_components(
    settings: Settings,
    store: StoredRegistry,
    router: Router,
    clock: Callable[[], float] = time.time,
    *,
    on_scrubbed: OnScrubbed = ignore_scrubbed,
    on_retention: OnDeleted = ignore_deleted,
    on_eviction_end: OnEvictionEnd = ignore_eviction_end,
) -> UpkeepComponents:
    """Builds the components for an opened registry. `clock` returns seconds since 1970.

    - `on_scrubbed`: called with the number of bytes that scrub has just read. Scrub is the job that verifies all stored
      content.
    - `on_retention`: called by retention with a kind of content (tag or manifest) and the number deleted.
    - `on_eviction_end`: called by each eviction with the evicted images."""
    work_by_kind: dict[str, Work] = {GC: collection_work(store.collector), FSCK: fsck_work(settings, store)}
    evictor = Evictor(
        store.cached_images,
        store.usage,
        store.collector,
        store.leases,
        cache_limits(settings, _cooldowns(settings, store, clock)),
        list_downloads=store.partials.list_downloads,
        free_bytes=store.free_bytes,
        clock=clock,
        on_eviction_end=on_eviction_end,
    )
    work_by_kind[SCRUB_KIND] = scrub_work(settings.scrub, store, router, on_scrubbed)
    work_by_kind["backup"] = backup_work(store, settings.data)
    work_by_kind["import-registry"] = partial(_import_directory, store, router)
    work_by_kind["import-remote"] = partial(_import_remote, settings, store, router)
    work_by_kind[EVICTION_KIND] = eviction_work(settings, store, evictor)
    work_by_kind[WARM_KIND] = warm_work(store, router)
    judge = RetentionJudge(settings.retention, router.naming, store.metadata, store.retention, store.immutable_tags)
    work_by_kind[RETENTION_KIND] = RetentionWork(judge, store.retention, clock, on_retention)
    preview = RetentionPreview(judge, store.retention, clock)
    return UpkeepComponents(settings, store, router, work_by_kind, evictor, preview)


def _cooldowns(settings: Settings, store: StoredRegistry, clock: Callable[[], float]) -> Cooldowns | None:
    """Returns the cooldowns of the upstreams; None if no upstream has one. A cooldown is the time for which clients
    get the older image after a tag has moved at the upstream."""
    upstreams = [upstream for upstream in settings.upstream if upstream.cooldown]
    if not upstreams:
        return None
    from registry.mirror.served_tags import ServedTags

    tags_by_upstream = {upstream.name: ServedTags(store.upstream_tags, upstream, clock) for upstream in upstreams}

    def digest_during_cooldown(repo: RepositoryName, tag: Tag, sightings: Sequence[Sighting]) -> Digest | None:
        """Returns the older digest that clients get while a cooldown holds back the newest digest. Returns None if no
        cooldown holds back the newest digest, or if there is no older digest that clients may get. `sightings`: the
        digests that the mirror saw the tag point at, with the times."""
        served_tags = tags_by_upstream.get(repo.partition("/")[0])
        return None if served_tags is None else served_tags.digest_during_cooldown(repo, tag, sightings)

    # The longest cooldown limits how far back the store looks for moved tags. `digest_during_cooldown` applies the
    # cooldown of the tag's upstream.
    return Cooldowns(max(upstream.cooldown for upstream in upstreams), digest_during_cooldown)


# The functions below load the modules for imports only when an import runs, because most servers never import content.


async def _import_directory(store: StoredRegistry, router: Router, context: JobContext) -> JSON:
    from registry.migration.directory_import import import_directory

    return await import_directory(store, router, context)


async def _import_remote(settings: Settings, store: StoredRegistry, router: Router, context: JobContext) -> JSON:
    from registry.migration.remote_import import import_remote

    return await import_remote(store, router, context, settings.upstream)
