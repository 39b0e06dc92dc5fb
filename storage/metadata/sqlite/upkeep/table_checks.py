"""Checks of the rows of one table against other tables (`TableCheck`, `TABLE_CHECKS`).

One statement checks a page of rows, so the check of a page sees one state of the database. The pages follow the order
of the table's key. A *link* is a row that lets a repository serve a blob.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import apsw

from storage.consistency import CheckedPage, Key, Problem, ProblemCode
from storage.metadata.sqlite.blob_changes import WHOLE_STORE

PAGE_ROWS: Final = 500
"""Largest number of rows that one statement checks. Checking this many rows takes a few milliseconds."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule for each row of a table. A row that breaks the rule is a *problem*.

    - `code`: the kind of the problem.
    - `broken_if`: an SQL condition on a row (alias `t`). It is true if the row breaks the rule.
    - `text`: a description of the problem for people. In the text, `{repository}` is replaced by the name of the
      row's repository, and `{item}` by the row's tag or digest."""

    code: ProblemCode
    broken_if: str
    text: str


@dataclass(frozen=True, slots=True)
class TableCheck:
    """The rules for the rows of a table.

    - `area`: the name of the check. The field `area` of each problem contains it.
    - `key`: the columns of the table's key.
    - `repository`: an SQL expression for the name of the row's repository. The field `repository` of a problem contains
      its value.
    - `item`: an SQL expression for the row's tag, digest or other name. The field `item` of a problem contains its
      value.

    The value of `repository` is empty or NULL if the row has no repository. The value of `item` is empty or NULL if the
    row has no tag, digest or other name."""

    area: str
    table: str
    key: tuple[str, ...]
    repository: str
    item: str
    rules: tuple[Rule, ...]

    def check(self, db: apsw.Connection, after: Key | None) -> CheckedPage:
        """Checks the next rows after the key `after`, at most `PAGE_ROWS`. If `after` is None, begins at the first
        row."""
        columns = ", ".join(self.key)
        where = "" if after is None else f"WHERE ({columns}) > ({', '.join('?' * len(self.key))})"
        statement = f"SELECT * FROM {self.table} {where} ORDER BY {columns} LIMIT {PAGE_ROWS}"
        rows = self._rows(db, statement, after or ())
        problems = [problem for row in rows for problem in self._problems(row)]
        return CheckedPage(len(rows), problems, self._key(rows[-1]) if len(rows) == PAGE_ROWS else None)

    def recheck(self, db: apsw.Connection, key: Key, code: ProblemCode) -> Problem | None:
        """Checks the row with the key `key`. Returns its problem of the kind `code`; None if it has no such problem."""
        conditions = " AND ".join(f"{column} = ?" for column in self.key)
        rows = self._rows(db, f"SELECT * FROM {self.table} WHERE {conditions}", key)
        return next((problem for row in rows for problem in self._problems(row) if problem.code is code), None)

    def _rows(self, db: apsw.Connection, statement: str, parameters: Key) -> list[Any]:
        """Checks the rows that `statement` selects. Returns one tuple per row: the columns of its key, the values of
        `repository` and `item`, and for each rule whether the row breaks the rule."""
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
    """Returns the check of `table`. The table must be `manifest_blob` or `manifest_child`."""
    text = "the metadata says that a manifest refers to this digest, but the manifest does not exist"
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
                "the tag points at no manifest of {repository}; push the tag again if the problem cannot be repaired",
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
            # Garbage collection checks only links in the queue `collect_queue`. An unused link that is not in the queue
            # is never removed.
            Rule(
                ProblemCode.LINK_NOT_QUEUED,
                f"{_REPOSITORY} IS NOT NULL AND {_BLOB_DIGEST} IS NOT NULL "
                f"AND NOT EXISTS (SELECT 1 FROM manifest_blob p "
                f"WHERE p.repository = t.repository AND p.digest = {_BLOB_DIGEST}) "
                f"AND NOT EXISTS (SELECT 1 FROM collect_queue q "
                f"WHERE q.repository = t.repository AND q.digest = {_BLOB_DIGEST})",
                "no manifest of {repository} refers to the blob, but garbage collection does not check the blob",
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
            # In the queue, the entry of a blob without a link has `WHOLE_STORE` in place of a repository's row id.
            Rule(
                ProblemCode.BLOB_NOT_QUEUED,
                "NOT EXISTS (SELECT 1 FROM blob_link l WHERE l.blob = t.id) "
                f"AND NOT EXISTS (SELECT 1 FROM collect_queue q WHERE q.repository = {WHOLE_STORE} "
                "AND q.digest = t.digest)",
                "no repository has the blob, but garbage collection does not check the blob",
            ),
            Rule(
                ProblemCode.BLOB_PLACE,
                "t.place = '' AND NOT EXISTS (SELECT 1 FROM damaged_blob d WHERE d.digest = t.digest)",
                "the metadata does not say where the bytes of the blob are; push the blob again",
            ),
        ),
    ),
)
"""The checks, in the order in which their problems should be repaired. The order matters, because a repair can cause a
new problem: a link or a blob is then missing from the collect queue (`collect_queue`). In this order, a later check
finds the new problem."""
