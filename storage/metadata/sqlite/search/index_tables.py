"""The tables of the search index, and how they follow the tables of the content.

`search_progress` has the row ids up to which the index has seen repositories, manifests, blobs and the tag history. All
of these get higher row ids as they are added, so the index finds what is new without a write by the push. Where the
highest row id can be used again, a trigger moves the position back.

Each function that changes something runs inside a transaction that the caller commits, and changes a bounded number of
rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import apsw

from storage.content_search import ManifestBatch, ManifestLabels, UnindexedManifest
from storage.errors import DigestInvalid
from storage.names import Digest, RepositoryName

NAMES_PER_BATCH: Final = 100
TAGS_PER_BATCH: Final = 200
MANIFESTS_PER_BATCH: Final = 100
"""Numbers of rows that one transaction adds. It takes a few milliseconds, and clients' changes wait no longer."""
BLOBS_PER_BATCH: Final = 2000
"""Number of blobs of which one batch finds out whether they are configs that were missing."""
MAX_LAG: Final = 2000
"""If more rows of a kind are not in the index, it is being built."""
MAX_WORDS_OF_TAG: Final = 5
"""Largest number of words of a tag, with the whole tag."""
MAX_MANIFEST_BYTES: Final = 64 * 1024
"""Size in bytes of the largest manifest of which the config is looked for."""
START_OF_NAME: Final = "^"
"""The character before each name in `search_name`, by which a search finds the beginnings of names."""
_WORD_START = re.compile(r"[-_](?=[^-_])")
_LAG = """
SELECT coalesce((SELECT max(id) FROM repository), 0) - repositories,
       coalesce((SELECT max(id) FROM manifest), 0) - manifests,
       coalesce((SELECT max(id) FROM blob), 0) - blobs,
       coalesce((SELECT max(id) FROM tag_history), 0) - tag_changes, tag_repository IS NOT NULL
  FROM search_progress"""
_MANIFEST = f"""
SELECT m.id, r.name, m.digest, CAST(m.annotations AS TEXT),
       CASE WHEN m.size BETWEEN 1 AND {MAX_MANIFEST_BYTES} AND json_valid(CAST(m.body AS TEXT))
            THEN json_extract(CAST(m.body AS TEXT), '$.config.digest') END
  FROM manifest m JOIN repository r ON r.id = m.repository"""
_NEW_MANIFESTS = _MANIFEST + " WHERE m.id > ?1 ORDER BY m.id LIMIT ?2"
_MANIFESTS_WITH_NEW_CONFIG = (
    _MANIFEST
    + """ WHERE m.id IN (SELECT c.manifest FROM blob b JOIN search_missing_config c ON c.digest = b.digest
                   WHERE b.id > ?1 AND b.id <= ?2) ORDER BY m.id"""
)


def has_unindexed(db: apsw.Connection) -> bool:
    """Returns whether there is content that is not in the index."""
    lag: tuple[int, ...] = db.execute(_LAG).get
    return any(count > 0 for count in lag)


def is_indexing(db: apsw.Connection) -> bool:
    """Returns whether much of the content is not in the index. Blobs do not count, because few of them matter."""
    repositories, manifests, _, tag_changes, reads_tags = db.execute(_LAG).get
    return bool(reads_tags) or max(repositories, manifests, tag_changes) > MAX_LAG


def index_names(db: apsw.Connection) -> bool:
    """Adds the next repositories and tags. Returns whether many are left. So does each function below."""
    is_full = _add_repositories(db)
    is_full |= _add_stored_tags(db)
    return _follow_tag_changes(db) or is_full


def _add_repositories(db: apsw.Connection) -> bool:
    count, last = db.execute(
        "SELECT count(*), max(id) FROM ("
        "SELECT id FROM repository WHERE id > (SELECT repositories FROM search_progress) ORDER BY id LIMIT ?)",
        (NAMES_PER_BATCH,),
    ).get
    if last is None:
        return False
    db.execute(
        "INSERT INTO search_name (rowid, name) SELECT id, ? || name FROM repository "
        "WHERE id > (SELECT repositories FROM search_progress) AND id <= ? ORDER BY id",
        (START_OF_NAME, last),
    )
    db.execute("UPDATE search_progress SET repositories = ?", (last,))
    return bool(count == NAMES_PER_BATCH)


def _add_stored_tags(db: apsw.Connection) -> bool:
    """Adds the next tags of a store that is older than the index."""
    position: Any = db.execute("SELECT tag_repository, tag_name FROM search_progress").get
    if position[0] is None:
        return False
    rows: list[Any] = db.execute(
        "SELECT repository, name FROM tag WHERE (repository, name) > (?, ?) ORDER BY repository, name LIMIT ?",
        (*position, TAGS_PER_BATCH),
    ).fetchall()
    for repository, tag in rows:
        _add_tag(db, repository, tag)
    last = rows[-1] if len(rows) == TAGS_PER_BATCH else (None, None)
    db.execute("UPDATE search_progress SET tag_repository = ?, tag_name = ?", tuple(last))
    return len(rows) == TAGS_PER_BATCH


def _follow_tag_changes(db: apsw.Connection) -> bool:
    """Adds the tags that were added lately, and removes those that were deleted."""
    rows: list[Any] = db.execute(
        "SELECT h.id, h.repository, h.tag, h.digest IS NULL, "
        "       EXISTS (SELECT 1 FROM tag t WHERE t.repository = h.repository AND t.name = h.tag) "
        "  FROM tag_history h WHERE h.id > (SELECT tag_changes FROM search_progress) ORDER BY h.id LIMIT ?",
        (TAGS_PER_BATCH,),
    ).fetchall()
    if not rows:
        return False
    for _, repository, tag, was_deleted, exists in rows:
        if exists:
            _add_tag(db, repository, tag)
        elif was_deleted:
            db.executemany(
                "DELETE FROM search_tag WHERE word = ? AND repository = ? AND tag = ?",
                [(word, repository, tag) for word in words_of_tag(tag)],
            )
    db.execute("UPDATE search_progress SET tag_changes = ?", (rows[-1][0],))
    return len(rows) == TAGS_PER_BATCH


def _add_tag(db: apsw.Connection, repository: int, tag: str) -> None:
    db.executemany(
        "INSERT INTO search_tag (word, repository, tag) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
        [(word, repository, tag) for word in words_of_tag(tag)],
    )


def words_of_tag(tag: str) -> list[str]:
    """Returns the words by which a tag is found, in lower case: the whole tag, and its rest after each '-' and '_'."""
    text = tag.lower()
    starts = [0, *(match.end() for match in _WORD_START.finditer(text))]
    return list(dict.fromkeys(text[start:] for start in starts[:MAX_WORDS_OF_TAG]))


def read_unindexed_manifests(db: apsw.Connection) -> ManifestBatch:
    """Reads the next manifests that are not in the index, and those whose config was stored lately."""
    manifests, blobs = seen = db.execute("SELECT manifests, blobs FROM search_progress").get
    newest_blob = db.execute("SELECT coalesce(max(id), 0) FROM blob").get
    reached_blob = max(blobs, min(newest_blob, blobs + BLOBS_PER_BATCH))
    rows: list[Any] = db.execute(_NEW_MANIFESTS, (manifests, MANIFESTS_PER_BATCH)).fetchall()
    reached = rows[-1][0] if rows else manifests
    is_full = len(rows) == MANIFESTS_PER_BATCH or reached_blob < newest_blob
    if reached_blob > blobs:
        rows += db.execute(_MANIFESTS_WITH_NEW_CONFIG, (blobs, reached_blob)).fetchall()
    return ManifestBatch([_manifest(row) for row in rows], tuple(seen), (reached, reached_blob), is_full)


def _manifest(row: Sequence[Any]) -> UnindexedManifest:
    manifest_id, name, digest, annotations, config = row
    try:
        config_digest = Digest(config) if isinstance(config, str) else None
    except DigestInvalid:
        config_digest = None
    return UnindexedManifest(manifest_id, RepositoryName(name), Digest(digest), annotations, config_digest)


def add_manifests(db: apsw.Connection, batch: ManifestBatch, labels: Sequence[ManifestLabels]) -> None:
    """Adds manifests to the index, and moves its position. If another manifest has got the row id of one that was
    deleted meanwhile, or can get it, the position stays before that id."""
    reached, reached_blob = batch.reached
    for each in labels:
        manifest = each.manifest
        row: Any = db.execute("SELECT repository, digest FROM manifest WHERE id = ?", (manifest.id,)).get
        if row is None or row[1] != manifest.digest:
            if row is not None or not db.execute("SELECT 1 FROM manifest WHERE id > ?", (manifest.id,)).get:
                reached = min(reached, manifest.id - 1)
            continue
        db.execute(
            "INSERT INTO search_manifest (hex, manifest) VALUES (?, ?) ON CONFLICT DO NOTHING",
            (manifest.digest.encoded[:16], manifest.id),
        )
        _set_text(db, manifest.id, row[0], each.text)
        db.execute("DELETE FROM search_missing_config WHERE manifest = ?", (manifest.id,))
        if each.missing_config is not None:
            db.execute(
                "INSERT INTO search_missing_config (digest, manifest) VALUES (?, ?)",
                (each.missing_config, manifest.id),
            )
    newest_blob: int = db.execute("SELECT coalesce(max(id), 0) FROM blob").get
    for column, seen, now in (
        ("manifests", batch.seen[0], reached),
        ("blobs", batch.seen[1], min(reached_blob, newest_blob)),
    ):
        # A deletion has moved the position back meanwhile if it is not `seen`.
        db.execute(f"UPDATE search_progress SET {column} = iif({column} = ?1, ?2, min({column}, ?2))", (seen, now))


def _set_text(db: apsw.Connection, manifest: int, repository: int, text: str) -> None:
    """Makes `text` the labels of the manifest in the index."""
    if db.execute("SELECT 1 FROM search_label WHERE manifest = ?", (manifest,)).get:
        db.execute("DELETE FROM search_word WHERE rowid = ?", (manifest,))
        db.execute("DELETE FROM search_label WHERE manifest = ?", (manifest,))
    if text:
        db.execute("INSERT INTO search_label (manifest, text) VALUES (?, ?)", (manifest, text))
        db.execute(
            "INSERT INTO search_word (rowid, repository, text) VALUES (?, ?, ?)", (manifest, str(repository), text)
        )
