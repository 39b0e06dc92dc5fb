"""Checks of the counts of disk usage: whether the stored counts of each scope equal a recount.

A *scope* is a set of repositories whose blobs, bytes and tags are counted. Each quota has a scope: the repositories
that it limits. The cache of mirrored content has scopes too: one for each upstream, and one for all upstreams together.
A wrong count makes a quota refuse pushes too early or too late, or makes the cache evict too much or too little.

A scope counts each blob once. It also counts the *links* of each blob: the repositories in the scope that have the
blob. A new scope is not complete until the content that was stored before it is counted. Such a scope is not checked.
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
"""SQL expression: the number of links to a blob that a recount finds in the scope `s`."""
_TOTALS = """
SELECT (SELECT count(*) FROM usage_blob u WHERE u.scope = s.id),
       (SELECT coalesce(sum(u.size), 0) FROM usage_blob u WHERE u.scope = s.id),
       (SELECT count(*) FROM usage_member m JOIN tag t ON t.repository = m.repository WHERE m.scope = s.id)
  FROM usage_scope s WHERE s.id = """
"""Counts the blobs, bytes and tags of a scope again. Each use appends the expression for the row id of the scope."""

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
                "the space that is used by {item} is counted wrongly",
            ),
        ),
    ),
)
"""The checks in the order in which they should be repaired. Blobs come first, because the totals are sums over the
blobs. In the SQL, `t` is the row that is checked. The name of the repository (`repository`) is an empty text, because a
wrong count is not a problem of one repository."""


def repair(db: apsw.Connection, problem: Problem) -> str | None:
    """Counts the blob or scope of the problem again. Returns a text that says what was done; None if the code of the
    problem is not from these checks. Runs in a transaction."""
    if problem.code is ProblemCode.USAGE_LINKS:
        _recount_blob(db, problem.key)
    elif problem.code is ProblemCode.USAGE_TOTALS:
        db.execute(f"UPDATE usage_scope SET (blobs, bytes, tags) = ({_TOTALS}usage_scope.id) WHERE id = ?", problem.key)
    else:
        return None
    return "counted the used space again"


def _recount_blob(db: apsw.Connection, key: Key) -> None:
    """Counts again, for each complete scope, how many of its repositories have a link to a blob. `key`: the key of the
    blob's row, a tuple with the row id alone. Triggers correct the totals of the scopes. Each scope is marked as not
    complete during its repair, so that its quota does not abort the repair."""
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


def resize_blob(db: apsw.Connection, blob: int, before: int, after: int) -> None:
    """Corrects the totals of all scopes that have counted a blob, when the size of the blob in bytes is corrected from
    `before` to `after`. `blob`: the row id of the blob."""
    db.execute("UPDATE usage_blob SET size = ? WHERE blob = ?", (after, blob))
    db.execute(
        "UPDATE usage_scope SET bytes = bytes + ? WHERE id IN (SELECT scope FROM usage_blob WHERE blob = ?)",
        (after - before, blob),
    )
