"""Checks of the rows of one table against other tables (`TableCheck`, `TABLE_CHECKS`).

A check reads a page of rows, in the order of the table's key, in one statement. So it sees the database at one moment.
A *link* is a row that lets a repository serve a blob.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import apsw

from storage.consistency import CheckedPage, Key, Problem, ProblemCode
from storage.metadata.sqlite.blob_changes import WHOLE_STORE

PAGE_ROWS: Final = 500
"""Number of rows that one statement checks. This takes a few milliseconds."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule that each row of a table must keep. `code`: the kind of problem if a row breaks the rule. `broken_if`: an
    SQL condition on a row (alias `t`) that is true if the row breaks the rule. `text`: a description of the problem for
    people; `{repository}` and `{item}` stand for the names in the problem."""

    code: ProblemCode
    broken_if: str
    text: str


@dataclass(frozen=True, slots=True)
class TableCheck:
    """The rules for the rows of a table. `area`: the name of the check, which its problems carry. `key`: the columns of
    the table's key. `repository`, `item`: SQL expressions for two names that a problem states: the name of the
    repository, and the tag or digest that the row is about. Each is empty if the row has no such name."""

    area: str
    table: str
    key: tuple[str, ...]
    repository: str
    item: str
    rules: tuple[Rule, ...]

    def check(self, db: apsw.Connection, after: Key | None) -> CheckedPage:
        """Checks the next rows, at most `PAGE_ROWS`, after the key `after`. If `after` is None, begins at the first
        row."""
        columns = ", ".join(self.key)
        where = "" if after is None else f"WHERE ({columns}) > ({', '.join('?' * len(self.key))})"
        statement = f"SELECT * FROM {self.table} {where} ORDER BY {columns} LIMIT {PAGE_ROWS}"
        rows = self._rows(db, statement, after or ())
        problems = [problem for row in rows for problem in self._problems(row)]
        return CheckedPage(len(rows), problems, self._key(rows[-1]) if len(rows) == PAGE_ROWS else None)

    def recheck(self, db: apsw.Connection, key: Key, code: ProblemCode) -> Problem | None:
        """Checks the row with this key. Returns its problem with this code; None if it has no such problem."""
        conditions = " AND ".join(f"{column} = ?" for column in self.key)
        rows = self._rows(db, f"SELECT * FROM {self.table} WHERE {conditions}", key)
        return next((problem for row in rows for problem in self._problems(row) if problem.code is code), None)

    def _rows(self, db: apsw.Connection, statement: str, parameters: Key) -> list[Any]:
        """Returns the rows that `statement` selects. For each row: its key, the two names, and for each rule
        whether the row breaks the rule."""
        key_columns = ", ".join(f"t.{column}" for column in self.key)
        rules = ", ".join(f"({rule.broken_if})" for rule in self.rules)
        return db.execute(
            f"SELECT {key_columns}, {self.repository}, {self.item}, {rules} FROM ({statement}) t", parameters
        ).fetchall()

    def _key(self, row: tuple[Any, ...]) -> Key:
        return row[: len(self.key)]

    def _problems(self, row: tuple[Any, ...]) -> list[Problem]:
        repository, item, *broken_flags = row[len(self.key) :]
        names = {"repository": repository or "", "item": item or ""}
        return [
            Problem(rule.code, rule.text.format(**names), area=self.area, key=self._key(row), **names)
            for rule, is_broken in zip(self.rules, broken_flags, strict=True)
            if is_broken
        ]


_REPOSITORY: Final = "(SELECT r.name FROM repository r WHERE r.id = t.repository)"
_BLOB_DIGEST: Final = "(SELECT b.digest FROM blob b WHERE b.id = t.blob)"
_NO_MANIFEST: Final = "NOT EXISTS (SELECT 1 FROM manifest m WHERE m.id = t.manifest AND m.repository = t.repository)"


def _reference_check(table: str) -> TableCheck:
    """Returns the check of `table`, which is `manifest_blob` or `manifest_child`."""
    text = "the metadata has a reference to this digest from a manifest that does not exist"
    rule = Rule(ProblemCode.REFERENCE_WITHOUT_MANIFEST, _NO_MANIFEST, text)
    return TableCheck(table, table, ("repository", "digest", "manifest"), _REPOSITORY, "t.digest", (rule,))


TABLE_CHECKS: Final = (
    _reference_check("manifest_blob"),
    _reference_check("manifest_child"),
    TableCheck(
        "repository",
        "repository",
        ("id",),
        "t.name",
        "''",
        (
            Rule(
                ProblemCode.REPOSITORY_COUNT,
                "t.manifests <> (SELECT count(*) FROM manifest m WHERE m.repository = t.id)",
                "the stored number of manifests in the repository is wrong",
            ),
        ),
    ),
    TableCheck(
        "tag",
        "tag",
        ("repository", "name"),
        _REPOSITORY,
        "t.name",
        (
            Rule(ProblemCode.TAG_WITHOUT_REPOSITORY, f"{_REPOSITORY} IS NULL", "the tag belongs to no repository"),
            Rule(
                ProblemCode.TAG_WITHOUT_MANIFEST,
                f"{_REPOSITORY} IS NOT NULL AND {_NO_MANIFEST}",
                "the tag points at no manifest of {repository}; push it again if it cannot be repaired",
            ),
        ),
    ),
    TableCheck(
        "blob_link",
        "blob_link",
        ("repository", "blob"),
        _REPOSITORY,
        _BLOB_DIGEST,
        (
            Rule(
                ProblemCode.LINK_WITHOUT_REPOSITORY,
                f"{_REPOSITORY} IS NULL",
                "a repository that does not exist has a link to the blob",
            ),
            Rule(
                ProblemCode.LINK_WITHOUT_BLOB,
                f"{_BLOB_DIGEST} IS NULL",
                "{repository} has a link to a blob that does not exist",
            ),
            Rule(
                ProblemCode.LINK_NOT_QUEUED,
                f"{_REPOSITORY} IS NOT NULL AND {_BLOB_DIGEST} IS NOT NULL "
                f"AND NOT EXISTS (SELECT 1 FROM manifest_blob p "
                f"WHERE p.repository = t.repository AND p.digest = {_BLOB_DIGEST}) "
                f"AND NOT EXISTS (SELECT 1 FROM collect_queue q "
                f"WHERE q.repository = t.repository AND q.digest = {_BLOB_DIGEST})",
                "no manifest of {repository} refers to the blob, but garbage collection would never look at it",
            ),
        ),
    ),
    TableCheck(
        "blob",
        "blob",
        ("id",),
        "''",
        "t.digest",
        (
            Rule(
                ProblemCode.BLOB_NOT_QUEUED,
                "NOT EXISTS (SELECT 1 FROM blob_link l WHERE l.blob = t.id) "
                f"AND NOT EXISTS (SELECT 1 FROM collect_queue q WHERE q.repository = {WHOLE_STORE} "
                "AND q.digest = t.digest)",
                "no repository has the blob, but garbage collection would never look at it",
            ),
            Rule(
                ProblemCode.BLOB_PLACE,
                "t.place = '' AND NOT EXISTS (SELECT 1 FROM damaged_blob d WHERE d.digest = t.digest)",
                "it is not recorded where the bytes of the blob are; push it again",
            ),
        ),
    ),
)
"""The checks, in the order in which the problems that they find should be repaired: the repair of a reference can leave
a link that has to be queued for garbage collection (`collect_queue`), and the repair of a link can leave a blob that
has to be queued."""
