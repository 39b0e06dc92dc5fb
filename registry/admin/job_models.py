"""How the management API and `entrepot jobs --json` show a job (`JobResponse`). The docstring of the class and the
descriptions of its fields appear in the OpenAPI document."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Self

from pydantic import BaseModel, Field

from registry.admin import models
from storage.jobs import Job


class JobResponse(BaseModel):
    """A job. `state`: queued, running, done, failed or stopped. `done`: how many of the `total` units are done."""

    id: int
    kind: str
    arguments: dict[str, Any]
    state: str
    stopping: bool = Field(description="Whether a stop was requested and the job has not ended yet")
    started_by: str = Field(description="The account or command that started the job")
    holder: str = Field(description="The process that runs or ran the job; empty if no process has started the job")
    created: datetime
    updated: datetime
    ended: datetime | None
    done: int
    total: int | None
    unit: str = Field(description="What `done` and `total` count, such as `blobs`")
    message: str = Field(description="What the job is doing, or why it ended")
    result: Any

    @classmethod
    def from_stored(cls, job: Job) -> Self:
        """Converts a stored job."""
        return cls(
            id=job.id,
            kind=job.kind,
            arguments=dict(job.arguments),
            state=job.state,
            stopping=job.is_stopping and job.ended is None,
            started_by=job.actor,
            holder=job.holder,
            created=models.to_datetime(job.created),
            updated=models.to_datetime(job.updated),
            ended=models.to_datetime_or_none(job.ended),
            done=job.progress.done,
            total=job.progress.total,
            unit=job.progress.unit,
            message=job.progress.message,
            result=job.result,
        )
