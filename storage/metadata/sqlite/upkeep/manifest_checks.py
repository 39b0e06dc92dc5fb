"""Checks stored manifests (`check`). The checks find out:

- whether the column `digest` contains the digest of the body
- whether the other columns and tables agree with the body
- whether the repository has the content to which the manifest refers

If a manifest cannot be parsed, only its digest and size are checked. A manifest that is recorded as damaged has no body
and is not checked. All functions run in a transaction, which the caller starts and ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import apsw

from storage.consistency import CheckedPage, Key, Problem, ProblemCode
from storage.content import Manifest, digest_of
from storage.errors import RegistryError
from storage.names import Digest

AREA: Final = "manifest"
MAX_PAGE_MANIFESTS: Final = 100
"""Largest number of manifests that one page checks."""
MAX_PAGE_BYTES: Final = 1024 * 1024
"""Largest total size of the bodies that one page checks. A page checks its first manifest even if the body of this
manifest is larger."""
_NEXT_MANIFESTS = "SELECT id, length(body) FROM manifest WHERE id > ? ORDER BY id LIMIT ?"
_MANIFEST = """
SELECT m.repository, m.digest, m.media_type, m.size, m.subject, m.artifact_type, m.body, r.name,
       EXISTS (SELECT 1 FROM upstream_check u WHERE u.repository = r.name)
       OR EXISTS (SELECT 1 FROM manifest_pull p WHERE p.manifest = m.id AND p.upstream <> ''),
       m.size = 0 AND EXISTS (
       SELECT 1 FROM damaged_manifest d WHERE d.repository = m.repository AND d.digest = m.digest)
  FROM manifest m LEFT JOIN repository r ON r.id = m.repository WHERE m.id = ?"""
_MISSING_BLOBS = """
SELECT value FROM json_each(?2) WHERE NOT EXISTS (
       SELECT 1 FROM blob b JOIN blob_link l ON l.blob = b.id WHERE b.digest = value AND l.repository = ?1)"""
_MISSING_MANIFESTS = """
SELECT value FROM json_each(?2) WHERE NOT EXISTS (
       SELECT 1 FROM manifest m WHERE m.repository = ?1 AND m.digest = value)"""


@dataclass(frozen=True, slots=True)
class StoredManifest:
    """A row of the table `manifest`, with facts from other tables. `repository_name`: None if the repository does not
    exist. `is_mirrored`: whether the repository is mirrored; a mirrored repository may lack content. `is_damaged`:
    whether the manifest is recorded as damaged."""

    id: int
    repository: int
    digest: str
    media_type: str
    size: int
    subject: str | None
    artifact_type: str | None
    body: bytes
    repository_name: str | None
    is_mirrored: bool
    is_damaged: bool

    @property
    def is_digest_valid(self) -> bool:
        """Whether the text in the column `digest` is a well-formed digest. It need not be the digest of the body."""
        try:
            Digest(self.digest)
        except RegistryError:
            return False
        return True

    @property
    def is_digest_right(self) -> bool:
        """Whether the text in the column `digest` is the digest of the body."""
        return self.is_digest_valid and digest_of(self.body, Digest(self.digest).algorithm) == self.digest

    @property
    def manifest(self) -> Manifest | None:
        """The parsed manifest; None if the body cannot be parsed."""
        manifest = Manifest(self.body, self.media_type, Digest(self.digest))
        return manifest if manifest.is_readable else None


def check(db: apsw.Connection, after: Key | None) -> CheckedPage:
    """Checks one *page* of manifests: the manifests whose rows follow the key `after`, or the first manifests if
    `after` is None. Returns the number of checked manifests, their problems, and the key of the last manifest. The key
    is None if there was no manifest to check."""
    rows: list[Any] = db.execute(_NEXT_MANIFESTS, (after[0] if after else 0, MAX_PAGE_MANIFESTS)).fetchall()
    problems: list[Problem] = []
    size = checked = 0
    for manifest_id, length in rows:
        if checked and size + length > MAX_PAGE_BYTES:
            break
        checked += 1
        size += length
        problems += problems_of(db, manifest_id)
    return CheckedPage(checked, problems, (rows[checked - 1][0],) if rows else None)


def recheck(db: apsw.Connection, problem: Problem) -> Problem | None:
    """Checks the manifest of the problem again. Returns the problem if the manifest still has it; None otherwise."""
    return next((current for current in problems_of(db, int(problem.key[0])) if current == problem), None)


def read(db: apsw.Connection, manifest_id: int) -> StoredManifest | None:
    """Returns the manifest with this row id; None if there is none."""
    row: Any = db.execute(_MANIFEST, (manifest_id,)).get
    return None if row is None else StoredManifest(manifest_id, *row)


def expected_references(manifest: Manifest) -> dict[str, set[str]]:
    """Returns, for each table of references, the digests that the table must have for the manifest. If an entry of
    an index has a media type that is neither a manifest's nor an index's (`Manifest.blob_children`), both tables must
    have its digest, because the entry may be a blob."""
    return {
        "manifest_blob": {blob.digest for blob in manifest.blobs} | set(manifest.blob_children),
        "manifest_child": {child.digest for child in manifest.manifests},
    }


def stored_references(db: apsw.Connection, table: str, stored: StoredManifest) -> set[str]:
    """Returns the digests that the table has for the manifest."""
    rows: list[Any] = db.execute(
        f"SELECT digest FROM {table} WHERE manifest = ? AND repository = ?", (stored.id, stored.repository)
    ).fetchall()
    return {digest for (digest,) in rows}


def problems_of(db: apsw.Connection, manifest_id: int) -> list[Problem]:
    """Returns the problems of one manifest."""
    stored = read(db, manifest_id)
    if stored is None:
        return []
    return [
        Problem(code, text, stored.repository_name or "", stored.digest, AREA, (manifest_id, *key_parts))
        for code, text, key_parts in _findings(db, stored)
    ]


def _findings(db: apsw.Connection, stored: StoredManifest) -> Iterator[tuple[ProblemCode, str, tuple[str, ...]]]:
    """Yields a tuple for each problem: its code, its text, and the parts of its key that follow the row id."""
    if stored.repository_name is None:
        yield ProblemCode.MANIFEST_WITHOUT_REPOSITORY, "the manifest belongs to no repository", ()
        return
    if stored.is_damaged:
        return
    if not stored.is_digest_right:
        yield ProblemCode.MANIFEST_DIGEST, "the manifest does not match its digest; push it again", ()
        return
    manifest = stored.manifest
    if stored.size != len(stored.body) or (
        manifest and (stored.subject, stored.artifact_type) != (manifest.subject, manifest.artifact_type)
    ):
        text = "the stored size, subject or artifact type of the manifest is not what the manifest says"
        yield ProblemCode.MANIFEST_FIELDS, text, ()
    if manifest is None:
        return
    for table, expected in expected_references(manifest).items():
        if stored_references(db, table, stored) != expected:
            text = f"the stored references of the manifest ({table}) are not those in the manifest"
            yield ProblemCode.MANIFEST_REFERENCES, text, (table,)
    if stored.is_mirrored:
        return
    for digest in _missing(db, _MISSING_BLOBS, stored, {blob.digest for blob in manifest.blobs} - manifest.foreign):
        text = f"the manifest needs the blob {digest}, which {stored.repository_name} lacks; push the image again"
        yield ProblemCode.MANIFEST_BLOB_MISSING, text, (digest,)
    digests_without_manifest = _missing(db, _MISSING_MANIFESTS, stored, {child.digest for child in manifest.manifests})
    # An entry that may be a blob is missing only if the repository has neither a manifest nor a blob with its digest.
    may_be_blobs = {digest for digest in manifest.blob_children if digest in digests_without_manifest}
    digests_without_blob = set(_missing(db, _MISSING_BLOBS, stored, may_be_blobs))
    for digest in digests_without_manifest:
        if digest not in may_be_blobs or digest in digests_without_blob:
            text = f"the index lists {digest}, which {stored.repository_name} lacks; push the image or delete the index"
            yield ProblemCode.INDEX_CHILD_MISSING, text, (digest,)


def _missing(db: apsw.Connection, sql: str, stored: StoredManifest, digests: set[Digest]) -> list[str]:
    """Returns the `digests` that the manifest's repository lacks. `sql`: `_MISSING_BLOBS` or `_MISSING_MANIFESTS`."""
    if not digests:
        return []
    rows: list[Any] = db.execute(sql, (stored.repository, json.dumps(sorted(digests)))).fetchall()
    return [digest for (digest,) in rows]
