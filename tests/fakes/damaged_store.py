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
class DamagedStore:
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


def lose_file(site: DamagedStore) -> None:
    """Deletes the file of a blob."""
    site.file(digest_of(LAYER)).unlink()


def cut_file(site: DamagedStore) -> None:
    """Truncates the file of a blob."""
    os.truncate(site.file(digest_of(LAYER)), 3)


def wrong_size(site: DamagedStore) -> None:
    """Changes the size in the row of a blob."""
    site.run("UPDATE blob SET size = size + 1 WHERE digest = ?", digest_of(LAYER))


def flip_byte(site: DamagedStore) -> None:
    """Changes a byte in the file of a blob."""
    site.file(digest_of(LAYER)).write_bytes(b"X" + LAYER[1:])


def lose_place(site: DamagedStore) -> None:
    """Empties the path of the file in the row of a blob."""
    site.run("UPDATE blob SET place = '' WHERE digest = ?", digest_of(LAYER))


def leave_stray(site: DamagedStore) -> None:
    """Writes the file of a blob that has no row."""
    path = site.file(digest_of(b"bytes without a row"))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"bytes without a row")
    changed = time.time() - 61  # the check skips files that are younger than a minute
    os.utime(path, (changed, changed))


def lose_queued_link(site: DamagedStore) -> None:
    """Removes the blobs of a repository from the queue of the garbage collector."""
    site.run("DELETE FROM collect_queue WHERE repository = (SELECT id FROM repository WHERE name = ?)", OTHER)


def lose_queued_blob(site: DamagedStore) -> None:
    """Inserts the row of a blob that is in no repository and not in the queue of the garbage collector."""
    site.run("INSERT INTO blob VALUES (99, ?, 1, ?, 0)", digest_of(b"a"), f"blobs/sha256/{'c' * 64}")
    # Refers to an existing file, so that only the entry in the queue is missing.
    site.run("UPDATE blob SET place = (SELECT place FROM blob WHERE digest = ?), size = ? WHERE id = 99",
             digest_of(LAYER), len(LAYER))  # fmt: skip


def lose_linked_blob(site: DamagedStore) -> None:
    """Inserts a link from a repository to a blob that does not exist."""
    site.run("INSERT INTO blob_link VALUES (1, 9999, 0, 1)")


def lose_linked_repository(site: DamagedStore) -> None:
    """Inserts a link from a repository that does not exist."""
    site.run("INSERT INTO blob_link VALUES (9999, 1, 0, 1)")


def lose_link(site: DamagedStore) -> None:
    """Deletes the link from a repository to a blob to which its manifests refer."""
    site.run("DELETE FROM blob_link WHERE repository = 1 AND blob = (SELECT id FROM blob WHERE digest = ?)",
             digest_of(LAYER))  # fmt: skip


def wrong_count(site: DamagedStore) -> None:
    """Changes the number of manifests in the row of a repository."""
    site.run("UPDATE repository SET manifests = 77 WHERE name = ?", APP)


def lose_tagged_manifest(site: DamagedStore) -> None:
    """Makes a tag point at a manifest that does not exist."""
    site.run("UPDATE tag SET manifest = 9999 WHERE name = 'latest'")


def tag_of_other_repository(site: DamagedStore) -> None:
    """Makes a tag point at a manifest of another repository."""
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


def lose_reference(site: DamagedStore) -> None:
    """Deletes the references from a manifest to its blobs."""
    site.run("DELETE FROM manifest_blob WHERE manifest = ?", site.manifest_id(site.image))


def lose_child_reference(site: DamagedStore) -> None:
    """Deletes the references from an index to its manifests."""
    site.run("DELETE FROM manifest_child WHERE manifest = ?", site.manifest_id(site.index))


def wrong_reference(site: DamagedStore) -> None:
    """Inserts a reference from a manifest to a blob that its bytes do not name."""
    site.run("INSERT INTO manifest_blob VALUES (1, ?, ?)", digest_of(b"b"), site.manifest_id(site.image))


def reference_of_nothing(site: DamagedStore) -> None:
    """Inserts a reference from a manifest that does not exist."""
    site.run("INSERT INTO manifest_child VALUES (1, ?, 9999)", digest_of(b"b"))


def rot_manifest(site: DamagedStore) -> None:
    """Changes the bytes of a manifest."""
    site.run("UPDATE manifest SET body = X'7b7d' WHERE id = ?", site.manifest_id(site.image))


def wrong_fields(site: DamagedStore) -> None:
    """Changes the size and the subject in the row of a manifest."""
    site.run("UPDATE manifest SET size = 1, subject = NULL WHERE subject IS NOT NULL")


def wrong_usage_links(site: DamagedStore) -> None:
    """Changes the number of links to a blob in the usage counts."""
    count_usage(site)
    site.run("UPDATE usage_blob SET links = 5 WHERE links = 2")


def wrong_usage_totals(site: DamagedStore) -> None:
    """Changes the bytes and the number of tags in the usage counts."""
    count_usage(site)
    site.run("UPDATE usage_scope SET bytes = bytes + 1, tags = 0")


def count_usage(site: DamagedStore) -> None:
    """Inserts the rows with the counts of a usage scope, as the code that maintains these counts would."""
    site.run("INSERT INTO usage_scope (id, name, prefixes, excluded, complete, blobs) VALUES "
             "(1, 'quota', '[\"team/\"]', '[]', 1, 0), (2, 'uncounted', '[\"team/\"]', '[]', 0, 7)")  # fmt: skip
    site.run("INSERT INTO usage_member (repository, scope) SELECT id, 1 FROM repository")
    site.run("INSERT INTO usage_blob SELECT 1, b.id, b.size, count(*) FROM blob b JOIN blob_link l ON l.blob = b.id "
             "GROUP BY b.id")  # fmt: skip
    site.run("UPDATE usage_scope SET tags = 2, max_bytes = bytes - 1 WHERE id = 1")
