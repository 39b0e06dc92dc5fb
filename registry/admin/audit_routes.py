"""`/api/v1/audit`: who did what."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query

from registry.admin import models
from registry.admin.account_routes import AfterQuery, LimitQuery
from registry.admin.caller import AdminCaller
from registry.admin.management_route import ManagementRoute
from storage.access import AuditQuery

router = APIRouter(route_class=ManagementRoute)


@router.get("/audit", tags=["audit"])
async def list_audit(
    caller: AdminCaller,
    actor: Annotated[str | None, Query(max_length=80, examples=["alice"])] = None,
    action: Annotated[str | None, Query(max_length=80, examples=["tag.delete"])] = None,
    target: Annotated[str | None, Query(max_length=400, examples=["team/app"])] = None,
    outcome: Literal["ok", "denied", "failed"] | None = None,
    since: Annotated[datetime | None, Query(description="Not before", examples=["2026-11-01T00:00:00Z"])] = None,
    after: AfterQuery = None,
    limit: LimitQuery = 100,
) -> models.Listed[models.Line]:
    """Changes of content, accounts and rights, logins, denials: newest first; all conditions must hold. Logins and
    denials come a second late."""
    query = AuditQuery(actor, action, target, outcome, None if since is None else since.timestamp(), after)
    page = await caller.administration.accounts.scan_audit(query, limit)
    return models.listed(page, models.Line.of, lambda entry: entry.id)
