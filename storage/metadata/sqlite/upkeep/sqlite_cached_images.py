"""Finds and evicts cached images in the metadata database (`SqliteCachedImages`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from storage.cached_images import CachedImagePage, CacheSummary, DroppedLinks, EvictedImage, EvictionRules, ImageOrder
from storage.content import Actor
from storage.data_dir.reserve import ReserveUse
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.metadata.sqlite.upkeep import cached_image_list, cached_image_tables, eviction_plan


class SqliteCachedImages:
    """Implements `storage.cached_images.CachedImages`, which describes the methods. On a full disk, the changes may use
    the whole disk reserve (`ReserveUse.ALL`), because they free space."""

    def __init__(
        self,
        writer: CommitThread | ImmutableDatabase,
        scans: ScanThread | ImmutableScans,
        clock: Callable[[], float],
    ) -> None:
        """`writer` runs the changes, and `scans` the reads. `clock` returns seconds since 1970."""
        self._writer = writer
        self._scans = scans
        self._clock = clock

    async def evict_next(
        self, upstreams: Sequence[str], rules: EvictionRules, started: float, by: Actor
    ) -> EvictedImage | bool:
        now = self._clock()
        return await self._writer.run(
            lambda db: cached_image_tables.evict_next(db, upstreams, rules, started, by, now),
            reserve_use=ReserveUse.ALL,
        )

    async def plan(
        self, upstreams: Sequence[str], rules: EvictionRules, bytes_to_free: int, usage_scope: str
    ) -> list[EvictedImage]:
        now = self._clock()
        return await self._scans.run(
            lambda db: eviction_plan.plan_eviction(db, upstreams, rules, bytes_to_free, usage_scope, now)
        )

    async def drop_unused_links(self, upstreams: Sequence[str], unused_since: float) -> DroppedLinks:
        now, page_start = self._clock(), cached_image_tables.LINKS_START
        # The garbage collector's queue lists the links that may be unused. Each turn of the loop reads one page of the
        # queue, and removes unused links that the page lists. The loop ends when a turn has removed a link, or after
        # the last page.
        while True:
            links, page_end = await self._scans.run(
                partial(
                    cached_image_tables.unused_links,
                    upstreams=upstreams,
                    unused_since=unused_since,
                    now=now,
                    after=page_start,
                )
            )
            dropped = DroppedLinks(0, 0)
            if links:
                dropped = await self._writer.run(
                    partial(cached_image_tables.drop_unused_links, links=links, unused_since=unused_since, now=now),
                    reserve_use=ReserveUse.ALL,
                )
            if dropped.links or page_end is None:
                return dropped
            page_start = page_end

    async def summary(self, upstream: str) -> CacheSummary:
        return await self._scans.run(lambda db: eviction_plan.summarize_images(db, upstream))

    async def images(
        self, upstreams: Sequence[str], text: str, order: ImageOrder, offset: int, limit: int
    ) -> CachedImagePage:
        return await self._scans.run(lambda db: cached_image_list.read_page(db, upstreams, text, order, offset, limit))
