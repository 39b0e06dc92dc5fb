"""Finds the deleted manifests to put back before a tag is set to a manifest (`find_plan`).

A deleted manifest is kept for the grace period of garbage collection. During this period, the manifest can be *put
back*: it then belongs to its repository again. A *referrer* is a manifest whose `subject` field has the digest of
another manifest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import apsw

from storage.content import INDEXES, Manifest
from storage.errors import ManifestTooLarge
from storage.metadata.sqlite import lookups
from storage.metadata.sqlite.upkeep import deleted_manifests
from storage.names import Digest, RepositoryName
from storage.tag_history import not_restorable

MAX_MANIFESTS: Final = 10_000
"""Largest number of manifests that the search for a plan visits."""
MAX_INDEX_BYTES: Final = 64 * 1024 * 1024
"""Largest total size, in bytes, of the indexes that the search for a plan parses. Parsing 20 MiB takes about a
second."""
MAX_REFERRERS: Final = 1000
"""Largest number of referrers that are put back for each manifest."""


class PlannedManifest(NamedTuple):
    """A deleted manifest to put back. `size`: the size of its body in bytes."""

    digest: Digest
    size: int


@dataclass(slots=True)
class RestorePlan:
    """The deleted manifests to put back before a tag is set to `target`. No manifest is in the plan twice.

    - `required`: the deleted manifests among `target` and the manifests that `target` lists, directly or through other
      indexes. Each manifest comes after the manifests that it lists.
    - `referrer_groups`: groups of deleted manifests that the tag does not need. Each group belongs to one deleted
      referrer, whose subject is in `required` or in an earlier group. The group contains the deleted manifests that
      the referrer lists, directly or through other indexes, and then the referrer. Manifests that come earlier in the
      plan are left out, so a group may be empty.
    """

    target: Manifest
    required: list[PlannedManifest]
    referrer_groups: list[list[PlannedManifest]] = field(default_factory=list)


def find_plan(db: apsw.Connection, repo: RepositoryName, digest: Digest) -> RestorePlan:
    """Returns the plan for a tag that will point at the manifest `digest`. The repository may change after this call,
    so the transaction that puts the manifests back must check them again. Raises:

    - NameUnknown.
    - ManifestUnknown: the manifest does not exist any more, or is damaged.
    - ManifestTooLarge: the search exceeds `MAX_MANIFESTS` or `MAX_INDEX_BYTES`."""
    repository = lookups.repository_id(db, repo)
    walk = _Walk(db, repo, repository)
    required = walk.find_deleted(digest)
    deleted_manifest = deleted_manifests.find(db, repository, digest)
    target = deleted_manifest.manifest if deleted_manifest else _stored_manifest(db, repository, digest)
    if target is None:
        raise not_restorable(repo, digest)
    if not target.body:
        raise lookups.damaged_manifest_error(digest)
    plan = RestorePlan(target, required)
    subjects = [manifest.digest for manifest in required]
    while subjects:
        for referrer in deleted_manifests.referrers(db, repository, subjects.pop(), MAX_REFERRERS):
            group = walk.find_deleted(referrer)
            plan.referrer_groups.append(group)
            subjects += [manifest.digest for manifest in group]
    return plan


class _Walk:
    """Visits manifests and the manifests that they list, each of them only once. Keeps no manifest in memory."""

    def __init__(self, db: apsw.Connection, repo: RepositoryName, repository: int) -> None:
        """`repo`: the name of the repository, for error messages. `repository`: the id of the repository's row."""
        self._db = db
        self._repo = repo
        self._repository = repository
        self._visited: set[Digest] = set()
        self._index_bytes = 0

    def find_deleted(self, top: Digest) -> list[PlannedManifest]:
        """Returns the deleted manifests among `top` and the manifests that `top` lists, directly or through other
        indexes. Each manifest comes after the manifests that it lists. Leaves out manifests that an earlier call has
        visited. Raises ManifestTooLarge."""
        deleted: list[PlannedManifest] = []
        stack: list[Digest | PlannedManifest] = [top]
        while stack:
            digest_or_manifest = stack.pop()
            if isinstance(digest_or_manifest, PlannedManifest):  # comes after the deleted manifests that it lists
                deleted.append(digest_or_manifest)
                continue
            if digest_or_manifest in self._visited:
                continue
            self._visited.add(digest_or_manifest)
            self._check_limits(top)
            row: Any = self._db.execute(_TYPE_AND_SIZE, (self._repository, digest_or_manifest)).get
            if row is None:
                continue
            media_type, size, is_deleted = row
            if is_deleted:
                stack.append(PlannedManifest(digest_or_manifest, size))
            if media_type in INDEXES:
                self._index_bytes += size
                self._check_limits(top)
                stack += self._listed_in(digest_or_manifest)
        return deleted

    def _listed_in(self, digest: Digest) -> list[Digest]:
        """Returns the digests that an index lists; an empty list if the index cannot be parsed."""
        deleted_manifest = deleted_manifests.find(self._db, self._repository, digest)
        index = deleted_manifest.manifest if deleted_manifest else _stored_manifest(self._db, self._repository, digest)
        return [child.digest for child in index.manifests] if index is not None and index.is_readable else []

    def _check_limits(self, top: Digest) -> None:
        """Raises ManifestTooLarge if the walk exceeds `MAX_MANIFESTS` or `MAX_INDEX_BYTES`."""
        is_within = len(self._visited) <= MAX_MANIFESTS and self._index_bytes <= MAX_INDEX_BYTES
        if not is_within and len(self._visited) > 1:  # the first manifest may be an index of any size
            raise ManifestTooLarge(
                f"{self._repo}@{top} lists more manifests than can be put back at once; push the image again"
            )


_TYPE_AND_SIZE: Final = """
SELECT media_type, size, 0 FROM manifest WHERE repository = ?1 AND digest = ?2
 UNION ALL
SELECT media_type, octet_length(body), 1 FROM deleted_manifest WHERE repository = ?1 AND digest = ?2"""
"""Finds the media type and size of a manifest, and whether it is deleted."""


def _stored_manifest(db: apsw.Connection, repository: int, digest: Digest) -> Manifest | None:
    """Returns the manifest with this digest; None if the repository does not have the manifest. A damaged manifest has
    an empty body."""
    row: Any = db.execute(
        "SELECT body, media_type FROM manifest WHERE repository = ? AND digest = ?", (repository, digest)
    ).get
    return None if row is None else Manifest(row[0], row[1], digest)
