"""Stores jobs in the metadata database (`SqliteJobs`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

import apsw

from storage.content import Page
from storage.data_dir.reserve import ReserveUse
from storage.jobs import JSON, Job, JobState, JobUnknown, Progress
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase

MAX_JOBS: Final = 1000
"""Number of jobs whose records are kept. When a job is added, older jobs that have ended are deleted."""
_COLUMNS: Final = (
    "id, kind, arguments, state, actor, holder, resumable, stopping, created, updated, ended, done, total, unit, "
    "message, position, result"
)
_ACTIVE: Final = "state IN ('queued', 'running')"
_PRUNE: Final = f"""
DELETE FROM job WHERE id <= (SELECT id FROM job ORDER BY id DESC LIMIT 1 OFFSET {MAX_JOBS}) AND NOT {_ACTIVE}"""


class SqliteJobs:
    """Implements `storage.jobs.Jobs`, which describes the methods. Reads on the event loop.

    On a full disk, changes may use a part of the reserve (disk space that was allocated in advance), because a job may
    free disk space."""

    def __init__(
        self, db: apsw.Connection, writer: CommitThread | ImmutableDatabase, clock: Callable[[], float]
    ) -> None:
        """Reads with `db` and changes through `writer`. `clock` returns the time in seconds since 1970."""
        self._db = db
        self._writer = writer
        self._clock = clock

    async def add(
        self, kind: str, arguments: Mapping[str, JSON], *, actor: str, holder: str = "", is_resumable: bool = False
    ) -> Job:
        now = self._clock()
        state = JobState.RUNNING if holder else JobState.QUEUED
        row = (kind, json.dumps(dict(arguments)), state, actor, holder, int(is_resumable), now, now)

        def insert(db: apsw.Connection) -> Job:
            inserted: Any = db.execute(
                "INSERT INTO job (kind, arguments, state, actor, holder, resumable, created, updated) "
                f"VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING {_COLUMNS}",
                row,
            ).fetchone()
            db.execute(_PRUNE)
            return _job(inserted)

        return await self._writer.run(insert, reserve_use=ReserveUse.HALF)

    async def job(self, job_id: int) -> Job:
        return _find(self._db, job_id)

    async def jobs(self, before: int | None, limit: int, kind: str | None = None) -> Page[Job]:
        rows: list[Any] = self._db.execute(
            f"SELECT {_COLUMNS} FROM job WHERE (?1 IS NULL OR id < ?1) AND (?2 IS NULL OR kind = ?2) "
            "ORDER BY id DESC LIMIT ?3",
            (before, kind, limit + 1),
        ).fetchall()
        return Page([_job(row) for row in rows[:limit]], more=len(rows) > limit)

    async def active(self, kind: str | None = None) -> list[Job]:
        rows: list[Any] = self._db.execute(
            f"SELECT {_COLUMNS} FROM job WHERE {_ACTIVE} AND (?1 IS NULL OR kind = ?1) ORDER BY id", (kind,)
        ).fetchall()
        return [_job(row) for row in rows]

    async def start(self, job_id: int, holder: str) -> Job:
        return await self._change(
            job_id, "state = 'running', holder = :holder, updated = :now", {"holder": holder}, durable=True
        )

    async def save_progress(self, job_id: int, progress: Progress) -> bool:
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
            f"stopping = CASE WHEN {_ACTIVE} THEN 1 ELSE stopping END, "
            "ended = CASE state WHEN 'queued' THEN :now ELSE ended END, "
            "state = CASE state WHEN 'queued' THEN 'stopped' ELSE state END, updated = :now",
            {},
            durable=True,
        )

    async def _change(self, job_id: int, assignments: str, values: Mapping[str, Any], *, durable: bool) -> Job:
        """Updates the row of a job by SQL `assignments` with the named `values`, and returns the job after the change.
        Raises JobUnknown."""
        bindings = {**values, "id": job_id, "now": self._clock()}

        def update(db: apsw.Connection) -> Job:
            row: Any = db.execute(
                f"UPDATE job SET {assignments} WHERE id = :id RETURNING {_COLUMNS}", bindings
            ).fetchone()
            if row is None:
                raise _unknown(job_id)
            return _job(row)

        return await self._writer.run(update, durable=durable, reserve_use=ReserveUse.HALF)


def _unknown(job_id: int) -> JobUnknown:
    return JobUnknown(f"there is no job {job_id}")


def _find(db: apsw.Connection, job_id: int) -> Job:
    row: Any = db.execute(f"SELECT {_COLUMNS} FROM job WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        raise _unknown(job_id)
    return _job(row)


def _job(row: tuple[Any, ...]) -> Job:
    """Returns the job of a row with the columns `_COLUMNS`."""
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
        progress=Progress(done, total, unit, message, None if position is None else json.loads(position)),
        result=None if result is None else json.loads(result),
    )
