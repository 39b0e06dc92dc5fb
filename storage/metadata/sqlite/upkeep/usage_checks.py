"""Checks of the counted use of space: whether the counts of each scope equal a recount.

A scope is a set of repositories whose use of space is counted. A scope that is still being counted is not checked.
"""

from __future__ import annotations

from typing import Final

import apsw

from storage.consistency import Key, Problem, ProblemCode
from storage.metadata.sqlite.upkeep.table_checks import Rule, TableCheck

_IN_SCOPE = "substr(r.name, 1, length(s.prefix)) = s.prefix"
_COUNTED = "coalesce((SELECT u.links FROM usage_blob u WHERE u.scope = s.id AND u.blob = {blob}), 0)"
_RECOUNTED = (
    "(SELECT count(*) FROM blob_link l JOIN repository r ON r.id = l.repository WHERE l.blob = {blob} AND "
    f"{_IN_SCOPE})"
)
_TOTALS = """
SELECT (SELECT count(*) FROM usage_blob u WHERE u.scope = s.id),
       (SELECT coalesce(sum(b.size), 0) FROM usage_blob u JOIN blob b ON b.id = u.blob WHERE u.scope = s.id),
       (SELECT count(*) FROM tag t JOIN repository r ON r.id = t.repository WHERE r.name >= s.prefix AND """
_TOTALS += f"{_IN_SCOPE})\n  FROM usage_scope s WHERE s.id = "

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
        "t.prefix",
        (
            Rule(
                ProblemCode.USAGE_TOTALS,
                f"t.complete = 1 AND (t.blobs, t.bytes, t.tags) <> ({_TOTALS}t.id)",
                "the space that the repositories below {item} use is counted wrongly",
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
    db.execute(
        "DELETE FROM usage_blob WHERE blob = ?1 AND scope IN (SELECT id FROM usage_scope WHERE complete = 1)", key
    )
    db.execute(
        "INSERT INTO usage_blob (scope, blob, links) SELECT id, ?1, links FROM (SELECT s.id, "
        f"{_RECOUNTED.format(blob='?1')} AS links FROM usage_scope s WHERE s.complete = 1) WHERE links > 0",
        key,
    )


def resize_blob(db: apsw.Connection, blob: int, before: int, after: int) -> None:
    """Corrects the totals of all scopes that have counted the blob, when its size is corrected."""
    db.execute(
        "UPDATE usage_scope SET bytes = bytes + ? WHERE id IN (SELECT scope FROM usage_blob WHERE blob = ?)",
        (after - before, blob),
    )
