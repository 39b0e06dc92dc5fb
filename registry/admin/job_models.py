"""The job in the responses of the management API and in the output of `entrepot jobs --json`. The docstring and the
descriptions of the fields appear in the OpenAPI document."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Self

from pydantic import BaseModel, Field

from registry.admin import models
from storage.jobs import Job


class JobResponse(BaseModel):
    """A job. `state`: queued, running, done, failed or stopped. `done` of `total` units are done."""

    id: int
    kind: str
    arguments: dict[str, Any]
    state: str
    stopping: bool = Field(description="Somebody asked to stop it, and it has not ended yet")
    started_by: str = Field(description="The account or command that started it")
    holder: str = Field(description="The process that runs it; empty if none does yet")
    created: datetime
    updated: datetime
    ended: datetime | None
    done: int
    total: int | None
    unit: str = Field(description="What `done` and `total` count, such as `blobs`")
    message: str = Field(description="What it does now, or why it ended")
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
