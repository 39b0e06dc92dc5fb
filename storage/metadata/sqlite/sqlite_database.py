"""Opens the connections of one process to the metadata database, and makes the stores that use them
(`SqliteDatabase`)."""

from __future__ import annotations

from collections.abc import Callable

from storage.data_dir.layout import Layout
from storage.data_dir.replaced_directory import OpenedDirectory
from storage.data_dir.reserve import Reserve
from storage.data_dir.system import System
from storage.metadata.catalog import UNOBSERVED_COMMITS, CommitObserver
from storage.metadata.sqlite.access.sqlite_accounts import SqliteAccounts
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.cross_process_change_counter import open_data_version
from storage.metadata.sqlite.database import connect
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.lookup_cache import LookupCache
from storage.metadata.sqlite.read_transaction import SharedReadTransaction
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.metadata.sqlite.search.sqlite_search import SqliteSearch
from storage.metadata.sqlite.sqlite_descriptions import SqliteDescriptions
from storage.metadata.sqlite.sqlite_metadata import SqliteMetadata
from storage.metadata.sqlite.sqlite_tag_listing import SqliteTagListing
from storage.metadata.sqlite.sqlite_upstream_records import SqliteUpstreamRecords
from storage.metadata.sqlite.upkeep.sqlite_activity import SqliteActivityLog
from storage.metadata.sqlite.upkeep.sqlite_cached_images import SqliteCachedImages
from storage.metadata.sqlite.upkeep.sqlite_consistency import SqliteConsistency
from storage.metadata.sqlite.upkeep.sqlite_damage import SqliteDamageRecords
from storage.metadata.sqlite.upkeep.sqlite_import_records import SqliteImportRecords
from storage.metadata.sqlite.upkeep.sqlite_jobs import SqliteJobs
from storage.metadata.sqlite.upkeep.sqlite_outbox import SqliteOutbox
from storage.metadata.sqlite.upkeep.sqlite_pulls import SqlitePulls
from storage.metadata.sqlite.upkeep.sqlite_retention import SqliteRetention
from storage.metadata.sqlite.upkeep.sqlite_snapshots import SqliteSnapshots
from storage.metadata.sqlite.upkeep.sqlite_tag_history import SqliteTagHistory
from storage.metadata.sqlite.upkeep.sqlite_tag_removals import SqliteTagRemovalPlanner
from storage.metadata.sqlite.upkeep.sqlite_upstream_tags import SqliteUpstreamTags
from storage.metadata.sqlite.upkeep.sqlite_usage import SqliteUsage


class SqliteDatabase:
    """The connections of one process to the metadata database, and the stores that use them. Each process makes a
    `SqliteDatabase` after it was forked, because SQLite connections must not be used across a fork. Used from one event
    loop.

    - `metadata` stores repositories, manifests, tags, blobs and upload sessions.
    - `records` stores what the mirror learned from its upstream registries: which content they have, which of their
      endpoints sent wrong bytes, and their tokens and rate limits. `upstream_tags` stores the tags of these registries
      over time.
    - `accounts` stores accounts and rights.
    - `jobs` stores the jobs of upkeep. `consistency` checks and repairs the whole store, and `damage` stores which
      content is damaged.
    - `snapshots` copies the database. `imports` records which images were imported from other registries.
    - `tag_history` reads the history of tags, and puts deleted manifests back. `tag_listing` lists tags with facts
      about their images, and `tag_removals` previews removals of tags.
    - `pulls` stores when manifests were last pulled, and `retention` finds and deletes tags and manifests that no
      retention rule keeps.
    - `usage` counts the blobs, bytes and tags of sets of repositories. `cached_images` finds and evicts mirrored
      images.
    - `descriptions` stores texts that people write about repositories. `activity` counts the pulls and pushes of each
      hour.
    - `outbox` stores events until the webhooks have received them.
    - `search` finds content, and keeps the search index up to date.
    - `immutable` is None if the database was opened normally. If the disk was too full for this, `immutable` is the
      read-only connection that all stores use.
    """

    def __init__(
        self,
        layout: Layout,
        system: System,
        clock: Callable[[], float],
        reserve: Reserve,
        *,
        immutable: ImmutableDatabase | None = None,
        observer: CommitObserver = UNOBSERVED_COMMITS,
        directory: OpenedDirectory | None = None,
    ) -> None:
        """Raises apsw.FullError if the disk has no space to open the database. Raises another apsw.Error, or OSError,
        if the database cannot be opened for another reason.

        - `layout` has the paths of the data directory, and `system` makes the system calls on its files.
        - `clock` returns the time in seconds since 1970.
        - `reserve` is disk space that the registry keeps allocated. Changes may use it when the disk is full.
        - `immutable`: None to open the database normally. Otherwise all stores read with this connection and refuse
          changes, and `close` closes the connection.
        - `observer` measures the changes.
        - `directory` identifies the data directory of this process. None means the directory that is at the path of
          `layout` now. Once another directory is at this path, all changes are refused."""
        # Identify the directory before the database is opened, to notice a replacement between these two steps.
        directory = directory or OpenedDirectory(layout)
        self._db = immutable.db if immutable else connect(layout.metadata, read_only=True)
        # A call of `data_version` returns a value that changes with every commit to the database.
        data_version = immutable or open_data_version(self._db, lambda: connect(layout.metadata, read_only=True))
        shared_reads = immutable or SharedReadTransaction(layout.metadata)
        # A `ScanThread` runs one long lookup at a time. Checks, searches, lists and deliveries have threads of their
        # own. All other long lookups share `scans`.
        scans = ImmutableScans(immutable) if immutable else ScanThread(layout.metadata)
        writer = immutable or CommitThread(layout, system, data_version, reserve, observer, directory)
        checks = ImmutableScans(immutable) if immutable else ScanThread(layout.metadata)
        searches = ImmutableScans(immutable) if immutable else ScanThread(layout.metadata)
        # Reads the lists of tags and jobs that people see.
        lists = ImmutableScans(immutable) if immutable else ScanThread(layout.metadata)
        # Reads the events to deliver to webhooks.
        deliveries = ImmutableScans(immutable) if immutable else ScanThread(layout.metadata)
        # The readers close before the writer: the writer empties SQLite's write-ahead log when it closes, and cannot
        # empty a log that a reader uses. `data_version` closes after the writer, which uses it.
        self._parts_in_closing_order = scans, checks, searches, lists, deliveries, shared_reads, writer, data_version
        self.immutable = immutable
        cache = LookupCache(data_version, shared_reads, scans)
        self.metadata = SqliteMetadata(self._db, data_version, cache, scans, writer, clock)
        self.records = SqliteUpstreamRecords(self._db, cache, writer, clock)
        self.accounts = SqliteAccounts(self._db, writer, clock, data_version, scans)
        self.jobs = SqliteJobs(self._db, writer, lists, clock, data_version)
        self.upstream_tags = SqliteUpstreamTags(self._db, cache, writer, clock, scans)
        self.tag_history = SqliteTagHistory(scans, writer, clock)
        self.tag_listing = SqliteTagListing(lists)
        self.tag_removals = SqliteTagRemovalPlanner(lists)
        self.usage = SqliteUsage(self._db, writer, scans)
        self.cached_images = SqliteCachedImages(writer, scans, clock)
        self.pulls = SqlitePulls(self._db, writer)
        self.retention = SqliteRetention(writer, scans, clock)
        self.consistency = SqliteConsistency(checks, writer, clock)
        self.damage = SqliteDamageRecords(self._db, writer, scans, clock)
        self.snapshots = SqliteSnapshots(layout.metadata, clock, system=system)
        self.imports = SqliteImportRecords(self._db, writer, scans, clock)
        self.descriptions = SqliteDescriptions(self._db, writer, clock)
        self.activity = SqliteActivityLog(self._db, writer)
        self.outbox = SqliteOutbox(self._db, writer, scans, deliveries, clock)
        self.search = SqliteSearch(self._db, writer, searches, data_version)

    def close(self) -> None:
        """Waits until the queued changes are made, then closes all connections."""
        if self.immutable is not None:
            self.immutable.close()
            return
        for part in self._parts_in_closing_order:
            part.close()
        # A call of `data_version` reads memory that SQLite may unmap when this connection closes. So the loop above
        # closes `data_version` first.
        self._db.close()
