"""`StoreMetrics`: reads the metrics of the store from the data directory, for a scrape by Prometheus.

The *figures* are the numbers that a query counts in the database. Each process caches them for some time.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from registry.config import Settings
from registry.upkeep.budgets import CACHE_SCOPE, min_free_space, quota_scope
from storage.composition import database_sizes, open_inventory
from storage.inventory import StoreFigures
from storage.outbox import WebhookBacklog
from storage.usage import ScopeUsage

log = logging.getLogger("registry")
T = TypeVar("T")
MIN_CACHED_SECONDS: Final = 10.0
"""Shortest time for which the figures are cached."""
MIN_CACHED_READ_DURATIONS: Final = 50.0
"""A factor. The figures are cached for at least this factor times the duration of the last read, so that reads take at
most 2% of the time. For a million blobs, a read takes about 0.1 s."""
_QUOTA_SCOPE_PREFIX: Final = quota_scope("")
"""The beginning of the name of each quota's scope. The rest of the name is the quota's `prefix`. A *scope* is a set of
repositories whose use is counted."""


class StoreMetrics(Collector):
    """Collects the metrics of the store. If the database cannot be read, the metric `entrepot_store_readable` is 0, and
    the metrics from the database are missing."""

    def __init__(
        self,
        settings: Settings,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` returns seconds since 1970. `monotonic` returns monotonic seconds."""
        self._data = settings.data
        self._cache_max = {upstream.name: upstream.cache_max for upstream in settings.upstream}
        self._total_cache_max = settings.cache.max
        self._min_free = min_free_space(settings)
        self._webhooks = [webhook.name for webhook in settings.webhook]
        self._clock = clock
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._figures: StoreFigures | None = None
        self._valid_until = float("-inf")

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics. Call this in a thread, because it reads files and the database. Several threads may call
        it at the same time. Does not raise an error if the store cannot be read."""
        disk_metrics = self._try(lambda: list(self._disk_metrics()))
        figures = self._try(self._current_figures)
        yield _gauge("entrepot_store_readable", "1 if the metrics of the store could be read.", figures is not None)
        yield from disk_metrics or ()
        if figures is not None:
            yield from _content_metrics(figures)
            yield from self._usage_metrics(figures.scopes)
            yield from self._backlog_metrics(figures.backlogs)

    def _try(self, read: Callable[[], T]) -> T | None:
        """Returns the result of `read`. If `read` raises an error, logs the error and returns None, so that the other
        metrics are still yielded."""
        try:
            return read()
        except Exception as error:
            log.warning("metrics of the store are missing, because it cannot be read: %s", error)
            return None

    def _current_figures(self) -> StoreFigures:
        """Returns the cached figures. If they are too old, first reads new figures from the database."""
        with self._lock:
            started = self._monotonic()
            if self._figures is None or started >= self._valid_until:
                with open_inventory(self._data) as inventory:
                    self._figures = inventory.figures(self._clock())
                ended = self._monotonic()
                self._valid_until = ended + max(MIN_CACHED_SECONDS, MIN_CACHED_READ_DURATIONS * (ended - started))
            return self._figures

    def _disk_metrics(self) -> Iterator[Metric]:
        disk = os.statvfs(self._data)
        free, size = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
        floor = 0 if self._min_free is None else self._min_free.required_bytes(size)
        database, log_size = database_sizes(self._data)
        yield _gauge("entrepot_disk_free_bytes", "Free space of the data directory's disk.", free)
        yield _gauge("entrepot_disk_size_bytes", "Size of the data directory's disk.", size)
        yield _gauge("entrepot_disk_floor_bytes", "If less is free, pushes are refused.", floor)
        yield _gauge("entrepot_database_size_bytes", "Size of the metadata database.", database)
        yield _gauge("entrepot_database_log_bytes", "Size of the database's write-ahead log.", log_size)

    def _usage_metrics(self, scopes: Sequence[ScopeUsage]) -> Iterator[Metric]:
        """Yields the metrics of the cache of mirrored content and of the quotas. `scopes`: one scope for each upstream,
        one for each quota, and one for the whole cache. A limit that is not set yields no sample."""
        cache = GaugeMetricFamily("entrepot_cache_used_bytes", "Bytes of mirrored content.", labels=["upstream"])
        cache_max = GaugeMetricFamily(
            "entrepot_cache_limit_bytes", "How large the cache of an upstream may be.", labels=["upstream"]
        )
        used = GaugeMetricFamily("entrepot_quota_used_bytes", "Bytes that a quota counts.", labels=["prefix"])
        limit = GaugeMetricFamily("entrepot_quota_limit_bytes", "Bytes that a quota allows.", labels=["prefix"])
        tags = GaugeMetricFamily("entrepot_quota_used_tags", "Tags that a quota counts.", labels=["prefix"])
        tag_limit = GaugeMetricFamily("entrepot_quota_limit_tags", "Tags that a quota allows.", labels=["prefix"])
        for scope in scopes:
            definition = scope.definition
            if definition.upstream is not None:
                cache.add_metric([definition.upstream], scope.bytes)
                if (max_bytes := self._cache_max.get(definition.upstream)) is not None:
                    cache_max.add_metric([definition.upstream], max_bytes)
            elif definition.name.startswith(_QUOTA_SCOPE_PREFIX):
                prefix = [definition.name.removeprefix(_QUOTA_SCOPE_PREFIX)]
                used.add_metric(prefix, scope.bytes)
                tags.add_metric(prefix, scope.tags)
                if definition.max_bytes is not None:
                    limit.add_metric(prefix, definition.max_bytes)
                if definition.max_tags is not None:
                    tag_limit.add_metric(prefix, definition.max_tags)
            elif definition.name == CACHE_SCOPE:
                yield _gauge("entrepot_cache_total_used_bytes", "Bytes of all mirrored content.", scope.bytes)
        if self._total_cache_max is not None:
            yield _gauge("entrepot_cache_total_limit_bytes", "How large the cache may be.", self._total_cache_max)
        yield from (cache, cache_max, used, limit, tags, tag_limit)

    def _backlog_metrics(self, backlogs: Sequence[WebhookBacklog]) -> Iterator[Metric]:
        """Yields the numbers of events that wait for the webhooks in the settings."""
        labels = ["webhook"]
        pending = GaugeMetricFamily("entrepot_events_pending", "Events that wait for a webhook.", labels=labels)
        dead = GaugeMetricFamily("entrepot_events_dead_letters", "Events that were given up.", labels=labels)
        age = GaugeMetricFamily(
            "entrepot_events_oldest_pending_age_seconds",
            "Age of the oldest event that waits for a webhook, 0 if none waits.",
            labels=labels,
        )
        by_webhook = {backlog.webhook: backlog for backlog in backlogs}
        for webhook in self._webhooks:
            backlog = by_webhook.get(webhook, WebhookBacklog(webhook, 0, 0, None))
            pending.add_metric([webhook], backlog.pending)
            dead.add_metric([webhook], backlog.dead)
            age.add_metric([webhook], 0.0 if backlog.oldest is None else max(0.0, self._clock() - backlog.oldest))
        yield from (pending, dead, age)


def _content_metrics(figures: StoreFigures) -> Iterator[Metric]:
    yield _gauge("entrepot_repositories", "Repositories with a manifest.", figures.repositories)
    manifests_text = "Stored manifests. A manifest that is in two repositories counts twice."
    yield _gauge("entrepot_manifests", manifests_text, figures.manifests)
    yield _gauge("entrepot_tags", "Stored tags.", figures.tags)
    yield _gauge("entrepot_blobs", "Stored blobs.", figures.blobs)
    yield _gauge("entrepot_blob_bytes", "Bytes of stored blobs.", figures.blob_bytes)
    yield _gauge("entrepot_open_uploads", "Upload sessions that are not committed.", figures.uploads)
    damaged = GaugeMetricFamily("entrepot_damaged_items", "Damaged content that is not healed yet.", labels=["content"])
    damaged.add_metric(["blob"], figures.damaged_blobs)
    damaged.add_metric(["manifest"], figures.damaged_manifests)
    yield damaged
    jobs = GaugeMetricFamily("entrepot_jobs_running", "Jobs of upkeep that are running.", labels=["kind"])
    for kind, count in figures.running_jobs.items():
        jobs.add_metric([kind], count)
    yield jobs
    remaining = GaugeMetricFamily(
        "entrepot_upstream_remaining_requests",
        "Requests that the upstream still allows, as it has said in ratelimit-remaining within the last hour.",
        labels=["upstream"],
    )
    for upstream, count in figures.remaining_requests.items():
        remaining.add_metric([upstream], count)
    yield remaining


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
