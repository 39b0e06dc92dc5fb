"""Stores jobs in the metadata database (`SqliteJobs`).

A *job* is long work, such as a backup. Its *holder* is the process that runs it. A job is *active* while it is queued
or running.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, TypeVar

import apsw

from storage.content import Page
from storage.data_dir.reserve import ReserveUse
from storage.errors import StorageFailed, TooManyRequests
from storage.jobs import JSON, MAX_QUEUED_JOBS, Job, JobProgress, JobState, JobUnknown
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.scan_thread import ScanThread

T = TypeVar("T")

MAX_JOBS: Final = 1000
"""The newest jobs, up to this number, are kept. When a job is added, older jobs are deleted, except active jobs."""
MAX_UNCHANGED_BYTES: Final = 1000
"""Largest size, in bytes, of the JSON texts (arguments and results) that a list of jobs contains unchanged. A longer
text is shortened (`_shortened`)."""
MAX_SHORTENED_BYTES: Final = 4000
"""Largest size of a shortened text in bytes. A list of jobs contains `{}` in place of a larger text."""
JOBS_PER_READ: Final = 50
"""Largest number of jobs that one lookup reads. The limit keeps lookups short: SQLite needs about a millisecond to
shorten a long result."""
QUEUE_RETRY_SECONDS: Final = 60
"""The value of the Retry-After header if too many jobs are queued."""
_COLUMNS: Final = (
    "id, kind, arguments, state, actor, holder, resumable, stopping, created, updated, ended, done, total, unit, "
    "message, position, result"
)
_IS_ACTIVE: Final = "state IN ('queued', 'running')"
_DELETE_OLD_JOBS: Final = f"""
DELETE FROM job WHERE id <= (SELECT id FROM job ORDER BY id DESC LIMIT 1 OFFSET {MAX_JOBS}) AND NOT {_IS_ACTIVE}"""
_IS_QUEUE_FULL: Final = f"""
SELECT count(*) >= {MAX_QUEUED_JOBS} FROM job INDEXED BY job_active
 WHERE {_IS_ACTIVE} AND kind = ? AND state = 'queued'"""
_SELECT_OLDEST_ACTIVE: Final = f"""
SELECT k.value, (SELECT min(id) FROM job INDEXED BY job_active WHERE {_IS_ACTIVE} AND kind = k.value)
  FROM json_each(?) k"""


def _shortened(column: str) -> str:
    """Returns an SQL expression that shortens the JSON text of a column. Its value is:

    - the text, if the text has at most `MAX_UNCHANGED_BYTES` or is NULL.
    - for a longer JSON object: the object without the fields that are arrays; `{}`, if the object without these fields
      has more than `MAX_SHORTENED_BYTES`.
    - `{}` for any other longer text."""
    short = f"""(
      SELECT json_group_object(key, CASE type WHEN 'object' THEN json(value) WHEN 'true' THEN json(type)
                                    WHEN 'false' THEN json(type) ELSE value END)
        FROM json_each({column}) WHERE type <> 'array')"""
    return f"""
    CASE WHEN octet_length({column}) <= {MAX_UNCHANGED_BYTES} OR {column} IS NULL THEN {column}
         WHEN substr({column}, 1, 1) <> '{{' THEN '{{}}'
         ELSE (SELECT iif(octet_length(short) <= {MAX_SHORTENED_BYTES}, short, '{{}}')
                 FROM (SELECT {short} AS short)) END"""


_LISTED_COLUMNS: Final = (
    f"id, kind, {_shortened('arguments')}, state, actor, holder, resumable, stopping, created, updated, ended, done, "
    f"total, unit, message, NULL, {_shortened('result')}"
)
_SELECT_JOBS: Final = f"""
SELECT {_LISTED_COLUMNS} FROM job WHERE (?1 IS NULL OR id < ?1) AND (?2 IS NULL OR kind = ?2)
 ORDER BY id DESC LIMIT ?3"""
_SELECT_ACTIVE_JOBS: Final = f"""
SELECT {_LISTED_COLUMNS} FROM job WHERE id IN (
  SELECT id FROM job WHERE {_IS_ACTIVE} AND (?1 IS NULL OR kind = ?1) ORDER BY id LIMIT ?2)
 ORDER BY id"""


class SqliteJobs:
    """Implements `storage.jobs.Jobs`, which describes the methods.

    On a full disk, changes may use half of the reserve (disk space that is set aside for a full disk), because jobs can
    free disk space."""

    def __init__(
        self,
        db: apsw.Connection,
        writer: CommitThread | ImmutableDatabase,
        scans: ScanThread | ImmutableScans,
        clock: Callable[[], float],
        data_version: Callable[[], object],
    ) -> None:
        """Parameters:

        - `db`: the connection for `oldest_active_ids`.
        - `writer`: runs the changes.
        - `scans`: runs slow lookups. The lookups that return jobs can be slow, because the result of a job can be long.
        - `clock`: returns the time in seconds since 1970.
        - `data_version`: returns a value that changes with every commit to the database."""
        self._db = db
        self._data_version = data_version
        self._last_empty_call: tuple[object, frozenset[str]] | None = None
        """The data version and the kinds of the last call of `oldest_active_ids` if it found no active jobs; otherwise
        None."""
        self._writer = writer
        self._scans = scans
        self._clock = clock

    async def add(
        self, kind: str, arguments: Mapping[str, JSON], *, actor: str, holder: str = "", is_resumable: bool = False
    ) -> Job:
        now = self._clock()
        state = JobState.RUNNING if holder else JobState.QUEUED
        row = (kind, json.dumps(dict(arguments)), state, actor, holder, int(is_resumable), now, now)

        def insert(db: apsw.Connection) -> Job:
            if state is JobState.QUEUED and db.execute(_IS_QUEUE_FULL, (kind,)).get:
                raise TooManyRequests(
                    f"{MAX_QUEUED_JOBS} jobs of the kind {kind} are queued already; stop some of them, or try "
                    "again when some have ended",
                    retry_after=QUEUE_RETRY_SECONDS,
                )
            inserted: Any = db.execute(
                "INSERT INTO job (kind, arguments, state, actor, holder, resumable, created, updated) "
                f"VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING {_COLUMNS}",
                row,
            ).fetchone()
            db.execute(_DELETE_OLD_JOBS)
            return _to_job(inserted)

        return await self._writer.run(insert, reserve_use=ReserveUse.HALF)

    async def job(self, job_id: int) -> Job:
        return await self._run_lookup(partial(_find_job, job_id=job_id))

    async def jobs(self, before: int | None, limit: int, kind: str | None = None) -> Page[Job]:
        jobs: list[Job] = []
        position, has_more = before, True
        while has_more and len(jobs) <= limit:
            max_read = min(JOBS_PER_READ, limit + 1 - len(jobs))
            portion = await self._run_lookup(partial(_read_jobs, _SELECT_JOBS, (position, kind, max_read)))
            jobs += portion
            has_more = len(portion) == max_read
            position = jobs[-1].id if jobs else None
        return Page(jobs[:limit], more=len(jobs) > limit)

    async def active(self, kind: str | None = None, limit: int = 1000) -> Sequence[Job]:
        return await self._run_lookup(partial(_read_jobs, _SELECT_ACTIVE_JOBS, (kind, limit)))

    async def oldest_active_ids(self, kinds: Collection[str]) -> Mapping[str, int]:
        with _as_storage_failed():
            # Every server process calls this method once a second. If the last call found no active jobs, and the
            # database has not changed, there is nothing to read.
            call = self._data_version(), frozenset(kinds)
            if call == self._last_empty_call:
                return {}
            rows: list[Any] = self._db.execute(_SELECT_OLDEST_ACTIVE, (json.dumps(list(kinds)),)).fetchall()
        found = {kind: job_id for kind, job_id in rows if job_id is not None}
        self._last_empty_call = None if found else call
        return found

    async def start(self, job_id: int, holder: str) -> Job:
        return await self._change(
            job_id, "state = 'running', holder = :holder, updated = :now", {"holder": holder}, durable=True
        )

    async def save_progress(self, job_id: int, progress: JobProgress) -> bool:
        values = {
            "done": progress.done,
            "total": progress.total,
            "unit": progress.unit,
            "message": progress.message,
            "position": None if progress.position is None else json.dumps(progress.position),
        }
        job = await self._change(
            job_id,
            "done = :done, total = :total, unit = :unit, message = :message, position = :position, updated = :now",
            values,
            durable=False,
        )
        return job.is_stopping

    async def end(self, job_id: int, state: JobState, message: str, result: JSON | None = None) -> None:
        values = {"state": state, "message": message, "result": None if result is None else json.dumps(result)}
        await self._change(
            job_id,
            "state = :state, message = :message, result = :result, updated = :now, ended = :now",
            values,
            durable=True,
        )

    async def request_stop(self, job_id: int) -> Job:
        return await self._change(
            job_id,
            f"stopping = CASE WHEN {_IS_ACTIVE} THEN 1 ELSE stopping END, "
            "ended = CASE state WHEN 'queued' THEN :now ELSE ended END, "
            "state = CASE state WHEN 'queued' THEN 'stopped' ELSE state END, updated = :now",
            {},
            durable=True,
        )

    async def _run_lookup(self, lookup: Callable[[apsw.Connection], T]) -> T:
        """Runs a lookup that returns jobs. Raises StorageFailed if SQLite fails, and the errors of `lookup`, such as
        JobUnknown."""
        with _as_storage_failed():
            return await self._scans.run(lookup)

    async def _change(self, job_id: int, assignments: str, values: Mapping[str, Any], *, durable: bool) -> Job:
        """Changes the row of a job, and returns the changed job. `assignments`: the SQL text after `SET`. `values`: the
        values of its named parameters. `durable`: whether the change must survive a power cut. Raises JobUnknown."""
        bindings = {**values, "id": job_id, "now": self._clock()}

        def update(db: apsw.Connection) -> Job:
            row: Any = db.execute(
                f"UPDATE job SET {assignments} WHERE id = :id RETURNING {_COLUMNS}", bindings
            ).fetchone()
            if row is None:
                raise _job_unknown_error(job_id)
            return _to_job(row)

        return await self._writer.run(update, durable=durable, reserve_use=ReserveUse.HALF)


@contextmanager
def _as_storage_failed() -> Iterator[None]:
    """Context manager that raises StorageFailed in place of an error of SQLite."""
    try:
        yield
    except apsw.Error as error:
        raise StorageFailed(f"the jobs cannot be read: {error}") from error


def _job_unknown_error(job_id: int) -> JobUnknown:
    return JobUnknown(f"there is no job {job_id}")


def _find_job(db: apsw.Connection, job_id: int) -> Job:
    row: Any = db.execute(f"SELECT {_COLUMNS} FROM job WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        raise _job_unknown_error(job_id)
    return _to_job(row)


def _read_jobs(sql: str, values: Sequence[object], db: apsw.Connection) -> list[Job]:
    """Returns the jobs of a query. `sql`: a SELECT statement with the columns `_COLUMNS` or `_LISTED_COLUMNS`."""
    rows: list[Any] = db.execute(sql, values).fetchall()
    return [_to_job(row) for row in rows]


def _to_job(row: tuple[Any, ...]) -> Job:
    """Converts a row with the columns `_COLUMNS` or `_LISTED_COLUMNS` to a job."""
    (job_id, kind, arguments, state, actor, holder, resumable, stopping, created, updated, ended, *last_columns) = row
    done, total, unit, message, position, result = last_columns
    return Job(
        id=job_id,
        kind=kind,
        arguments=json.loads(arguments),
        state=JobState(state),
        actor=actor,
        holder=holder,
        is_resumable=bool(resumable),
        is_stopping=bool(stopping),
        created=created,
        updated=updated,
        ended=ended,
        progress=JobProgress(done, total, unit, message, None if position is None else json.loads(position)),
        result=None if result is None else json.loads(result),
    )
