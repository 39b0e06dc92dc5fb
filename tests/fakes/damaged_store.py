"""A store with content of every kind, and functions that damage it. Each function damages the store in one way that the
consistency check must find."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

from storage.content import Manifest, digest_of
from storage.names import Digest, RepositoryName
from storage.store.stored_registry import StoredRegistry

APP, OTHER = RepositoryName("team/app"), RepositoryName("team/other")
LAYER = b"layer of image"
MAX_LOOP_SECONDS = 0.05
"""Longest time for which a check may block the event loop."""


@dataclass
class Site:
    """A store with an image, an index of two images, and a referrer of the image. `db`: a connection to the database,
    with which tests change rows."""

    store: StoredRegistry
    data: Path
    db: apsw.Connection
    image: Manifest
    index: Manifest
    children: list[Manifest]

    def file(self, digest: Digest) -> Path:
        return self.data / "blobs" / digest.algorithm / digest.encoded[:2] / digest.encoded

    def run(self, sql: str, *parameters: Any) -> Any:
        return self.db.execute(sql, parameters).get

    def manifest_id(self, manifest: Manifest) -> Any:
        return self.run("SELECT id FROM manifest WHERE repository = 1 AND digest = ?", manifest.digest)

    def rows(self) -> dict[str, list[Any]]:
        """Returns the content of all tables."""
        schema: list[Any] = self.db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
        tables = [name for (name,) in schema]
        return {
            name: sorted(map(str, self.db.execute(f"SELECT * FROM {name}").fetchall()))
            for name in tables
            if not name.startswith("sqlite_")
        }


def lose_file(site: Site) -> None:
    site.file(digest_of(LAYER)).unlink()


def cut_file(site: Site) -> None:
    os.truncate(site.file(digest_of(LAYER)), 3)


def wrong_size(site: Site) -> None:
    site.run("UPDATE blob SET size = size + 1 WHERE digest = ?", digest_of(LAYER))


def flip_byte(site: Site) -> None:
    site.file(digest_of(LAYER)).write_bytes(b"X" + LAYER[1:])


def lose_place(site: Site) -> None:
    site.run("UPDATE blob SET place = '' WHERE digest = ?", digest_of(LAYER))


def leave_stray(site: Site) -> None:
    path = site.file(digest_of(b"bytes without a row"))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"bytes without a row")
    os.utime(path, (time.time() - 61, time.time() - 61))


def lose_queued_link(site: Site) -> None:
    site.run("DELETE FROM collect_queue WHERE repository = (SELECT id FROM repository WHERE name = ?)", OTHER)


def lose_queued_blob(site: Site) -> None:
    site.run("INSERT INTO blob VALUES (99, ?, 1, ?, 0)", digest_of(b"a"), f"blobs/sha256/{'c' * 64}")
    site.run("UPDATE blob SET place = (SELECT place FROM blob WHERE digest = ?), size = ? WHERE id = 99",
             digest_of(LAYER), len(LAYER))  # fmt: skip


def lose_linked_blob(site: Site) -> None:
    site.run("INSERT INTO blob_link VALUES (1, 9999, 0, 1)")


def lose_linked_repository(site: Site) -> None:
    site.run("INSERT INTO blob_link VALUES (9999, 1, 0, 1)")


def lose_link(site: Site) -> None:
    site.run("DELETE FROM blob_link WHERE repository = 1 AND blob = (SELECT id FROM blob WHERE digest = ?)",
             digest_of(LAYER))  # fmt: skip


def wrong_count(site: Site) -> None:
    site.run("UPDATE repository SET manifests = 77 WHERE name = ?", APP)


def lose_tagged_manifest(site: Site) -> None:
    site.run("UPDATE tag SET manifest = 9999 WHERE name = 'latest'")


def tag_of_other_repository(site: Site) -> None:
    site.run("INSERT INTO manifest (repository, digest, media_type, size, pushed, body) SELECT r.id, m.digest, "
             "m.media_type, m.size, 0, m.body FROM repository r, manifest m WHERE r.name = ? AND m.digest = ?",
             OTHER, site.children[0].digest)  # fmt: skip
    manifest = site.db.last_insert_rowid()
    site.run("INSERT INTO manifest_blob SELECT m.repository, p.digest, m.id FROM manifest m, manifest_blob p "
             "WHERE m.id = ? AND p.manifest = ?", manifest, site.manifest_id(site.children[0]))  # fmt: skip
    site.run("INSERT OR IGNORE INTO blob_link SELECT m.repository, b.id, 0, 1 FROM manifest m, manifest_blob p "
             "JOIN blob b ON b.digest = p.digest WHERE m.id = ? AND p.manifest = m.id", manifest)  # fmt: skip
    site.run("UPDATE repository SET manifests = 1 WHERE name = ?", OTHER)
    site.run("UPDATE tag SET manifest = ? WHERE name = 'latest'", manifest)


def lose_reference(site: Site) -> None:
    site.run("DELETE FROM manifest_blob WHERE manifest = ?", site.manifest_id(site.image))


def lose_child_reference(site: Site) -> None:
    site.run("DELETE FROM manifest_child WHERE manifest = ?", site.manifest_id(site.index))


def wrong_reference(site: Site) -> None:
    site.run("INSERT INTO manifest_blob VALUES (1, ?, ?)", digest_of(b"b"), site.manifest_id(site.image))


def reference_of_nothing(site: Site) -> None:
    site.run("INSERT INTO manifest_child VALUES (1, ?, 9999)", digest_of(b"b"))


def rot_manifest(site: Site) -> None:
    site.run("UPDATE manifest SET body = X'7b7d' WHERE id = ?", site.manifest_id(site.image))


def wrong_fields(site: Site) -> None:
    site.run("UPDATE manifest SET size = 1, subject = NULL WHERE subject IS NOT NULL")


def wrong_usage_links(site: Site) -> None:
    count_usage(site)
    site.run("UPDATE usage_blob SET links = 5 WHERE links = 2")


def wrong_usage_totals(site: Site) -> None:
    count_usage(site)
    site.run("UPDATE usage_scope SET bytes = bytes + 1, tags = 0")


def count_usage(site: Site) -> None:
    """Inserts the rows with the counts of a usage scope, as the code that maintains these counts would."""
    site.run("INSERT INTO usage_scope (id, name, prefixes, excluded, complete, blobs) VALUES "
             "(1, 'quota', '[\"team/\"]', '[]', 1, 0), (2, 'uncounted', '[\"team/\"]', '[]', 0, 7)")  # fmt: skip
    site.run("INSERT INTO usage_member (repository, scope) SELECT id, 1 FROM repository")
    site.run("INSERT INTO usage_blob SELECT 1, b.id, b.size, count(*) FROM blob b JOIN blob_link l ON l.blob = b.id "
             "GROUP BY b.id")  # fmt: skip
    site.run("UPDATE usage_scope SET tags = 2, max_bytes = bytes - 1 WHERE id = 1")
