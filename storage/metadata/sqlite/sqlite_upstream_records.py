"""Stores the mirror's records about its upstream registries in the metadata database (`SqliteUpstreamRecords`).

- An *upstream* is a registry that this registry mirrors. An *endpoint* is one of its servers.
- A *check* is a request that asked an upstream whether it has a manifest or blob. The store records the time and the
  answer: found, or "not found".
- A *link* is a row that lets a repository of this registry serve a blob. A link is *confirmed* in these cases:

  - A client pushed the blob to the repository.
  - The mirror downloaded the blob for the repository.
  - The upstream is private, and reported that it has the blob in the upstream repository that this repository mirrors.

- A *bad sender* is an endpoint that sent *corrupt* bytes for a blob: bytes that do not have the blob's digest. The
  table `upstream_wrong` counts how often each endpoint sent corrupt bytes for a blob.
- An *allowance* is the rate limit that an upstream stated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import apsw

from storage.content import Allowance, CorruptionRecord, Manifest, UpstreamCheck
from storage.data_dir.reserve import ReserveUse
from storage.metadata.sqlite.blob_changes import confirm_blob
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase
from storage.metadata.sqlite.lookup_cache import LookupCache, bytes_of_record
from storage.names import Digest, Reference, RepositoryName
from storage.upstream_records import CLOCK_TOLERANCE_SECONDS, MAX_PAUSE_SECONDS

MAX_NOT_FOUND_CHECKS = 10_000
"""Approximate largest number of stored 'not found' checks. Without this limit, clients could fill the disk by requests
for content that does not exist."""
CHECKS_PER_PRUNE = 64
"""A process deletes surplus 'not found' checks when it stores its first 'not found' check, and then each time that it
has stored this number of them."""
MAX_TOKENS = 2000
"""Largest number of stored bearer tokens of upstreams. Without this limit, clients could fill the disk, because some
token services issue a long-lived token for any repository name."""
MAX_REFERRING_MANIFESTS = 8
"""Largest number of manifests that `referring_manifests` returns."""
MAX_PARSED_BYTES = 256 * 1024
"""Largest total size in bytes of the manifests that `referring_manifests` parses. The size is limited because the
manifests are parsed on the event loop."""
MAX_ROWS_SEARCHED = 500
"""Largest number of manifests among which `referring_manifests` searches: those with the highest row ids."""
_DELETE_SURPLUS_TOKENS = """
DELETE FROM upstream_token WHERE key IN (
    SELECT key FROM upstream_token WHERE key <> ?1 ORDER BY expires DESC LIMIT -1 OFFSET ?2)"""
"""Deletes all tokens except the token with the key ?1 and the ?2 other tokens that expire last. LIMIT -1: no limit."""
_REFERRING_MANIFESTS = """
SELECT m.id, m.size, m.media_type, m.digest
  FROM repository r JOIN manifest m ON m.id IN (
       SELECT manifest FROM manifest_blob WHERE repository = r.id AND digest = ?2 ORDER BY manifest DESC LIMIT ?5)
 WHERE r.name = ?1 AND m.size <= ?4 ORDER BY m.pushed DESC, m.id DESC LIMIT ?3"""
_BODY = "SELECT body FROM manifest WHERE id = ?"

_REPOSITORY_WITH_BLOB = """
SELECT r.name FROM blob b JOIN blob_link l ON l.blob = b.id JOIN repository r ON r.id = l.repository
 WHERE b.digest = ?1 AND r.name >= ?2 AND r.name < ?3 LIMIT 1"""

_SAVE_ALLOWANCE = """
INSERT INTO upstream_allowance (upstream, at, remaining, most, until) VALUES (?1, ?2, ?3, ?4, ?5)
    ON CONFLICT (upstream) DO UPDATE
   SET at = iif(at > ?6, excluded.at, max(at, excluded.at)),
       remaining = iif(at > ?6 OR excluded.at >= at, excluded.remaining, remaining),
       most = iif(at > ?6 OR excluded.at >= at, excluded.most, most),
       until = max(iif(until > ?7, 0.0, until), excluded.until)"""
"""Stores a rate limit, or merges it into the stored one (`SqliteUpstreamRecords.save_allowance`). The column `most`
contains `Allowance.limit`. A stored time that is too far in the future was stored before the clock was set back:

- If the stored `at` is later than ?6, the new `at`, `remaining` and `most` replace the stored values.
- If the stored `until` is later than ?7, the new `until` replaces the stored value."""

_IS_CONFIRMED = """
SELECT l.confirmed
  FROM repository r JOIN blob b ON b.digest = ?2 JOIN blob_link l ON l.repository = r.id AND l.blob = b.id
 WHERE r.name = ?1"""


class SqliteUpstreamRecords:
    """Implements `UpstreamRecords`. Reads run on the event loop.

    A change by `confirm` is durable when the method returns. A power cut may lose other recent changes; the mirror can
    get the same information from its upstreams again. On a full disk, changes that only delete records may use the
    whole *reserve* (`ReserveUse.ALL`), disk space that the registry keeps allocated for this case."""

    def __init__(
        self,
        db: apsw.Connection,
        cache: LookupCache,
        writer: CommitThread | ImmutableDatabase,
        clock: Callable[[], float],
    ) -> None:
        """Reads checks through `cache`, and other records with `db`. Changes run through `writer`. While the disk is
        too full to open the database normally, `writer` is an ImmutableDatabase, which refuses all changes
        (StorageFull). `clock` returns the time in seconds since 1970."""
        self._db = db
        self._cache = cache
        self._writer = writer
        self._clock = clock
        self._not_found_count = 0
        """Number of 'not found' checks that this process has stored."""

    async def last_check(
        self, repo: RepositoryName, reference: Reference, *, blob: bool = False
    ) -> UpstreamCheck | None:
        """Returns the last check of the manifest `reference`, or, if `blob` is true, of the blob with the digest
        `reference`. Returns None if no check is stored."""
        return self._cache.look_up(bytes_of_record, _find_check, repo, _key_of_check(reference, blob))

    async def save_check(self, repo: RepositoryName, reference: Reference, found: bool, *, blob: bool = False) -> None:
        """Stores a check that was made now. `found`: whether the upstream has the manifest `reference`, or, if `blob`
        is true, the blob with the digest `reference`."""
        now, key = self._clock(), _key_of_check(reference, blob)
        should_prune = not found and self._not_found_count % CHECKS_PER_PRUNE == 0
        self._not_found_count += not found

        def store(db: apsw.Connection) -> None:
            db.execute(
                "INSERT INTO upstream_check (repository, reference, at, known) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (repository, reference) DO UPDATE SET at = excluded.at, known = excluded.known",
                (repo, key, now, int(found)),
            )
            if should_prune:
                _prune_not_found_checks(db, now)

        await self._writer.run(store, durable=False)

    async def forget_checks(
        self, repo: RepositoryName, reference: Reference | None = None, *, blob: bool = False
    ) -> None:
        """Deletes the last check of the manifest `reference`, or, if `blob` is true, of the blob with the digest
        `reference`. Without `reference`, deletes all checks of the repository."""
        key = None if reference is None else _key_of_check(reference, blob)
        await self._execute(
            "DELETE FROM upstream_check WHERE repository = ?1 AND (?2 IS NULL OR reference = ?2)",
            (repo, key),
            reserve_use=ReserveUse.ALL,
        )

    async def find_holder(self, prefix: str, digest: Digest) -> RepositoryName | None:
        """Returns a repository that has a link to the blob and whose name begins with `prefix`. `prefix` ends with a
        slash. Returns None if there is no such repository."""
        end_of_names = prefix[:-1] + "0"  # sorts behind all names with the prefix: in byte order, "0" follows "/"
        name = self._db.execute(_REPOSITORY_WITH_BLOB, (digest, prefix, end_of_names)).get
        return None if name is None else RepositoryName(name)

    async def is_confirmed(self, repo: RepositoryName, digest: Digest) -> bool:
        """Returns whether the repository has a confirmed link to the blob."""
        return bool(self._db.execute(_IS_CONFIRMED, (repo, digest)).get)

    async def confirm(self, repo: RepositoryName, digest: Digest) -> None:
        """Marks the repository's link to the blob as confirmed. Does nothing if there is no such link."""
        await self._writer.run(lambda db: confirm_blob(db, repo, digest))

    async def referring_manifests(self, repo: RepositoryName, digest: Digest) -> list[Manifest]:
        """Returns the manifests of the repository that refer to the blob as config or layer, newest first. Returns at
        most `MAX_REFERRING_MANIFESTS` manifests, and at most `MAX_PARSED_BYTES` bytes in total. Leaves out manifests
        that cannot be parsed, and manifests of more than `MAX_PARSED_BYTES`."""
        # The first statement reads no bodies, because SQLite would read the bodies of all rows to sort the rows.
        limits = MAX_REFERRING_MANIFESTS, MAX_PARSED_BYTES, MAX_ROWS_SEARCHED
        rows: list[Any] = self._db.execute(_REFERRING_MANIFESTS, (repo, digest, *limits)).fetchall()
        manifests, remaining_bytes = [], MAX_PARSED_BYTES
        for manifest_id, size, media_type, manifest_digest in rows:
            remaining_bytes -= size
            if remaining_bytes < 0:
                break
            body = self._db.execute(_BODY, (manifest_id,)).get
            if body is None:
                continue  # the manifest was deleted after the first statement
            manifest = Manifest(body, media_type, str.__new__(Digest, manifest_digest))
            if manifest.is_readable:
                manifests.append(manifest)
        return manifests

    async def bad_senders(self, upstream: str, digest: Digest, seconds: float) -> Mapping[str, CorruptionRecord]:
        """Returns the endpoints of the upstream that sent corrupt bytes for the blob within the last `seconds` seconds.
        Maps each endpoint to how often it sent corrupt bytes, and when it last did. The table `upstream_wrong` contains
        these records."""
        now = self._clock()
        # The upper bound leaves out records with a time in the future, which were stored before the clock was set back.
        rows: list[Any] = self._db.execute(
            "SELECT endpoint, times, at FROM upstream_wrong WHERE upstream = ? AND digest = ? AND at BETWEEN ? AND ?",
            (upstream, digest, now - seconds, now + CLOCK_TOLERANCE_SECONDS),
        ).fetchall()
        return {endpoint: CorruptionRecord(times, at) for endpoint, times, at in rows}

    async def save_bad_senders(self, upstream: str, digest: Digest, endpoints: Collection[str], seconds: float) -> None:
        """Adds one to the number of times that each of the endpoints sent corrupt bytes for the blob. First deletes,
        for all blobs, the records that are older than `seconds` seconds, and the records with a time in the future,
        which were stored before the clock was set back."""
        now = self._clock()

        def store(db: apsw.Connection) -> None:
            db.execute(
                "DELETE FROM upstream_wrong WHERE at NOT BETWEEN ? AND ?",
                (now - seconds, now + CLOCK_TOLERANCE_SECONDS),
            )
            for endpoint in endpoints:
                db.execute(
                    "INSERT INTO upstream_wrong (upstream, digest, endpoint, times, at) VALUES (?, ?, ?, 1, ?) "
                    "ON CONFLICT (upstream, digest, endpoint) DO UPDATE SET times = times + 1, at = excluded.at",
                    (upstream, digest, endpoint, now),
                )

        await self._writer.run(store, durable=False)

    async def forget_bad_senders(self, upstream: str, digests: Collection[Digest]) -> int:
        """Deletes the records of bad senders of the blobs `digests` at the upstream. Returns how many of these blobs
        had such records."""

        def forget(db: apsw.Connection) -> int:
            blobs_with_records = 0
            for digest in digests:
                db.execute("DELETE FROM upstream_wrong WHERE upstream = ? AND digest = ?", (upstream, digest))
                blobs_with_records += db.changes() > 0
            return blobs_with_records

        return await self._writer.run(forget, durable=False, reserve_use=ReserveUse.ALL)

    async def token(self, key: str) -> tuple[str, float] | None:
        """Returns the bearer token that is stored under `key`, and the time at which the token expires (seconds since
        1970). Each combination of endpoint, scope and login has its own key. Returns None if there is no token, or if
        the token has expired."""
        row: tuple[str, float] | None = self._db.execute(
            "SELECT token, expires FROM upstream_token WHERE key = ? AND expires > ?", (key, self._clock())
        ).get
        return row

    async def save_token(self, key: str, token: str, expires: float) -> None:
        """Stores a bearer token of an upstream under `key`, and replaces an earlier token under this key. `expires`:
        the time at which the token expires, in seconds since 1970. Deletes all expired tokens. Then keeps at most
        `MAX_TOKENS` tokens: the new token, and the tokens that expire last."""
        now = self._clock()

        def store(db: apsw.Connection) -> None:
            db.execute("DELETE FROM upstream_token WHERE expires <= ?", (now,))
            db.execute("INSERT OR REPLACE INTO upstream_token (key, token, expires) VALUES (?, ?, ?)",
                       (key, token, expires))  # fmt: skip
            db.execute(_DELETE_SURPLUS_TOKENS, (key, MAX_TOKENS - 1))

        await self._writer.run(store, durable=False)

    async def delete_token(self, key: str, token: str) -> None:
        """Deletes the token under `key` if it is still equal to `token`."""
        await self._execute(
            "DELETE FROM upstream_token WHERE key = ? AND token = ?", (key, token), reserve_use=ReserveUse.ALL
        )

    async def allowance(self, key: str) -> Allowance | None:
        """Returns the rate limit that the upstream stated last; None if no rate limit is stored. `key`: see
        `UpstreamRecords.allowance`."""
        row: Any = self._db.execute(
            "SELECT at, remaining, most, until FROM upstream_allowance WHERE upstream = ?", (key,)
        ).get
        return None if row is None else Allowance(*row)

    async def save_allowance(self, key: str, allowance: Allowance) -> None:
        """Stores a rate limit that the upstream stated at `allowance.at`. `key`: see `UpstreamRecords.allowance`.

        If a rate limit is stored already, merges both: `remaining` and `limit` come from the newer rate limit, and
        `until` gets the later value. The mirror must not send a request before `until`.

        After the clock was set back, stored times may be in the future. A stored rate limit whose `at` is in the future
        counts as the older one. A stored `until` more than `MAX_PAUSE_SECONDS` from now counts as no pause."""
        now = self._clock()
        await self._execute(
            _SAVE_ALLOWANCE,
            (
                *(key, allowance.at, allowance.remaining, allowance.limit, allowance.until),
                *(now + CLOCK_TOLERANCE_SECONDS, now + MAX_PAUSE_SECONDS),
            ),
        )

    async def _execute(
        self, sql: str, values: tuple[str | float | None, ...], *, reserve_use: ReserveUse = ReserveUse.NONE
    ) -> None:
        """Runs a statement that changes records. The change may be lost in a power cut. `reserve_use`: how much of
        the reserve the change may use on a full disk."""
        await self._writer.run(lambda db: db.execute(sql, values).fetchall(), durable=False, reserve_use=reserve_use)


def _key_of_check(reference: Reference, blob: bool) -> str:
    """Returns the key under which the check of a manifest, or, if `blob` is true, of a blob is stored. Only keys of
    blobs contain a space, so a manifest and a blob never have the same key."""
    return f"blob {reference}" if blob else reference


def _find_check(db: apsw.Connection, repo: RepositoryName, key: str) -> UpstreamCheck | None:
    """Returns the check with this key (`_key_of_check`); None if no check is stored."""
    row = db.execute("SELECT at, known FROM upstream_check WHERE repository = ? AND reference = ?", (repo, key)).get
    return None if row is None else UpstreamCheck(row[0], bool(row[1]))


def _prune_not_found_checks(db: apsw.Connection, now: float) -> None:
    """Deletes the oldest 'not found' checks if there are more than `MAX_NOT_FOUND_CHECKS`. First deletes 'not found'
    checks with a time in the future: they were stored before the clock was set back, and would count as the newest."""
    db.execute("DELETE FROM upstream_check WHERE known = 0 AND at > ?", (now + CLOCK_TOLERANCE_SECONDS,))
    db.execute(
        "DELETE FROM upstream_check WHERE known = 0 AND at <= (SELECT at FROM upstream_check WHERE known = 0 "
        "ORDER BY at DESC LIMIT 1 OFFSET ?)",
        (MAX_NOT_FOUND_CHECKS,),
    )
