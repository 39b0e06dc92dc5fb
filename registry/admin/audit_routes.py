"""The route of `/api/v1/audit`: the audit log. The docstring of the route is the description in the OpenAPI
document."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query

from registry.admin import models
from registry.admin.caller import AdminCaller
from registry.admin.management_route import AfterQuery, LimitQuery
from registry.admin.management_router import management_router
from storage.access import AuditQuery

router = management_router()


@router.get("/audit", tags=["audit"])
async def list_audit(
    caller: AdminCaller,
    actor: Annotated[str | None, Query(max_length=80, examples=["alice"])] = None,
    action: Annotated[str | None, Query(max_length=80, examples=["tag.delete"])] = None,
    target: Annotated[str | None, Query(max_length=400, examples=["team/app"])] = None,
    outcome: Literal["ok", "denied", "failed"] | None = None,
    since: Annotated[
        models.UtcTime | None, Query(description="Only entries since this time", examples=["2026-11-01T00:00:00Z"])
    ] = None,
    until: Annotated[models.UtcTime | None, Query(description="Only entries before this time")] = None,
    after: AfterQuery = None,
    limit: LimitQuery = 100,
) -> models.ListPage[models.AuditEntryResponse]:
    """Lists the entries of the audit log that match all given conditions, newest first. The log has logins, denied
    requests, and changes of content, accounts and rights. Logins and denied requests appear up to a second late."""
    query = AuditQuery(
        actor=actor,
        action=action,
        target=target,
        outcome=outcome,
        since=None if since is None else since.timestamp(),
        until=None if until is None else until.timestamp(),
        before=after,  # the list is newest first: the next page has the entries that are older than `after`
    )
    return models.list_page(
        await caller.accounts.scan_audit(query, limit), models.AuditEntryResponse.from_stored, lambda entry: entry.id
    )
