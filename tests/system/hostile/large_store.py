"""Makes a data directory with as much content as an attacker could push. The rows of its metadata database are inserted
in bulk, without a server.

The rows are like those that pushes would insert, except that all manifests have the same small body.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import random
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw

from registry.auth.token import api_tokens
from storage.access import AccountName, Action, TokenLimit
from storage.composition import layout_of, open_registry, prepare_data_dir
from storage.content import BLOB_TYPE, OCI_MANIFEST
from storage.metadata.sqlite.database import create
from storage.patterns import NamePattern

# The numbers of rows.
REPOSITORIES = 200_000
TAGS = 100_000
REFERRERS = 20_000
BARE_REFERRERS = 50_000
GRANTS = 5_000
AUDITED = 100_000
EVENTS = 99_000
LONG_JOBS, RESULT_RECORDS, QUEUED_JOBS = 200, 1_000, 800
"""The number of ended jobs with long results, of records in each result, and of queued jobs."""
WIDE = 30_000
"""The number of tags, or of blobs, of a manifest that the tests delete."""
SPARE_COPIES = 6
"""The number of such manifests with many tags, and of those with many blobs."""
GARBAGE = 100_000
"""Blob links that the garbage collection deletes."""
STALE, FOLDERS = 2_000, 20_000
"""Abandoned upload sessions, and folders of unknown sessions."""
ANNOTATION = 2_000
"""The size of the annotation of each ordinary referrer in bytes."""
HUGE_REFERRERS, HUGE = 3, 6 << 20
"""The number of referrers with a huge annotation, and its size in bytes."""


def digest(text: str) -> str:
    """Returns the digest of the text."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


# The subjects of referrers with an annotation, without one, and with a huge one.
SUBJECT, BARE_SUBJECT, HUGE_SUBJECT = digest("subject"), digest("bare subject"), digest("huge subject")
SLOW_LIMITS = [f"{'*/' * (number % 3 + 1)}*0{number}z" for number in range(40)]
"""Patterns that match no repository name. The mismatch is only at the end of a name, so matching is slow."""


def login(name: str, token: str) -> str:
    """Returns the Authorization header with which an account logs in with an API token."""
    return "Basic " + base64.b64encode(f"{name}:{token}".encode()).decode()


def build(data: Path) -> dict[str, str]:
    """Makes the large data directory, whose search index is complete. Returns the Authorization header of each account
    by name."""
    prepare_data_dir(data)
    with _writing(data) as rows:
        rows.add_repositories("r/%06d/app", REPOSITORIES)
        rows.add_tags("large/tags", TAGS)
        rows.add_referrers("large/referrers", SUBJECT, REFERRERS, ANNOTATION)
        rows.add_referrers("large/bare", BARE_SUBJECT, BARE_REFERRERS, 0)
        rows.add_referrers("large/huge", HUGE_SUBJECT, HUGE_REFERRERS, HUGE)
        for number in range(SPARE_COPIES):
            rows.add_tags(f"wide/tags{number}", WIDE, history=False)
            rows.add_wide_manifest(f"wide/blobs{number}", WIDE)
        rows.add_audit(AUDITED)
        rows.add_events(EVENTS)
        rows.add_jobs(LONG_JOBS, QUEUED_JOBS)
        logins = rows.add_accounts()
    asyncio.run(_index(data))
    return logins


async def _index(data: Path) -> None:
    """Completes the search index, so that no worker does this work while its memory is measured."""
    async with open_registry(data) as store:
        while store.search_indexer.has_unindexed():
            await store.search_indexer.run()


def build_links(data: Path) -> None:
    """Makes a data directory with many links between a repository and blobs that no manifest refers to."""
    prepare_data_dir(data)
    with _writing(data) as rows:
        rows.add_garbage(rows.repository("left/over", 0), GARBAGE)


def build_sessions(data: Path) -> None:
    """Makes a data directory with many abandoned upload sessions, and many folders of unknown sessions."""
    prepare_data_dir(data)
    with _writing(data) as rows:
        rows.add_stale_uploads("left/over", STALE)
    chance = random.Random(1)
    for _ in range(FOLDERS):
        folder = layout_of(data).uploads / str(uuid.UUID(int=chance.getrandbits(128), version=4))
        folder.mkdir()
        os.utime(folder, (0, 0))


@contextmanager
def _writing(data: Path) -> Iterator[Rows]:
    """Runs the `with` block in one transaction, and writes the result into the database file with a checkpoint."""
    db = create(layout_of(data).metadata)
    try:
        db.pragma("synchronous", "OFF")
        with db:
            yield Rows(db)
        db.pragma("synchronous", "FULL")
        db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    finally:
        db.close()


class Rows:
    """Inserts rows into the database, with times of about 30 days ago."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db
        self._now = time.time() - 30 * 86400.0
        self._next = 0  # the id of the newest manifest

    def repository(self, name: str, manifests: int) -> int:
        """Adds a repository. Returns its id. `manifests`: the number of its manifests."""
        sql = "INSERT INTO repository (name, created, manifests) VALUES (?, ?, ?) RETURNING id"
        return int(self._db.execute(sql, (name, self._now, manifests)).get)

    def add_repositories(self, name: str, count: int) -> None:
        """Adds `count` repositories, each with one manifest and one tag."""
        first = self._next + 1
        self._next += count
        numbers = range(first, first + count)  # the ids of the manifests, and of their repositories
        self._db.executemany(
            "INSERT INTO repository (id, name, created, manifests) VALUES (?, ?, ?, 1)",
            ((number, name % (number - first), self._now) for number in numbers),
        )
        self._add_manifests((number, number, f"manifest {number}", None, "") for number in numbers)
        self._db.executemany(
            "INSERT INTO tag (repository, name, manifest, updated) VALUES (?, 'latest', ?, ?)",
            ((number, number, self._now) for number in numbers),
        )

    def add_tags(self, name: str, count: int, history: bool = True) -> None:
        """Adds a repository with one manifest and `count` tags of it. `history`: whether each tag has an entry in its
        history."""
        repository, manifest = self.repository(name, 1), self._take()
        self._add_manifests([(manifest, repository, name, None, "")])
        self._db.executemany(
            "INSERT INTO tag (repository, name, manifest, updated) VALUES (?, ?, ?, ?)",
            ((repository, f"t{number:06d}", manifest, self._now) for number in range(count)),
        )
        if history:
            self._db.executemany(
                "INSERT INTO tag_history (repository, tag, digest, at, actor, address, request_id, user_agent) "
                "VALUES (?, ?, ?, ?, 'anonymous', '127.0.0.1', '', 'test')",
                ((repository, f"t{number:06d}", digest(name), self._now + number) for number in range(count)),
            )

    def add_referrers(self, name: str, subject: str, count: int, annotation: int) -> None:
        """Adds a repository with `count` referrers of `subject`. `annotation`: the size of the annotation of each in
        bytes."""
        repository = self.repository(name, count)
        note = json.dumps({"org.example.note": "n" * annotation}) if annotation else ""
        first = self._next + 1
        self._next += count
        self._add_manifests(
            (number, repository, f"{name} {number}", subject, note) for number in range(first, first + count)
        )

    def add_wide_manifest(self, name: str, count: int) -> None:
        """Adds a repository with one manifest that refers to `count` blobs."""
        repository, manifest = self.repository(name, 1), self._take()
        self._add_manifests([(manifest, repository, name, None, "")])
        self._db.executemany(
            "INSERT INTO manifest_blob (repository, digest, manifest) VALUES (?, ?, ?)",
            (
                (repository, blob_digest, manifest)
                for blob_digest in sorted(digest(f"{name} {number}") for number in range(count))
            ),
        )

    def add_audit(self, count: int) -> None:
        """Adds `count` entries to the audit log."""
        self._db.executemany(
            "INSERT INTO audit (at, actor, action, target, part, outcome, address, request_id, user_agent, detail, "
            "count) VALUES (?, 'somebody', 'blob.mount', 'team/app', ?, 'ok', '127.0.0.1', '', 'test', ?, 1)",
            ((self._now + number, f"@{digest(str(number))}", '{"from": "team/base"}') for number in range(count)),
        )

    def add_events(self, count: int) -> None:
        """Adds `count` events to the list of events."""
        self._db.executemany(
            "INSERT INTO event (uuid, at, action, repository, tag, digest, media_type, size, actor, address, "
            "request_id, user_agent, reason, kept) VALUES (?, ?, 'push', ?, 'latest', ?, ?, 500, 'somebody', "
            "'127.0.0.1', '', 'test', '', 1)",
            (
                (str(uuid.UUID(int=number)), self._now, f"r/{number:06d}/app", digest(str(number)), OCI_MANIFEST)
                for number in range(count)
            ),
        )

    def add_jobs(self, ended: int, queued: int) -> None:
        """Adds `ended` jobs with long results, and `queued` jobs of a kind that no server runs."""
        record = {"kind": "blob", "repository": None, "item": digest("garbage"), "bytes": 1, "reason": "r" * 100}
        result = json.dumps({"dry_run": True, "bytes": 1, "records": [record] * RESULT_RECORDS})
        insert = (
            "INSERT INTO job (kind, arguments, state, actor, holder, resumable, created, updated, ended, result) "
            "VALUES (?1, '{}', ?2, 'somebody', '', 1, ?3, ?3, ?4, ?5)"
        )
        self._db.executemany(insert, [("gc", "done", self._now, self._now, result)] * ended)
        self._db.executemany(insert, [("other", "queued", self._now, None, None)] * queued)

    def add_accounts(self) -> dict[str, str]:
        """Adds accounts. Everyone may pull, push and delete. The account `limited` has a token with slow patterns. The
        account `many` has thousands of grants (permissions by pattern) that match no repository."""
        self._db.execute("UPDATE access SET closed = 1, epoch = epoch + 1")
        everyone_grant = [("everyone", "", "**", 7)]
        many_grants = [("user", "many", f"team{number}/*/*-{number}/*b", 1) for number in range(GRANTS)]
        self._db.executemany(
            "INSERT INTO access_grant (kind, name, pattern, actions) VALUES (?, ?, ?, ?)", everyone_grant + many_grants
        )
        limits = tuple(TokenLimit(NamePattern(pattern), Action.PULL) for pattern in SLOW_LIMITS)
        one_limit = (TokenLimit(NamePattern("*/*/*z"), Action.PULL),)
        return {
            "admin": self._account("admin", admin=True),
            "limited": self._account("limited", limits=limits),
            "one": self._account("one", limits=one_limit),
            "many": self._account("many"),
        }

    def _account(self, name: str, *, admin: bool = False, limits: tuple[TokenLimit, ...] | None = None) -> str:
        """Adds an account with an API token. Returns its Authorization header. `limits`: the patterns of the token."""
        self._db.execute(
            "INSERT INTO account (name, kind, password, enabled, admin, version, created, note) "
            "VALUES (?, 'user', NULL, 1, ?, 1, ?, '')",
            (name, int(admin), self._now),
        )
        created = api_tokens.make(AccountName(name), now=self._now)
        limits_json = None if limits is None else json.dumps([(limit.pattern, int(limit.actions)) for limit in limits])
        self._db.execute(
            "INSERT INTO api_token (id, account, purpose, note, secret, created, expires, limits) "
            "VALUES (?, ?, 'personal', '', ?, ?, NULL, ?)",
            (created.token.id, name, created.secret_hash, self._now, limits_json),
        )
        return login(name, created.text)

    def add_garbage(self, repository: int, count: int) -> None:
        """Adds links to `count` blobs that no manifest refers to. The files of these blobs do not exist."""
        digests = sorted(digest(f"garbage {number}") for number in range(count))
        self._db.executemany(
            "INSERT INTO blob (id, digest, size, place, created) VALUES (?, ?, 0, ?, ?)",
            (
                (number, blob_digest, f"blobs/sha256/{blob_digest[7:9]}/{blob_digest[7:]}", self._now)
                for number, blob_digest in enumerate(digests, 1)
            ),
        )
        self._db.executemany(
            "INSERT INTO blob_link (repository, blob, needed) VALUES (?, ?, ?)",
            ((repository, number, self._now) for number in range(1, count + 1)),
        )
        self._db.executemany(
            "INSERT INTO collect_queue (repository, digest, since) VALUES (?, ?, ?)",
            ((repository, blob_digest, self._now) for blob_digest in digests),
        )

    def add_stale_uploads(self, name: str, count: int) -> None:
        """Adds `count` upload sessions that expired long ago. `name`: their repository."""
        chance = random.Random(2)
        self._db.executemany(
            "INSERT INTO upload (id, repository, algorithm, offset, boot, started, touched, owner) "
            "VALUES (?, ?, 'sha256', 0, '', ?, ?, '')",
            (
                (str(uuid.UUID(int=chance.getrandbits(128), version=4)), name, self._now, self._now)
                for _ in range(count)
            ),
        )

    def _take(self) -> int:
        """Returns the id for the next manifest."""
        self._next += 1
        return self._next

    def _add_manifests(self, manifests: Iterable[tuple[int, int, str, str | None, str]]) -> None:
        """Adds manifests. Each is a tuple of its id, the id of its repository, the text whose digest it gets, its
        subject, and its annotations as JSON."""

        def rows() -> Iterator[tuple[object, ...]]:
            for number, repository, text, subject, notes in manifests:
                kind = "application/vnd.example.sbom" if subject else BLOB_TYPE
                body = b"{}"
                yield (
                    *(number, repository, digest(text), OCI_MANIFEST, len(body), subject, kind),
                    *(notes or None, self._now, body),
                )

        self._db.executemany(
            "INSERT INTO manifest (id, repository, digest, media_type, size, subject, artifact_type, annotations, "
            "pushed, body) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            rows(),
        )
