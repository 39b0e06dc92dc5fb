"""The mirror's records of its upstreams in the metadata database (`UpstreamRecords`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import apsw

from storage.content import Allowance, BadSender, Manifest, UpstreamCheck
from storage.data_dir.reserve import ReserveUse
from storage.metadata.sqlite.blob_changes import confirm_blob
from storage.metadata.sqlite.immutable_database import ImmutableDatabase
from storage.metadata.sqlite.writer_thread import WriterThread
from storage.names import Digest, Reference, RepositoryName

UNKNOWN_KEPT = 10_000
"""Approximate limit of stored 'not found' checks, since any client can cause more of them."""
PRUNE_EVERY = 64
REFERRING = 8
READ_SIZE = 256 * 1024
"""Total bytes of the manifests that are parsed, on the event loop, for a blob's size. If only larger manifests name the
blob, the mirror asks the upstream for the size."""
LOOKED_AT = 500
"""Most manifests naming the blob from which the newest are taken."""
_REFERRING = """
SELECT m.id, m.size, m.media_type, m.digest
  FROM repository r JOIN manifest m ON m.id IN (
       SELECT manifest FROM manifest_blob WHERE repository = r.id AND digest = ?2 ORDER BY manifest DESC LIMIT ?5)
 WHERE r.name = ?1 AND m.size <= ?4 ORDER BY m.pushed DESC, m.id DESC LIMIT ?3"""
_BODY = "SELECT body FROM manifest WHERE id = ?"

_HOLDER = """
SELECT r.name FROM blob b JOIN blob_link l ON l.blob = b.id JOIN repository r ON r.id = l.repository
 WHERE b.digest = ?1 AND r.name >= ?2 AND r.name < ?3 LIMIT 1"""

_CONFIRMED = """
SELECT l.confirmed
  FROM repository r JOIN blob b ON b.digest = ?2 JOIN blob_link l ON l.repository = r.id AND l.blob = b.id
 WHERE r.name = ?1"""


class SqliteUpstreamRecords:
    """Reads with `db`, on the event loop; changes through `writer`, of which only `confirm` is durable."""

    def __init__(
        self, db: apsw.Connection, writer: WriterThread | ImmutableDatabase, clock: Callable[[], float]
    ) -> None:
        self._db = db
        self._writer = writer
        self._clock = clock
        self._unknown = 0

    async def last_check(
        self, repo: RepositoryName, reference: Reference, *, blob: bool = False
    ) -> UpstreamCheck | None:
        row = self._db.execute(
            "SELECT at, known FROM upstream_check WHERE repository = ? AND reference = ?", (repo, _key(reference, blob))
        ).get
        return None if row is None else UpstreamCheck(row[0], bool(row[1]))

    async def save_check(self, repo: RepositoryName, reference: Reference, found: bool, *, blob: bool = False) -> None:
        now, key = self._clock(), _key(reference, blob)
        prune = not found and self._unknown % PRUNE_EVERY == 0
        self._unknown += not found

        def note(db: apsw.Connection) -> None:
            db.execute(
                "INSERT INTO upstream_check (repository, reference, at, known) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (repository, reference) DO UPDATE SET at = excluded.at, known = excluded.known",
                (repo, key, now, int(found)),
            )
            if prune:
                _prune(db)

        await self._writer.run(note, durable=False)

    async def forget_checks(
        self, repo: RepositoryName, reference: Reference | None = None, *, blob: bool = False
    ) -> None:
        key = None if reference is None else _key(reference, blob)
        await self._change(
            "DELETE FROM upstream_check WHERE repository = ?1 AND (?2 IS NULL OR reference = ?2)",
            (repo, key),
            ReserveUse.RELIEF,
        )

    async def find_holder(self, prefix: str, digest: Digest) -> RepositoryName | None:
        name = self._db.execute(_HOLDER, (digest, prefix, prefix[:-1] + "0")).get  # '0' comes after '/'
        return None if name is None else RepositoryName(name)

    async def is_confirmed(self, repo: RepositoryName, digest: Digest) -> bool:
        return bool(self._db.execute(_CONFIRMED, (repo, digest)).get)

    async def confirm(self, repo: RepositoryName, digest: Digest) -> None:
        await self._writer.run(lambda db: confirm_blob(db, repo, digest))

    async def referring_manifests(self, repo: RepositoryName, digest: Digest) -> list[Manifest]:
        # Bodies are read afterwards: sorting rows with their bodies would read all of them.
        limits = REFERRING, READ_SIZE, LOOKED_AT
        rows: list[Any] = self._db.execute(_REFERRING, (repo, digest, *limits)).fetchall()
        found, left = [], READ_SIZE
        for number, size, media_type, of in rows:
            left -= size
            if left < 0:
                break
            body = self._db.execute(_BODY, (number,)).get
            if body is None:
                continue  # deleted meanwhile
            manifest = Manifest(body, media_type, str.__new__(Digest, of))
            if manifest.is_readable:
                found.append(manifest)
        return found

    async def bad_senders(self, upstream: str, digest: Digest, seconds: float) -> Mapping[str, BadSender]:
        now = self._clock()
        # If the clock was set back, records from the future count as old.
        rows: list[Any] = self._db.execute(
            "SELECT endpoint, times, at FROM upstream_wrong WHERE upstream = ? AND digest = ? AND at BETWEEN ? AND ?",
            (upstream, digest, now - seconds, now + 1.0),
        ).fetchall()
        return {endpoint: BadSender(times, at) for endpoint, times, at in rows}

    async def save_bad_senders(self, upstream: str, digest: Digest, endpoints: Collection[str], seconds: float) -> None:
        now = self._clock()

        def note(db: apsw.Connection) -> None:
            db.execute("DELETE FROM upstream_wrong WHERE at NOT BETWEEN ? AND ?", (now - seconds, now + 1.0))
            for endpoint in endpoints:
                db.execute(
                    "INSERT INTO upstream_wrong (upstream, digest, endpoint, times, at) VALUES (?, ?, ?, 1, ?) "
                    "ON CONFLICT (upstream, digest, endpoint) DO UPDATE SET times = times + 1, at = excluded.at",
                    (upstream, digest, endpoint, now),
                )

        await self._writer.run(note, durable=False)

    async def forget_bad_senders(self, upstream: str, digests: Collection[Digest]) -> int:
        def forget(db: apsw.Connection) -> int:
            found = 0
            for digest in digests:
                db.execute("DELETE FROM upstream_wrong WHERE upstream = ? AND digest = ?", (upstream, digest))
                found += db.changes() > 0
            return found

        return await self._writer.run(forget, durable=False, need=ReserveUse.RELIEF)

    async def token(self, key: str) -> tuple[str, float] | None:
        row: tuple[str, float] | None = self._db.execute(
            "SELECT token, expires FROM upstream_token WHERE key = ? AND expires > ?", (key, self._clock())
        ).get
        return row

    async def save_token(self, key: str, token: str, expires: float) -> None:
        now = self._clock()

        def keep(db: apsw.Connection) -> None:
            db.execute("DELETE FROM upstream_token WHERE expires <= ?", (now,))
            db.execute("INSERT OR REPLACE INTO upstream_token (key, token, expires) VALUES (?, ?, ?)",
                       (key, token, expires))  # fmt: skip

        await self._writer.run(keep, durable=False)

    async def delete_token(self, key: str, token: str) -> None:
        await self._change("DELETE FROM upstream_token WHERE key = ? AND token = ?", (key, token), ReserveUse.RELIEF)

    async def allowance(self, upstream: str) -> Allowance | None:
        row: Any = self._db.execute(
            "SELECT at, remaining, most, until FROM upstream_allowance WHERE upstream = ?", (upstream,)
        ).get
        return None if row is None else Allowance(*row)

    async def save_allowance(self, upstream: str, allowance: Allowance) -> None:
        """Keeps the newest `remaining`, and the latest `until`."""
        await self._change(
            "INSERT INTO upstream_allowance (upstream, at, remaining, most, until) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (upstream) DO UPDATE SET at = max(at, excluded.at), until = max(until, excluded.until), "
            "remaining = iif(excluded.at >= at, excluded.remaining, remaining), "
            "most = iif(excluded.at >= at, excluded.most, most)",
            (upstream, allowance.at, allowance.remaining, allowance.limit, allowance.until),
        )

    async def _change(
        self, sql: str, values: tuple[str | float | None, ...], need: ReserveUse = ReserveUse.GROWTH
    ) -> None:
        await self._writer.run(lambda db: db.execute(sql, values).fetchall(), durable=False, need=need)


def _key(reference: Reference, blob: bool) -> str:
    """Returns the key of a check. That of a blob has a space, which no reference from a client has."""
    return f"blob {reference}" if blob else reference


def _prune(db: apsw.Connection) -> None:
    """Deletes the oldest 'not found' checks beyond the limit."""
    db.execute(
        "DELETE FROM upstream_check WHERE known = 0 AND at <= (SELECT at FROM upstream_check WHERE known = 0 "
        "ORDER BY at DESC LIMIT 1 OFFSET ?)",
        (UNKNOWN_KEPT,),
    )
