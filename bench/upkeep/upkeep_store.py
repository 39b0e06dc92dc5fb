"""Fills a store with many blobs, half of them pushed and half of them mirrored. Later adds content to the store that a
garbage collection or a cache eviction then removes.

Each manifest has a tag and a layer of its own; all manifests share one config. The rows are inserted in bulk. A test
checks that they equal the rows that pushes and the mirror create. One difference remains: the queue of the garbage
collector is empty, as after a collection. The layers are small real files that are older than the collector's grace
period. Triggers of the database schema count the bytes of mirrored repositories. They need rows that a server with the
mirror's settings creates, so such a server must have served the directory before.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import apsw

from bench.errors import TrialFailed
from bench.growth.synthetic_store import repository_name
from bench.loaders.http_client import MANIFEST_TYPE
from bench.random_content import BlobContent, digest_of, make_blob, make_manifest
from storage.composition import layout_of
from storage.names import Digest

UPSTREAM = "hub.example"
TAGS_PER_REPOSITORY = 10
BATCH_REPOSITORIES = 1000
"""Number of repositories that are inserted in one transaction."""
LAYER_BYTES = 32
AGE_SECONDS = 30 * 86400.0
"""Age of all content that stays in the store. It is more than the collector's grace period."""
GARBAGE_AGE_SECONDS = 5 * 86400.0
"""Time since the last reference to the garbage was removed."""
STALE_AGE_SECONDS = 365 * 86400.0
"""Age of the images that are evicted, and time since their last pull. All other images were pulled later."""
CACHE_KIB = 512 * 1024
"""Size of SQLite's page cache."""
BUSY_MILLISECONDS = 30_000
CHECKPOINT_PAGES = 20_000
"""While a store is filled, SQLite copies the WAL into the database whenever the WAL has this many pages. A longer WAL
would slow down reads."""


@dataclass(frozen=True)
class StoreSize:
    """The size of a store, as the number of its blobs (layers). Each repository has TAGS_PER_REPOSITORY of them."""

    blobs: int

    @property
    def repositories(self) -> int:
        """Number of pushed repositories. The number of mirrored repositories is the same."""
        return self.blobs // (2 * TAGS_PER_REPOSITORY)


class StoreCounts(NamedTuple):
    """The numbers of rows in the tables of a store's database."""

    blobs: int
    manifests: int
    cached_manifests: int
    queued: int
    """Entries in the queue of the garbage collector."""
    mirrored_bytes: int
    """Size of all mirrored repositories according to the usage counters in the database."""


@dataclass(frozen=True)
class AddedContent:
    """Content that was added to a store so that a job can remove it."""

    digests: tuple[str, ...]
    """The digests of the added layers."""
    before: StoreCounts
    """The counts of the store before the content was added."""


def mirrored_name(number: int) -> str:
    return f"{UPSTREAM}/{repository_name(number)}"


def manifest_of_layer(config: BlobContent, layer: BlobContent) -> bytes:
    return make_manifest(config, (layer,))


def small_layer(seed: str) -> BlobContent:
    """Returns a layer of LAYER_BYTES bytes. Different seeds give different layers."""
    return make_blob(digest_of(seed.encode())[-LAYER_BYTES:].encode())


class UpkeepStore:
    """Changes the data directory of a server directly, without requests to the server."""

    def __init__(self, data: Path, size: StoreSize, config: BlobContent) -> None:
        """`config`: the config of all images. The blob must be in the directory already."""
        self._layout = layout_of(data)
        self.size, self._config = size, config

    def fill(self) -> None:
        """Inserts all repositories and their images. No server may use the directory meanwhile."""
        with self._connected() as db:
            db.pragma("synchronous", "OFF")  # the checkpoint at the end makes it durable
            db.wal_autocheckpoint(CHECKPOINT_PAGES)
            old = time.time() - AGE_SECONDS
            for first in range(0, self.size.repositories, BATCH_REPOSITORIES):
                numbers = range(first, min(first + BATCH_REPOSITORIES, self.size.repositories))
                with db:
                    inserter = _RowInserter(db, self._config, old)
                    for number in numbers:
                        for name, upstream in ((repository_name(number), ""), (mirrored_name(number), UPSTREAM)):
                            layers = [small_layer(f"{name}:{tag}") for tag in range(TAGS_PER_REPOSITORY)]
                            self._write_files(layers, old)
                            repository = inserter.add_repository(name)
                            inserter.add_images(repository, layers, "t", upstream)
            db.pragma("synchronous", "FULL")
            db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)

    def add_garbage(self, count: int) -> AddedContent:
        """Adds `count` blobs without references to pushed repositories all over the store. The database says that the
        last reference was removed long ago, so a garbage collection removes these blobs."""
        now, layers = time.time(), self._new_layers(count)
        with self._connected() as db:
            before = _read_counts(db)
            self._write_files(layers, now - AGE_SECONDS)
            with db:
                inserter = _RowInserter(db, self._config, now - AGE_SECONDS)
                for name, part in self._spread(layers, mirrored=False):
                    inserter.add_garbage(_repository_id(db, name), part, now - GARBAGE_AGE_SECONDS)
        return AddedContent(tuple(layer.digest for layer in layers), before)

    def add_stale_images(self, count: int) -> AddedContent:
        """Adds `count` images to mirrored repositories all over the store. Their last pull was before the last pull of
        all other images, so an eviction removes them first."""
        old, layers, mark = time.time() - STALE_AGE_SECONDS, self._new_layers(count), os.urandom(4).hex()
        with self._connected() as db:
            before = _read_counts(db)
            self._write_files(layers, old)
            with db:
                inserter = _RowInserter(db, self._config, old)
                for name, part in self._spread(layers, mirrored=True):
                    inserter.add_images(_repository_id(db, name), part, f"{mark}-", UPSTREAM)
        return AddedContent(tuple(layer.digest for layer in layers), before)

    def check_gone(self, added: AddedContent) -> None:
        """Raises TrialFailed unless the rows and files of all added content are removed, and nothing else is."""
        with self._connected() as db:
            after = _read_counts(db)
            sql = "SELECT count(*) FROM json_each(?) d JOIN blob b ON b.digest = d.value"
            rows = int(db.execute(sql, (json.dumps(added.digests),)).get)
        files = sum(self._layout.blob(Digest(digest)).exists() for digest in added.digests)
        if rows or files or after != added.before:
            raise TrialFailed(
                f"of {len(added.digests)} blobs that had to go, {rows} rows and {files} files are left; "
                f"the store held {added.before} before and holds {after} now"
            )

    def counts(self) -> StoreCounts:
        with self._connected() as db:
            return _read_counts(db)

    def wait_for_job(self, job: int, timeout: float) -> tuple[float, dict[str, Any]]:
        """Waits for the end of a job. Returns the seconds from its start to its end, and its result. The time in which
        the job was queued does not count. Reads the state of the job from the database, so that the server need not
        answer requests for it. Raises TrialFailed if the job fails, or does not end within `timeout` seconds."""
        deadline, started = time.monotonic() + timeout, 0.0
        with self._connected() as db:
            while True:
                sql = "SELECT state, ended, message, result FROM job WHERE id = ?"
                state, ended, message, result = db.execute(sql, (job,)).get
                if state != "queued" and not started:
                    started = time.time()
                if ended is not None:
                    break
                if time.monotonic() > deadline:
                    raise TrialFailed(f"job {job} did not end within {timeout:.0f} s")
                time.sleep(0.002)
        if state != "done":
            raise TrialFailed(f"job {job} ended as {state}: {message}")
        return float(ended) - started, json.loads(result)

    def _new_layers(self, count: int) -> list[BlobContent]:
        mark = os.urandom(8).hex()
        return [small_layer(f"{mark}:{number}") for number in range(count)]

    def _spread(self, layers: Sequence[BlobContent], *, mirrored: bool) -> Iterator[tuple[str, Sequence[BlobContent]]]:
        """Distributes the layers over repositories all over the store. Yields each repository's name and layers."""
        count = min(self.size.repositories, max(1, len(layers) // TAGS_PER_REPOSITORY))
        step = self.size.repositories // count
        for index in range(count):
            name = mirrored_name(index * step) if mirrored else repository_name(index * step)
            yield name, layers[index::count]

    def _write_files(self, layers: Sequence[BlobContent], changed: float) -> None:
        """Writes the files of the layers, with `changed` as their time of modification."""
        for layer in layers:
            assert isinstance(layer.content, bytes)
            file = os.open(self._layout.blob(Digest(layer.digest)), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
            try:
                os.write(file, layer.content)
                os.utime(file, (changed, changed))
            finally:
                os.close(file)

    @contextmanager
    def _connected(self) -> Iterator[apsw.Connection]:
        with closing(apsw.Connection(str(self._layout.metadata))) as db:
            db.set_busy_timeout(BUSY_MILLISECONDS)
            db.pragma("foreign_keys", True)
            db.pragma("wal_autocheckpoint", 0)  # the server checkpoints the WAL
            db.pragma("cache_size", -CACHE_KIB)
            yield db


def _read_counts(db: apsw.Connection) -> StoreCounts:
    def count(table: str) -> int:
        return int(db.execute(f"SELECT count(*) FROM {table}").get)

    size = int(db.execute("SELECT coalesce(sum(bytes), 0) FROM usage_scope WHERE name = 'cache'").get)
    return StoreCounts(count("blob"), count("manifest"), count("cached_manifest"), count("collect_queue"), size)


def _repository_id(db: apsw.Connection, name: str) -> int:
    return int(db.execute("SELECT id FROM repository WHERE name = ?", (name,)).get)


class _RowInserter:
    """Inserts the rows that a push or the mirror would insert, in the transaction of the caller. `at`: the timestamp of
    all rows."""

    def __init__(self, db: apsw.Connection, config: BlobContent, at: float) -> None:
        self._db, self._config, self._at = db, config, at
        self._config_id = int(db.execute("SELECT id FROM blob WHERE digest = ?", (config.digest,)).get)

    def add_repository(self, name: str) -> int:
        """Inserts a repository and links the config to it. Returns the row id of the repository."""
        sql = "INSERT INTO repository (name, created) VALUES (?, ?) RETURNING id"
        repository = int(self._db.execute(sql, (name, self._at)).get)
        self._add_links(repository, [self._config_id])
        return repository

    def add_garbage(self, repository: int, layers: Sequence[BlobContent], since: float) -> None:
        """Inserts blobs to which no manifest refers, and adds them to the garbage collector's queue with the timestamp
        `since`."""
        self._add_links(repository, self._add_blobs(layers))
        sql = "INSERT INTO collect_queue (repository, digest, since) VALUES (?, ?, ?)"
        self._db.executemany(sql, [(repository, layer.digest, since) for layer in layers])

    def add_images(self, repository: int, layers: Sequence[BlobContent], prefix: str, upstream: str) -> None:
        """Inserts an image with a tag for each layer. The tags are `prefix` followed by a number. `upstream`: the
        upstream of a mirrored repository; empty for a pushed repository."""
        insert, at, artifact_type = self._db.executemany, self._at, self._config.media_type
        self._add_links(repository, self._add_blobs(layers))
        bodies = [manifest_of_layer(self._config, layer) for layer in layers]
        digests = [digest_of(body) for body in bodies]
        sql = (
            "INSERT INTO manifest (repository, digest, media_type, size, artifact_type, pushed, body) "
            "VALUES (?, ?, ?, ?, ?, ?, ?) RETURNING id"
        )
        rows = [
            (repository, digest, MANIFEST_TYPE, len(body), artifact_type, at, body)
            for digest, body in zip(digests, bodies, strict=True)
        ]
        manifests = [int(row[0]) for row in insert(sql, rows)]
        sql = "INSERT INTO manifest_blob (repository, digest, manifest) VALUES (?, ?, ?)"
        insert(sql, [(repository, self._config.digest, manifest) for manifest in manifests])
        insert(sql, [(repository, layer.digest, each) for layer, each in zip(layers, manifests, strict=True)])
        self._db.execute("UPDATE repository SET manifests = manifests + ? WHERE id = ?", (len(manifests), repository))
        if upstream:
            sql = "INSERT INTO manifest_pull (manifest, upstream, last, pulls) VALUES (?, ?, ?, 0)"
            insert(sql, [(manifest, upstream, at) for manifest in manifests])
        tags = [(f"{prefix}{number}", *each) for number, each in enumerate(zip(manifests, digests, strict=True))]
        sql = "INSERT INTO tag (repository, name, manifest, updated) VALUES (?, ?, ?, ?)"
        insert(sql, [(repository, tag, manifest, at) for tag, manifest, _ in tags])
        sql = (
            "INSERT INTO tag_history (repository, tag, digest, at, actor, address, request_id, user_agent) "
            "VALUES (?, ?, ?, ?, 'anonymous', '127.0.0.1', '', 'bench')"
        )
        insert(sql, [(repository, tag, digest, at) for tag, _, digest in tags])

    def _add_blobs(self, layers: Sequence[BlobContent]) -> list[int]:
        """Inserts the rows of blobs and returns their row ids."""
        sql = "INSERT INTO blob (digest, size, place, created) VALUES (?, ?, ?, ?) RETURNING id"
        place = layout_of(Path()).blob_place
        rows = [(each.digest, each.size, place(Digest(each.digest)), self._at) for each in layers]
        return [int(row[0]) for row in self._db.executemany(sql, rows)]

    def _add_links(self, repository: int, blobs: Sequence[int]) -> None:
        sql = "INSERT INTO blob_link (repository, blob, needed, confirmed) VALUES (?, ?, ?, 1)"
        self._db.executemany(sql, [(repository, blob, self._at) for blob in blobs])
