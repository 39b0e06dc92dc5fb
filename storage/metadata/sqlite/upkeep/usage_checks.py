"""Checks of the counted use of space: whether the counts of each scope equal a recount.

A scope is a set of repositories whose use of space is counted. A scope that is still being counted is not checked.
"""

from __future__ import annotations

from typing import Final

import apsw

from storage.consistency import Key, Problem, ProblemCode
from storage.metadata.sqlite.upkeep.table_checks import Rule, TableCheck

_COUNTED = "coalesce((SELECT u.links FROM usage_blob u WHERE u.scope = s.id AND u.blob = {blob}), 0)"
_RECOUNTED = (
    "(SELECT count(*) FROM usage_member m JOIN blob_link l ON l.repository = m.repository "
    "WHERE m.scope = s.id AND l.blob = {blob})"
)
_TOTALS = """
SELECT (SELECT count(*) FROM usage_blob u WHERE u.scope = s.id),
       (SELECT coalesce(sum(u.size), 0) FROM usage_blob u WHERE u.scope = s.id),
       (SELECT count(*) FROM usage_member m JOIN tag t ON t.repository = m.repository WHERE m.scope = s.id)
  FROM usage_scope s WHERE s.id = """

USAGE_CHECKS: Final = (
    TableCheck(
        "usage_blob",
        "blob",
        ("id",),
        "''",
        "t.digest",
        (
            Rule(
                ProblemCode.USAGE_LINKS,
                "EXISTS (SELECT 1 FROM usage_scope s WHERE s.complete = 1 AND "
                f"{_COUNTED.format(blob='t.id')} <> {_RECOUNTED.format(blob='t.id')})",
                "the number of repositories that have the blob is counted wrongly for a quota or a cache",
            ),
        ),
    ),
    TableCheck(
        "usage_scope",
        "usage_scope",
        ("id",),
        "''",
        "t.name",
        (
            Rule(
                ProblemCode.USAGE_TOTALS,
                f"t.complete = 1 AND (t.blobs, t.bytes, t.tags) <> ({_TOTALS}t.id)",
                "the space that the repositories of {item} use is counted wrongly",
            ),
        ),
    ),
)
"""The checks in the order in which they should be repaired, because the totals are sums of the counts of blobs."""


def repair(db: apsw.Connection, problem: Problem) -> str | None:
    """Counts again what the problem is about. Returns what was done; None for a problem of another kind. Runs in a
    transaction."""
    if problem.code is ProblemCode.USAGE_LINKS:
        _recount_blob(db, problem.key)
    elif problem.code is ProblemCode.USAGE_TOTALS:
        db.execute(f"UPDATE usage_scope SET (blobs, bytes, tags) = ({_TOTALS}usage_scope.id) WHERE id = ?", problem.key)
    else:
        return None
    return "counted it again"


def _recount_blob(db: apsw.Connection, key: Key) -> None:
    """Counts again in how many repositories of each scope the blob with the row id `key` has a link."""
    # A quota is not enforced while the counts are mended: triggers enforce it only if `complete` is 1.
    db.execute("UPDATE usage_scope SET complete = 2 WHERE complete = 1")
    db.execute(
        "DELETE FROM usage_blob WHERE blob = ?1 AND scope IN (SELECT id FROM usage_scope WHERE complete = 2)", key
    )
    db.execute(
        "INSERT INTO usage_blob (scope, blob, size, links) SELECT id, ?1, size, links FROM (SELECT s.id, b.size, "
        f"{_RECOUNTED.format(blob='?1')} AS links FROM usage_scope s JOIN blob b ON b.id = ?1 WHERE s.complete = 2) "
        "WHERE links > 0",
        key,
    )
    db.execute("UPDATE usage_scope SET complete = 1 WHERE complete = 2")


def resize_blob(db: apsw.Connection, blob: int, before: int, after: int) -> None:
    """Corrects the counts of all scopes that have counted the blob, when its size is corrected."""
    db.execute(
        "UPDATE usage_scope SET bytes = bytes + ? WHERE id IN (SELECT scope FROM usage_blob WHERE blob = ?)",
        (after - before, blob),
    )
    db.execute("UPDATE usage_blob SET size = ? WHERE blob = ?", (after, blob))
