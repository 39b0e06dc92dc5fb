"""The page *Activity*, for admins: the audit log, with filters."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, NamedTuple
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Request, Response

from registry.http.query import Query
from registry.request import RequestInvalid
from registry.ui.access_pages import GROUPS_PATH, account_path
from registry.ui.languages import translatable
from registry.ui.page_route import PageRoute, admin_of, page_response, query_of
from registry.ui.repository_pages import REPOSITORIES_PATH
from storage.access import AuditEntry, AuditQuery, GranteeKind

ACTIVITY_PATH: Final = "/ui/activity"
PAGE_SIZE: Final = 50
"""Number of audit log entries on a page."""
OUTCOMES: Final = {
    "ok": translatable("done"),
    "denied": translatable("denied"),
    "failed": translatable("failed"),
}
"""The names that the page shows for the outcomes of audit log entries."""


class Period(NamedTuple):
    """A period for the filter `period`. It ends now, or at the time of the filter `until`. `seconds`: the length of the
    period; None if the period has no start. `text`: the name of the period on the page."""

    seconds: float | None
    text: str


PERIODS: Final = {
    "": Period(None, translatable("any time")),
    "hour": Period(3600, translatable("last hour")),
    "day": Period(86400, translatable("last 24 hours")),
    "week": Period(7 * 86400, translatable("last 7 days")),
    "month": Period(30 * 86400, translatable("last 30 days")),
}
"""The periods that an admin can choose, by the value of `period` in the query."""
ACTIONS: Final = {
    "login": translatable("Log in"),
    "session.start": translatable("Session started"),
    "session.end": translatable("Session ended"),
    "account.add": translatable("Account added"),
    "account.remove": translatable("Account deleted"),
    "account.enable": translatable("Account enabled"),
    "account.disable": translatable("Account disabled"),
    "account.admin": translatable("Admin right changed"),
    "account.password": translatable("Password changed"),
    "group.add": translatable("Group added"),
    "group.remove": translatable("Group deleted"),
    "member.add": translatable("Member added to group"),
    "member.remove": translatable("Member removed from group"),
    "grant.put": translatable("Grant added or changed"),
    "grant.remove": translatable("Grant removed"),
    "token.add": translatable("API token added"),
    "token.revoke": translatable("API token revoked"),
    "key.make": translatable("Signing key made"),
    "key.rotate": translatable("Signing key replaced"),
    "tag.put": translatable("Tag set"),
    "tag.delete": translatable("Tag deleted"),
    "tag.force": translatable("Immutable tag changed"),
    "tag.freeze": translatable("Tag frozen"),
    "tag.unfreeze": translatable("Tag no longer frozen"),
    "manifest.put": translatable("Manifest stored"),
    "manifest.delete": translatable("Manifest deleted"),
    "manifest.restore": translatable("Manifest restored"),
    "manifest.damaged": translatable("Manifest found damaged"),
    "manifest.healed": translatable("Manifest repaired"),
    "blob.delete": translatable("Blob deleted"),
    "blob.mount": translatable("Blob mounted from another repository"),
    "blob.damaged": translatable("Blob found damaged"),
    "blob.healed": translatable("Blob repaired"),
    "description.put": translatable("Description changed"),
    "page": translatable("Request for a page or form"),
    "pull": translatable("Pull"),
    "push": translatable("Push"),
    "delete": translatable("Delete"),
}
"""The names that the page shows for frequent actions. For other actions, the page shows the names in the audit log."""
_MAX_CHARACTERS: Final = {"account": 80, "action": 80, "repository": 400, "until": 32}
"""The filters that are free text. The page reads at most this number of characters of each."""
_CONTENT_KINDS: Final = frozenset({"tag", "manifest", "description"})
"""The kinds of actions whose targets have pages below `REPOSITORIES_PATH`. The kind of an action is the part before the
dot, such as `tag` in `tag.put`."""

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@dataclass(frozen=True, slots=True)
class ActivityRow:
    """A row of the list: an audit log entry, with its time and its details in a form for the page. `target_path`: the
    path of the page about the entry's target; None if there is no such page."""

    entry: AuditEntry
    at: datetime
    target_path: str | None
    details: Mapping[str, str]


@router.get(ACTIVITY_PATH)
async def activity(request: Request) -> Response:
    """Lists entries of the audit log, the newest first. These parameters of the query filter the entries: `account`,
    `action`, `repository`, `outcome` (a key of `OUTCOMES`), `period` (a key of `PERIODS`) and `until` (a time, in UTC
    if it names no zone). The parameter `after` is the id of an entry: the page begins with the next older entry. Raises
    Unauthorized, Denied, AccountInvalid, RequestInvalid."""
    caller, query = await admin_of(request), query_of(request)
    chosen = _chosen_filters(query)
    period_seconds, until = PERIODS[chosen["period"]].seconds, _parse_time(chosen["until"])
    audit_query = AuditQuery(
        actor=chosen["account"] or None,
        action=chosen["action"] or None,
        target=chosen["repository"] or None,
        outcome=chosen["outcome"] or None,
        since=None if period_seconds is None else (time.time() if until is None else until) - period_seconds,
        until=until,
        before=query.one("after") or None,  # only entries older than the entry with this id
    )
    page = await caller.accounts.scan_audit(audit_query, PAGE_SIZE)
    next_path = None
    if page.more and page.items:
        parameters = {name: value for name, value in chosen.items() if value}
        next_path = f"{ACTIVITY_PATH}?{urlencode({**parameters, 'after': page.items[-1].id})}"
    return await page_response(
        request,
        "activity.html",
        section="activity",
        rows=[_row(entry) for entry in page.items],
        next_path=next_path,
        chosen=chosen,
        outcomes=OUTCOMES,
        periods=PERIODS,
        actions=ACTIONS,
    )


def _chosen_filters(query: Query) -> dict[str, str]:
    """Returns the text of each filter in the query, by the name of the filter; empty if the query lacks the filter.
    Raises RequestInvalid if a filter is repeated, or if there is no such outcome or period."""
    chosen = {name: (query.one(name) or "").strip()[:max_length] for name, max_length in _MAX_CHARACTERS.items()}
    for name, choices in (("outcome", OUTCOMES), ("period", PERIODS)):
        chosen[name] = query.one(name) or ""
        if chosen[name] and chosen[name] not in choices:
            raise RequestInvalid(f"there is no such {name}")
    return chosen


def _parse_time(text: str) -> float | None:
    """Parses a time such as `2026-11-28T12:00`, and returns it in seconds since 1970. A time without a zone is in UTC.
    Returns None if `text` is empty. Raises RequestInvalid if `text` is not a time."""
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise RequestInvalid("the time is not valid; write it like this: 2026-11-28T12:00") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _row(entry: AuditEntry) -> ActivityRow:
    details = {key: _text_of(value) for key, value in (entry.detail or {}).items()}
    return ActivityRow(entry, datetime.fromtimestamp(entry.at, UTC), _target_path(entry), details)


def _text_of(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _target_path(entry: AuditEntry) -> str | None:
    """Returns the path of the page about the entry's target; None if there is no such page."""
    kind, dot, _ = entry.action.partition(".")
    if not entry.target or not dot:
        return None
    if kind in ("account", "session", "token"):
        return account_path(entry.target) if entry.action != "account.remove" else None
    if kind in ("group", "member"):
        return f"{GROUPS_PATH}/{quote(entry.target)}" if entry.action != "group.remove" else None
    if kind == "grant":
        subject, colon, name = entry.target.partition(":")
        if not colon:
            return None
        return f"{GROUPS_PATH}/{quote(name)}" if subject == GranteeKind.GROUP else account_path(name)
    if kind not in _CONTENT_KINDS or entry.action.endswith(".delete"):
        return None
    return f"{REPOSITORIES_PATH}/{quote(entry.target, safe='/:@')}"
