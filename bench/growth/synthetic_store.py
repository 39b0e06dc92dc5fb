"""Fills a store with many repositories, tags and manifests by inserting rows in bulk.

The blobs and one repository must have been pushed through the API before. A test checks that the inserted rows equal
those that pushes create. One difference remains: the queue of the garbage collector is empty, as after a collection.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import apsw

from bench.loaders.http_client import MANIFEST_TYPE
from bench.random_content import BlobContent, digest_of, make_manifest
from storage.composition import layout_of

TAGS_PER_REPOSITORY = 10
"""Number of tags in a repository. Each tag has a manifest of its own."""
MANY_TAGS_REPO = "many/tags"
MIN_MANY_TAGS = 200
"""Least number of tags in MANY_TAGS_REPO."""
BATCH_REPOSITORIES = 2000
"""Number of repositories that are inserted in one transaction."""


@dataclass(frozen=True)
class StoreSize:
    """The size of a store: `manifests` in repositories with ten tags each, and MANY_TAGS_REPO in addition."""

    manifests: int

    @property
    def repositories(self) -> int:
        return self.manifests // TAGS_PER_REPOSITORY

    @property
    def many(self) -> int:
        """Number of tags in MANY_TAGS_REPO: a tenth of `manifests`, but enough for a page of 100 in every store."""
        return max(MIN_MANY_TAGS, self.manifests // 10)


class PushedManifest(NamedTuple):
    """A manifest and the tag that points to it."""

    tag: str
    digest: str
    body: bytes
    annotations: str
    """The annotations as the metadata database stores them."""


def manifest_of_tag(repo: str, tag: str, config: BlobContent, layers: tuple[BlobContent, ...]) -> PushedManifest:
    """Returns the manifest of one tag. Its annotation names the tag, so it differs from all other manifests."""
    body = make_manifest(config, layers, f"{repo}:{tag}")
    annotations = json.dumps({"org.example.note": f"{repo}:{tag}"}, separators=(",", ":"))
    return PushedManifest(tag, digest_of(body), body, annotations)


def repository_name(number: int) -> str:
    return f"r/{number:06d}"


def fill_store(data: Path, size: StoreSize, config: BlobContent, layers: tuple[BlobContent, ...]) -> None:
    """Inserts the rows into the data directory `data`. The directory must have the blobs, and no server may use it. The
    database has the schema of the Entrepot version that created the directory."""
    db = apsw.Connection(str(layout_of(data).metadata))
    try:
        db.pragma("synchronous", "OFF")  # the checkpoint at the end makes it durable
        inserter = _RowInserter(db, config, layers, time.time())
        for first in range(0, size.repositories, BATCH_REPOSITORIES):
            with db:
                for number in range(first, min(first + BATCH_REPOSITORIES, size.repositories)):
                    inserter.add(repository_name(number), [f"t{tag}" for tag in range(TAGS_PER_REPOSITORY)])
        with db:
            inserter.add(MANY_TAGS_REPO, [f"t{tag:07d}" for tag in range(size.many)])
        db.pragma("synchronous", "FULL")
        db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    finally:
        db.close()


class _RowInserter:
    """Inserts the rows that a client would create if it mounted the blobs and then pushed each manifest."""

    def __init__(self, db: apsw.Connection, config: BlobContent, layers: tuple[BlobContent, ...], now: float) -> None:
        self._db, self._config, self._layers, self._now = db, config, layers, now
        self._blobs = [blob.digest for blob in (config, *layers)]
        self._blob_ids = [db.execute("SELECT id FROM blob WHERE digest = ?", (digest,)).get for digest in self._blobs]
        self._next_id = int(db.execute("SELECT coalesce(max(id), 0) FROM manifest").get) + 1

    def add(self, name: str, tags: Sequence[str]) -> None:
        """Inserts the repository `name` with `tags`, and a manifest for each tag."""
        insert, now, artifact_type = self._db.executemany, self._now, self._config.media_type
        pushed = [manifest_of_tag(name, tag, self._config, self._layers) for tag in tags]
        sql = "INSERT INTO repository (name, created, manifests) VALUES (?, ?, ?) RETURNING id"
        repo = self._db.execute(sql, (name, now, len(pushed))).get
        rows = list(enumerate(pushed, self._next_id))
        self._next_id += len(rows)
        sql = "INSERT INTO blob_link (repository, blob, needed) VALUES (?, ?, ?)"
        insert(sql, [(repo, blob, now) for blob in self._blob_ids])
        sql = (
            "INSERT INTO manifest (id, repository, digest, media_type, size, artifact_type, annotations, pushed, body) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
        )
        insert(
            sql,
            [
                (id_, repo, each.digest, MANIFEST_TYPE, len(each.body), artifact_type, each.annotations, now, each.body)
                for id_, each in rows
            ],
        )
        sql = "INSERT INTO manifest_blob (repository, digest, manifest) VALUES (?, ?, ?)"
        insert(sql, [(repo, digest, number) for digest in sorted(self._blobs) for number, _ in rows])
        sql = "INSERT INTO tag (repository, name, manifest, updated) VALUES (?, ?, ?, ?)"
        insert(sql, [(repo, each.tag, number, now) for number, each in rows])
        sql = (
            "INSERT INTO tag_history (repository, tag, digest, at, actor, address, request_id, user_agent) "
            "VALUES (?, ?, ?, ?, 'anonymous', '127.0.0.1', '', 'bench')"
        )
        insert(sql, [(repo, each.tag, each.digest, now) for _, each in rows])
