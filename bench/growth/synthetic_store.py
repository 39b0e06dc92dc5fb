"""A store with many repositories, tags and manifests, whose rows are inserted in bulk.

Its blobs and one repository were pushed through the API before. The inserted rows equal those that pushes create, which
a test checks; only the queue of the garbage collector is empty, as after a collection.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import apsw

from bench.loaders.http_client import MANIFEST_TYPE
from bench.random_content import BlobContent, digest_of, make_manifest
from storage.composition import layout_of

TAGS_PER_REPOSITORY = 10
"""Tags in a repository, each with a manifest of its own."""
MANY_TAGS_REPO = "many/tags"
MIN_MANY_TAGS = 200
BATCH_REPOSITORIES = 2000
"""Repositories in one transaction."""


@dataclass(frozen=True)
class StoreSize:
    """The size of a store: `manifests` in repositories of ten, and one more repository with many tags."""

    manifests: int

    @property
    def repositories(self) -> int:
        return self.manifests // TAGS_PER_REPOSITORY

    @property
    def many(self) -> int:
        """Tags of the repository with many: a tenth of the manifests, but enough for a page of 100 in every store."""
        return max(MIN_MANY_TAGS, self.manifests // 10)


@dataclass(frozen=True)
class PushedManifest:
    """A manifest, its digest, and the tag that points to it."""

    tag: str
    digest: str
    body: bytes


def manifest_of_tag(repo: str, tag: str, config: BlobContent, layers: tuple[BlobContent, ...]) -> PushedManifest:
    """Returns the manifest of one tag, which differs from all others by its note."""
    body = make_manifest(config, layers, f"{repo}:{tag}")
    return PushedManifest(tag, digest_of(body), body)


def repository_name(number: int) -> str:
    return f"r/{number:06d}"


def fill_store(data: Path, size: StoreSize, config: BlobContent, layers: tuple[BlobContent, ...]) -> None:
    """Inserts the rows into a data directory that has the blobs and that no server uses. The schema is that of the
    version which created the directory."""
    db = apsw.Connection(str(layout_of(data).metadata))
    try:
        db.pragma("synchronous", "OFF")  # the checkpoint at the end makes it durable
        writer = _Rows(db, config, layers, time.time())
        names = iter(range(size.repositories))
        while batch := list(islice(names, BATCH_REPOSITORIES)):
            with db:
                for number in batch:
                    writer.add(repository_name(number), (f"t{tag}" for tag in range(TAGS_PER_REPOSITORY)))
        with db:
            writer.add(MANY_TAGS_REPO, (f"t{tag:07d}" for tag in range(size.many)))
        db.pragma("synchronous", "FULL")
        db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    finally:
        db.close()


class _Rows:
    """Inserts the rows of a push of each manifest, after mounts of the blobs."""

    def __init__(self, db: apsw.Connection, config: BlobContent, layers: tuple[BlobContent, ...], now: float) -> None:
        self._db, self._config, self._layers, self._now = db, config, layers, now
        self._blobs = [blob.digest for blob in (config, *layers)]
        self._numbers = [db.execute("SELECT id FROM blob WHERE digest = ?", (digest,)).get for digest in self._blobs]
        self._next = int(db.execute("SELECT coalesce(max(id), 0) FROM manifest").get)

    def add(self, repo: str, tags: Iterator[str]) -> None:
        """Inserts a repository with those tags."""
        pushed = [manifest_of_tag(repo, tag, self._config, self._layers) for tag in tags]
        number = self._db.execute(
            "INSERT INTO repository (name, created, manifests) VALUES (?, ?, ?) RETURNING id",
            (repo, self._now, len(pushed)),
        ).get
        first = self._next + 1
        self._next += len(pushed)
        numbered = list(enumerate(pushed, first))
        self._db.executemany(
            "INSERT INTO blob_link (repository, blob, needed) VALUES (?, ?, ?)",
            [(number, blob, self._now) for blob in self._numbers],
        )
        self._add_manifests(number, repo, numbered)
        self._add_tags(number, numbered)

    def _add_manifests(self, repository: int, repo: str, pushed: list[tuple[int, PushedManifest]]) -> None:
        media_type = self._config.media_type
        self._db.executemany(
            "INSERT INTO manifest (id, repository, digest, media_type, size, artifact_type, annotations, pushed, body) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    number,
                    repository,
                    one.digest,
                    MANIFEST_TYPE,
                    len(one.body),
                    media_type,
                    json.dumps({"org.example.note": f"{repo}:{one.tag}"}, separators=(",", ":")),
                    self._now,
                    one.body,
                )
                for number, one in pushed
            ],
        )
        self._db.executemany(
            "INSERT INTO manifest_blob (repository, digest, manifest) VALUES (?, ?, ?)",
            ((repository, digest, number) for digest in sorted(self._blobs) for number, _ in pushed),
        )

    def _add_tags(self, repository: int, pushed: list[tuple[int, PushedManifest]]) -> None:
        self._db.executemany(
            "INSERT INTO tag (repository, name, manifest, updated) VALUES (?, ?, ?, ?)",
            ((repository, one.tag, number, self._now) for number, one in pushed),
        )
        self._db.executemany(
            "INSERT INTO tag_history (repository, tag, digest, at, actor, address, request_id, user_agent) "
            "VALUES (?, ?, ?, ?, 'anonymous', '127.0.0.1', '', 'bench')",
            ((repository, one.tag, one.digest, self._now) for _, one in pushed),
        )
