"""A store with many blobs, half of them pushed and half of them mirrored, and what upkeep removes from it.

Each manifest has a tag and a layer of its own; all share one config. The rows are inserted in bulk and equal those that
pushes and the mirror create, which a test checks; only the queue of the garbage collector is empty, as after a
collection. The layers are real files, small, and older than the collector's grace period. The triggers of the schema
count what the mirrored repositories use, so a server with the mirror's settings must have served the directory before.
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
"""Repositories in one transaction."""
LAYER_BYTES = 32
AGE_SECONDS = 30 * 86400.0
"""Age of all content. It is more than the collector's grace period."""
GARBAGE_AGE_SECONDS = 5 * 86400.0
"""How long ago the last reference to the garbage was removed."""
STALE_AGE_SECONDS = 365 * 86400.0
"""Age of the images that are evicted, and time since their last pull. No other image was not pulled for so long."""
CACHE_KIB = 512 * 1024
BUSY_MILLISECONDS = 30_000
CHECKPOINT_PAGES = 20_000
"""Pages in the WAL after which it is copied into the database while a store is filled. A long WAL slows down reads."""


@dataclass(frozen=True)
class BlobCount:
    """The size of a store: so many layers, in repositories of ten."""

    blobs: int

    @property
    def repositories(self) -> int:
        """Number of pushed repositories; there are as many mirrored ones."""
        return self.blobs // (2 * TAGS_PER_REPOSITORY)


class StoreCounts(NamedTuple):
    """How much a store holds, from its tables."""

    blobs: int
    manifests: int
    cached_manifests: int
    queued: int
    mirrored_bytes: int
    """Bytes that the counters of use have for all mirrored repositories."""


@dataclass(frozen=True)
class AddedContent:
    """Blobs that were added to a store to be removed, and the store before that."""

    digests: tuple[str, ...]
    before: StoreCounts


def mirrored_name(number: int) -> str:
    return f"{UPSTREAM}/{repository_name(number)}"


def manifest_of_layer(config: BlobContent, layer: BlobContent) -> bytes:
    return make_manifest(config, (layer,))


def small_layer(seed: str) -> BlobContent:
    """Returns a layer of LAYER_BYTES that only this seed has."""
    return make_blob(digest_of(seed.encode())[-LAYER_BYTES:].encode())


class UpkeepStore:
    """The data directory of a server, changed beside it."""

    def __init__(self, data: Path, size: BlobCount, config: BlobContent) -> None:
        """The directory has the blob `config`."""
        self._layout = layout_of(data)
        self.size, self._config = size, config

    def fill(self) -> None:
        """Inserts all repositories. No server may use the directory."""
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
        """Adds blobs to which no manifest has referred for a long time, to pushed repositories all over the store."""
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
        """Adds images that were not pulled for longer than all others, to mirrored repositories all over the store."""
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
        """Raises TrialFailed unless all that was added is gone, rows and files, and nothing else."""
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
        """Waits for the end of a job. Returns the seconds from its start to its end, without the time in which it was
        queued, and its result. Reads the database, which costs the server nothing. Raises TrialFailed if the job does
        not end well and in time."""
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
        """Yields repositories all over the store, each with its part of the layers."""
        places = min(self.size.repositories, max(1, len(layers) // TAGS_PER_REPOSITORY))
        step = self.size.repositories // places
        for place in range(places):
            name = mirrored_name(place * step) if mirrored else repository_name(place * step)
            yield name, layers[place::places]

    def _write_files(self, layers: Sequence[BlobContent], changed: float) -> None:
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
            db.pragma("wal_autocheckpoint", 0)  # the server does it
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
    """Inserts rows as a push and the mirror do, in the transaction of the caller. `at`: the time in all rows."""

    def __init__(self, db: apsw.Connection, config: BlobContent, at: float) -> None:
        self._db, self._config, self._at = db, config, at
        self._config_id = int(db.execute("SELECT id FROM blob WHERE digest = ?", (config.digest,)).get)

    def add_repository(self, name: str) -> int:
        """Inserts a repository that has the config, and returns its row id."""
        sql = "INSERT INTO repository (name, created) VALUES (?, ?) RETURNING id"
        repository = int(self._db.execute(sql, (name, self._at)).get)
        self._add_links(repository, [self._config_id])
        return repository

    def add_garbage(self, repository: int, layers: Sequence[BlobContent], since: float) -> None:
        """Inserts blobs to which no manifest refers, and queues them as of the time `since`."""
        self._add_links(repository, self._add_blobs(layers))
        sql = "INSERT INTO collect_queue (repository, digest, since) VALUES (?, ?, ?)"
        self._db.executemany(sql, [(repository, layer.digest, since) for layer in layers])

    def add_images(self, repository: int, layers: Sequence[BlobContent], prefix: str, upstream: str) -> None:
        """Inserts an image for each layer, with the tags `prefix` and a number."""
        insert, at, kind = self._db.executemany, self._at, self._config.media_type
        self._add_links(repository, self._add_blobs(layers))
        bodies = [manifest_of_layer(self._config, layer) for layer in layers]
        digests = [digest_of(body) for body in bodies]
        sql = (
            "INSERT INTO manifest (repository, digest, media_type, size, artifact_type, pushed, body) "
            "VALUES (?, ?, ?, ?, ?, ?, ?) RETURNING id"
        )
        rows = [
            (repository, digest, MANIFEST_TYPE, len(body), kind, at, body)
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
