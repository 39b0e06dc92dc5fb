"""Checks whether the stored counts of disk usage are right.

A *scope* is a set of repositories whose blobs, bytes and tags are counted together. Each quota has a scope: the
repositories that the quota limits. The cache of mirrored content has a scope for each upstream, and a scope for all
upstreams together. A wrong count makes a quota refuse pushes too early or too late, or makes the cache evict too much
or too little.

A scope counts each blob once. For each blob, it also counts the *links*: the repositories in the scope that have the
blob. A new scope is *incomplete* until all existing content is counted. Incomplete scopes are not checked.
"""

from __future__ import annotations

from typing import Any, Final

import apsw

from storage.consistency import Key, Problem, ProblemCode
from storage.metadata.sqlite.upkeep.table_checks import Rule, TableCheck

_COUNTED = "coalesce((SELECT u.links FROM usage_blob u WHERE u.scope = s.id AND u.blob = {blob}), 0)"
"""SQL expression: the stored count of the links to a blob in the scope `s`."""
_RECOUNTED = (
    "(SELECT count(*) FROM blob_link l JOIN usage_member m ON m.repository = l.repository AND m.scope = s.id "
    "WHERE l.blob = {blob})"
)
"""SQL expression: the actual number of links to a blob in the scope `s`."""
_TOTALS = """
SELECT (SELECT count(*) FROM usage_blob u WHERE u.scope = s.id),
       (SELECT coalesce(sum(u.size), 0) FROM usage_blob u WHERE u.scope = s.id),
       (SELECT count(*) FROM usage_member m JOIN tag t ON t.repository = m.repository WHERE m.scope = s.id)
  FROM usage_scope s WHERE s.id = """
"""SQL statement that counts the blobs, bytes and tags of a scope. Each use appends the expression for the row id of the
scope."""

USAGE_CHECKS: Final = (
    TableCheck(
        area="usage_blob",
        table="blob",
        key=("id",),
        repository="''",
        item="t.digest",
        rules=(
            Rule(
                ProblemCode.USAGE_LINKS,
                "EXISTS (SELECT 1 FROM usage_scope s WHERE s.complete = 1 AND "
                f"({_COUNTED.format(blob='t.id')} <> {_RECOUNTED.format(blob='t.id')} OR EXISTS (SELECT 1 "
                "FROM usage_blob u WHERE u.scope = s.id AND u.blob = t.id AND u.size <> t.size)))",
                "the number of repositories that have the blob is counted wrongly for a quota or a cache",
            ),
        ),
    ),
    TableCheck(
        area="usage_scope",
        table="usage_scope",
        key=("id",),
        repository="''",
        item="t.name",
        rules=(
            Rule(
                ProblemCode.USAGE_TOTALS,
                f"t.complete = 1 AND (t.blobs, t.bytes, t.tags) <> ({_TOTALS}t.id)",
                "the space that {item} uses is counted wrongly",
            ),
        ),
    ),
)
"""The checks. Blobs come first and must be repaired first, because the totals of a scope are sums over its blobs.

- `area`: the name of the check.
- `table`: the table whose rows are checked. In the SQL, `t` is the row that is checked. The check `usage_blob` checks
  the rows of `blob`, so it also finds a blob that has no row in the table `usage_blob` but should have one.
- `repository`: an empty text, because a wrong count is not a problem of one repository."""


def repair(db: apsw.Connection, problem: Problem) -> str | None:
    """Corrects the counts of the blob or of the scope that a problem is about. Returns a text that says what was done.
    Returns None if the problem is not from `USAGE_CHECKS`. Runs in a transaction."""
    if problem.code is ProblemCode.USAGE_LINKS:
        _recount_blob(db, problem.key)
    elif problem.code is ProblemCode.USAGE_TOTALS:
        db.execute(f"UPDATE usage_scope SET (blobs, bytes, tags) = ({_TOTALS}usage_scope.id) WHERE id = ?", problem.key)
    else:
        return None
    return "counted the used space again"


def _recount_blob(db: apsw.Connection, key: Key) -> None:
    """Counts the links to a blob again in each complete scope. `key`: a tuple that contains only the row id of the
    blob. Triggers correct the totals of the scopes. Each scope is marked as incomplete during its repair, so that its
    quota does not abort the repair."""
    scopes: list[Any] = db.execute("SELECT id FROM usage_scope WHERE complete = 1").fetchall()
    for (scope,) in scopes:
        db.execute("UPDATE usage_scope SET complete = 0 WHERE id = ?", (scope,))
        db.execute("DELETE FROM usage_blob WHERE scope = ? AND blob = ?", (scope, *key))
        db.execute(
            "INSERT INTO usage_blob (scope, blob, size, links) SELECT s.id, b.id, b.size, "
            f"{_RECOUNTED.format(blob='b.id')} FROM usage_scope s, blob b WHERE s.id = ?1 AND b.id = ?2 "
            f"AND {_RECOUNTED.format(blob='b.id')} > 0",
            (scope, *key),
        )
        db.execute("UPDATE usage_scope SET complete = 1 WHERE id = ?", (scope,))


def correct_counted_size(db: apsw.Connection, blob: int, old_size: int, new_size: int) -> None:
    """Corrects the size of a blob, in all scopes that have counted the blob and in their totals. `blob`: the row id of
    the blob. `old_size`, `new_size`: in bytes."""
    db.execute("UPDATE usage_blob SET size = ? WHERE blob = ?", (new_size, blob))
    db.execute(
        "UPDATE usage_scope SET bytes = bytes + ? WHERE id IN (SELECT scope FROM usage_blob WHERE blob = ?)",
        (new_size - old_size, blob),
    )
