"""The routes of `/api/v1/retention`. They show which tags the retention rules in the settings keep, and start the job
that applies the rules. The OpenAPI document shows the docstrings of the routes."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Self

from fastapi import Query
from pydantic import BaseModel, Field

from registry.admin import models
from registry.admin.caller import AdminCaller, LoggedInCaller
from registry.admin.job_models import JobResponse
from registry.admin.job_routes import queue_job
from registry.admin.management_router import management_router
from registry.upkeep.retention import retention_work
from registry.upkeep.retention.preview import PreviewedRepository, PreviewLine, PreviewSummary
from storage.errors import Denied, Unsupported
from storage.names import MAX_NAME_LENGTH, RepositoryName
from storage.patterns import NamePattern
from storage.retention import MAX_PAGE_ROWS

router = management_router()


class TagDecisionResponse(BaseModel):
    """The decision of a retention rule on a tag."""

    tag: str
    digest: str
    kept: bool
    reason: str
    pushed: datetime
    pulled: datetime | None = Field(
        description="When the image was last pulled. For an index, a pull of a manifest that it lists counts as well"
    )

    @classmethod
    def from_line(cls, line: PreviewLine) -> Self:
        """Converts a line of a preview. The line must be about a tag, not about an untagged manifest."""
        return cls(
            tag=line.tag or "",
            digest=line.digest,
            kept=line.is_kept,
            reason=line.reason,
            pushed=models.to_datetime(line.pushed),
            pulled=models.to_datetime_or_none(line.pulled),
        )


class RetentionTotals(BaseModel):
    """The totals of a preview of a repository."""

    tags_kept: int
    tags_deleted: int
    manifests_deleted: int = Field(description="Manifests without a tag that the rule would delete now")
    bytes_freed: int = Field(
        description="Bytes that garbage collection frees after the rule has deleted the counted tags and manifests"
    )
    bytes_left: int = Field(
        description="Bytes of images that would lose their tags but stay stored, because the rule has no "
        "delete_untagged_after. Not included in bytes_freed"
    )
    complete: bool = Field(
        description="False: the totals count only a part of the tags and manifests, because the repository has more "
        "than about 5000 tags or manifests, or the rule would delete more than 20,000 manifests"
    )

    @classmethod
    def from_summary(cls, summary: PreviewSummary) -> Self:
        """Converts the totals of a preview."""
        return cls(
            tags_kept=summary.tags_kept,
            tags_deleted=summary.tags_deleted,
            manifests_deleted=summary.manifests_deleted,
            bytes_freed=summary.bytes_freed,
            bytes_left=summary.bytes_left,
            complete=summary.complete,
        )


class RetentionPreviewResponse(BaseModel):
    """A page of a preview. `rule`: the number of the rule that applies, and its patterns."""

    rule: str
    items: list[TagDecisionResponse]
    next: str | None = Field(description="The parameter `after` of the next page; null: this is the last page")
    totals: RetentionTotals | None = Field(description="Only on the first page; null: this is a later page")


@router.get("/retention/preview", tags=["retention"])
async def preview_retention(
    caller: LoggedInCaller,
    repository: Annotated[str, Query(max_length=MAX_NAME_LENGTH, examples=["team/app"])],
    after: Annotated[str | None, Query(description="The field `next` of the previous page", max_length=128)] = None,
    limit: Annotated[int, Query(description="Maximum number of tags", ge=1, le=MAX_PAGE_ROWS)] = 100,
) -> RetentionPreviewResponse:
    """Shows for each tag of a repository whether the rules in the settings keep the tag, and why. The totals count only
    the first 5000 tags; `entrepot retention preview` counts all tags. Needs the right `admin` on the repository."""
    repo = RepositoryName(repository)
    # Accounts with the right `admin` on a repository are those that may grant rights on it.
    if not caller.rights.may_grant(NamePattern(repo)):
        raise Denied(f"{caller.rights.account_name} may not see this preview without the right `admin` on {repo}")
    preview = caller.upkeep.retention_preview
    rule = preview.rule_of(repo)
    # `visitor_key` identifies the account, or the network of an anonymous client. One preview runs per key at a time.
    async with preview.slots.slot(caller.visitor_key):
        lines = await preview.tag_lines(repo, after, limit)
        totals = None if after is not None else await preview.totals(repo)
    return RetentionPreviewResponse(
        rule=rule.text,
        items=[TagDecisionResponse.from_line(line) for line in lines],
        next=lines[-1].tag if len(lines) == limit else None,
        totals=None if totals is None else RetentionTotals.from_summary(totals),
    )


class RepositoryPreviewResponse(BaseModel):
    """What the rules would do in a repository. `rule`: the number of the rule that applies, and its patterns."""

    repository: str
    rule: str
    tags_kept: int
    tags_deleted: int
    complete: bool = Field(
        description="False: the counts include only the first tags, because the repository has more than about 5000"
    )

    @classmethod
    def from_preview(cls, preview: PreviewedRepository) -> Self:
        """Converts the preview of a repository."""
        return cls(
            repository=preview.repository,
            rule=preview.rule.text,
            tags_kept=preview.tags_kept,
            tags_deleted=preview.tags_deleted,
            complete=preview.is_complete,
        )


@router.get("/retention/repositories", tags=["retention"])
async def preview_repositories(
    caller: AdminCaller,
    after: Annotated[
        str | None, Query(description="The field `next` of the previous page", max_length=MAX_NAME_LENGTH)
    ] = None,
    limit: Annotated[int, Query(description="Maximum number of repositories", ge=1, le=MAX_PAGE_ROWS)] = 100,
) -> models.ListPage[RepositoryPreviewResponse]:
    """Lists the repositories to which a rule in the settings applies, each with the number of tags that the rule would
    keep and delete. If the repositories have many tags, a page may have fewer than `limit` repositories."""
    preview = caller.upkeep.retention_preview
    async with preview.slots.slot(caller.visitor_key):
        page = await preview.repositories(after, limit)
    return models.list_page(page, RepositoryPreviewResponse.from_preview, lambda preview: preview.repository)


@router.post("/retention", tags=["retention"], status_code=202)
async def apply_retention(caller: AdminCaller) -> JobResponse:
    """Queues a job that applies the rules in the settings. In each repository that has a rule, the job deletes the tags
    and untagged manifests that the rule does not keep."""
    if caller.upkeep.settings.read_only:
        raise Unsupported("this registry is read-only")
    return await queue_job(caller, retention_work.KIND, {})
