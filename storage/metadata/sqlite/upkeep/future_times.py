"""Replaces stored times that are in the future (`storage.future_times`) by the present time. Corrects only times from
which garbage collection or retention measures how long content has been unused. Without the correction, unused content
would stay until the clock has reached these times.

- Garbage collection removes upload sessions, deleted manifests, unused blobs and unused links some time after they were
  last used. A *link* is the right of a repository to serve a blob.
- The table `pull_recording` has the *recording start*: the time since which all pulls are recorded. Retention treats
  content that was pushed before the recording start as if it had been pulled at the recording start.
"""

from __future__ import annotations

from typing import Any, Final

import apsw

from storage.future_times import CLOCK_MARGIN_SECONDS
from storage.metadata.sqlite.blob_changes import queue_for_collection
from storage.names import Digest

MAX_CORRECTED_ROWS: Final = 500
"""Largest number of upload sessions, and of queue entries, that one transaction corrects. Other changes of the store
wait for the transaction."""
MAX_CORRECTED_MANIFESTS: Final = 20
"""Largest number of deleted manifests that one transaction corrects. The row of a manifest has its body of up to 4 MiB,
and the correction of a row takes up to 10 ms."""
_HAS_FUTURE_TIMES: Final = """
SELECT EXISTS (SELECT 1 FROM collect_queue WHERE since > ?1) OR EXISTS (SELECT 1 FROM upload WHERE touched > ?1)
    OR EXISTS (SELECT 1 FROM deleted_manifest WHERE deleted > ?1)
    OR EXISTS (SELECT 1 FROM pull_recording WHERE since > ?1)"""
_CORRECT_UPLOADS: Final = """
UPDATE upload SET touched = ?1 WHERE id IN (SELECT id FROM upload WHERE touched > ?2 LIMIT ?3)"""
_CORRECT_DELETED_MANIFESTS: Final = """
UPDATE deleted_manifest SET deleted = ?1
 WHERE rowid IN (SELECT rowid FROM deleted_manifest WHERE deleted > ?2 LIMIT ?3)"""
_CORRECT_LINK: Final = """
UPDATE blob_link SET needed = ?3
 WHERE repository = ?1 AND blob = (SELECT id FROM blob WHERE digest = ?2) AND needed > ?4"""
"""Replaces the time in the column `needed` of a link by the time ?3, if `needed` is later than ?4. `needed` is the time
at which a client last added the blob to the repository or asked for the blob. ?1: the row id of the repository. ?2: the
digest of the blob."""


def has_future_times(db: apsw.Connection, now: float) -> bool:
    """Returns whether `correct_future_times` would change anything. `now`: in seconds since 1970. Uses indexes, and
    reads at most one row of each table."""
    return bool(db.execute(_HAS_FUTURE_TIMES, (now + CLOCK_MARGIN_SECONDS,)).get)


def correct_future_times(db: apsw.Connection, now: float) -> bool:
    """Replaces times that are more than `CLOCK_MARGIN_SECONDS` after `now` (seconds since 1970) by `now`. Returns
    whether there may be more times to correct. Runs inside a transaction, which the caller commits. Corrects:

    - at most `MAX_CORRECTED_ROWS` upload sessions
    - at most `MAX_CORRECTED_ROWS` entries of garbage collection's queue, and the links of these entries
    - at most `MAX_CORRECTED_MANIFESTS` deleted manifests
    - the recording start"""
    future_start = now + CLOCK_MARGIN_SECONDS
    db.execute("UPDATE pull_recording SET since = ?1 WHERE since > ?2", (now, future_start))
    entries: list[Any] = db.execute(
        "SELECT repository, digest FROM collect_queue WHERE since > ? LIMIT ?", (future_start, MAX_CORRECTED_ROWS)
    ).fetchall()
    for repository, digest in entries:
        queue_for_collection(db, repository, Digest(digest), now)
        db.execute(_CORRECT_LINK, (repository, digest, now, future_start))
    may_be_more = len(entries) == MAX_CORRECTED_ROWS
    for sql, limit in (_CORRECT_UPLOADS, MAX_CORRECTED_ROWS), (_CORRECT_DELETED_MANIFESTS, MAX_CORRECTED_MANIFESTS):
        db.execute(sql, (now, future_start, limit))
        may_be_more = may_be_more or db.changes() == limit
    return may_be_more
