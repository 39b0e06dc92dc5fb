"""The page *Upkeep*, for admins. It shows jobs, the cache, quotas, retention, garbage collection, scrub (the check of
stored content for damage) and backups. Its forms start jobs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Final

from fastapi import APIRouter, Request, Response

from registry.admin.backup_routes import BackupResponse, NewBackup, list_backups, make_backup
from registry.admin.cache_routes import EvictionRequest, evict_from_cache, list_quotas, read_cache
from registry.admin.caller import Caller
from registry.admin.collection_routes import CheckRequest, CollectionRequest, check_store, collect_garbage
from registry.admin.job_models import JobResponse
from registry.admin.job_routes import list_jobs
from registry.admin.retention_routes import apply_retention, preview_repositories, preview_retention
from registry.admin.scrub_routes import list_damaged, show_scrub, start_scrub
from registry.config import format_duration
from registry.http.error_statuses import status_of
from registry.request import RequestInvalid
from registry.ui.job_texts import JOB_KIND_NAMES, JOB_STATE_NAMES
from registry.ui.languages import translatable
from registry.ui.page_route import (
    FormRoute,
    PageRoute,
    SlotlessRoute,
    admin_of,
    page_response,
    page_slot,
    query_of,
    receive_form,
    redirect,
)
from storage.backups import BackupFailed, BackupTargetUnknown
from storage.errors import NameInvalid, NameUnknown, RegistryError, TagInvalid, TooManyRequests, Unsupported
from storage.jobs import JobRunning
from storage.names import MAX_NAME_LENGTH

UPKEEP_PATH: Final = "/ui/upkeep"
JOBS_PATH: Final = "/ui/upkeep/jobs"
NEWEST_JOBS_PATH: Final = "/ui/upkeep/newest-jobs"
RETENTION_PATH: Final = "/ui/upkeep/retention"
START_PATH: Final = "/ui/upkeep/start"
SHOWN_JOBS: Final = 10
JOBS_ON_A_PAGE: Final = 50
SHOWN_BACKUPS: Final = 20
SHOWN_DAMAGED: Final = 20
PREVIEWED_TAGS: Final = 100
PREVIEWED_REPOSITORIES: Final = 50
"""These six numbers limit the length of the lists on the pages."""


class UpkeepFormRoute(FormRoute):
    """A route that receives a form from the page *Upkeep*."""

    form_pages = (UPKEEP_PATH,)


router = APIRouter(route_class=PageRoute, include_in_schema=False)
_slotless_routes = APIRouter(route_class=SlotlessRoute, include_in_schema=False)
_forms = APIRouter(route_class=UpkeepFormRoute, include_in_schema=False)
"""The handlers of `_slotless_routes` and `_forms` wait for slow work or for a form. So they run without a *slot* (the
permit to render a page), and acquire a slot before they render a page (`page_slot`)."""


async def _start_dry_collection(caller: Caller) -> JobResponse:
    """Starts a dry run of garbage collection."""
    return await collect_garbage(caller, CollectionRequest(dry_run=True))


JOB_STARTERS: Final[dict[str, Callable[[Caller], Awaitable[JobResponse]]]] = {
    "gc": lambda caller: collect_garbage(caller, CollectionRequest()),
    "gc-preview": _start_dry_collection,
    "fsck": lambda caller: check_store(caller, CheckRequest()),
    "scrub": start_scrub,
    "backup": lambda caller: make_backup(caller, NewBackup()),
    "retention": apply_retention,
    "evict": lambda caller: evict_from_cache(caller, EvictionRequest()),
}
"""The function that starts a job, by the field `kind` of the form."""
CONFIRMATION_QUESTIONS: Final = {
    "retention": translatable("Delete all tags that no rule keeps?"),
    "evict": translatable("Delete images from the cache until it is within its limits?"),
}
"""The question that the visitor has to confirm before such a job starts, by the field `kind` of the form."""


@router.get(UPKEEP_PATH)
async def upkeep(request: Request) -> Response:
    """Shows the page *Upkeep*. Raises Unauthorized, Denied."""
    return await _upkeep_page(request, await admin_of(request))


@router.get(JOBS_PATH)
async def jobs(request: Request) -> Response:
    """Lists the jobs, newest first. The query can have two parameters. `kind`: lists only jobs of this kind. `after`:
    the number of the last job on the previous page. Raises Unauthorized, Denied, RequestInvalid."""
    caller, query = await admin_of(request), query_of(request)
    kind = query.one("kind") or None
    if kind is not None and kind not in JOB_KIND_NAMES:
        raise RequestInvalid("there is no such kind of job")
    # The API's limit on the length of `after` does not apply to this call. So `after` is cut here to 18 characters: the
    # number of a job has at most 18 digits (`registry.http.query.MAX_NUMBER`).
    page = await list_jobs(caller, kind, (query.one("after") or "")[:18] or None, JOBS_ON_A_PAGE)
    return await page_response(
        request,
        "jobs.html",
        section="upkeep",
        jobs=page.items,
        next_after=page.next,
        kind=kind,
        **_job_values(),
    )


@router.get(NEWEST_JOBS_PATH)
async def newest_jobs(request: Request) -> Response:
    """Shows only the newest jobs. The page *Upkeep* reloads them from here every few seconds. Raises Unauthorized,
    Denied."""
    caller = await admin_of(request)
    newest = (await list_jobs(caller, None, None, SHOWN_JOBS)).items
    return await page_response(request, "newest_jobs.html", section="upkeep", jobs=newest, **_job_values())


@_slotless_routes.get(RETENTION_PATH)
async def retention(request: Request) -> Response:
    """Shows a preview of what the retention rules would delete. The query can have two parameters:

    - `repository`: the page lists the tags of this repository. Without this parameter, the page lists repositories.
    - `after`: the last tag or repository on the previous page.

    Raises Unauthorized, Denied."""
    caller, query = await admin_of(request), query_of(request)
    name = (query.one("repository") or "").strip()[:MAX_NAME_LENGTH]
    after = (query.one("after") or "")[:MAX_NAME_LENGTH] or None
    preview, repositories, problem, status = None, None, None, 200
    if name:
        try:
            preview = await preview_retention(caller, name, after, PREVIEWED_TAGS)
        except (NameInvalid, NameUnknown, TagInvalid) as error:
            problem, status = error.message, status_of(error)
    elif caller.upkeep.settings.retention:
        repositories = await preview_repositories(caller, after, PREVIEWED_REPOSITORIES)
    async with page_slot(request):
        return await page_response(
            request,
            "retention.html",
            status_code=status,
            section="upkeep",
            repository=name,
            preview=preview,
            repositories=repositories,
            problem=problem,
            rules=_rules_as_texts(caller),
            now=datetime.now(UTC),
        )


@_forms.post(START_PATH)
async def start_job(request: Request) -> Response:
    """Starts a job, and redirects to the list of jobs. The field `kind` is a key of `JOB_STARTERS`. If the job has a
    question in `CONFIRMATION_QUESTIONS`, the form must have the field `sure`. Without this field, shows the question
    and starts nothing. Raises Unauthorized, Denied, RequestInvalid."""
    caller, form = await receive_form(request, admin_of)
    kind = form.one("kind") or ""
    if kind not in JOB_STARTERS:
        raise RequestInvalid("there is no such kind of job")
    if kind in CONFIRMATION_QUESTIONS and not form.one("sure"):
        async with page_slot(request):
            values: dict[str, Any] = {
                "kind": kind,
                "question": CONFIRMATION_QUESTIONS[kind],
                "title": JOB_KIND_NAMES[kind],
            }
            return await page_response(request, "upkeep_question.html", section="upkeep", here=UPKEEP_PATH, **values)
    try:
        await JOB_STARTERS[kind](caller)
    except (JobRunning, TooManyRequests, Unsupported, BackupTargetUnknown, NameUnknown) as error:
        async with page_slot(request):
            return await _upkeep_page(request, caller, error)
    return redirect(f"{UPKEEP_PATH}#jobs")


async def _upkeep_page(request: Request, caller: Caller, problem: RegistryError | None = None) -> Response:
    """Returns the page *Upkeep*. `problem`: the error that kept a job from starting; None: there was no such error."""
    settings = caller.upkeep.settings
    backups, backup_problem = await _read_backups(caller)
    damaged = await list_damaged(caller, None, SHOWN_DAMAGED)
    return await page_response(
        request,
        "upkeep.html",
        status_code=200 if problem is None else status_of(problem),
        section="upkeep",
        here=UPKEEP_PATH,
        problem=None if problem is None else problem.message,
        jobs=(await list_jobs(caller, None, None, SHOWN_JOBS)).items,
        cache=await read_cache(caller),
        quotas=await list_quotas(caller),
        rules=_rules_as_texts(caller),
        retention_every=_duration_text(0.0 if settings.read_only else settings.upkeep.retention_every),
        collected=await _last_job(caller, "gc"),
        checked=await _last_job(caller, "fsck"),
        gc_every=_duration_text(0.0 if settings.read_only else settings.gc.interval),
        gc_grace=format_duration(settings.gc.grace),
        questions=CONFIRMATION_QUESTIONS,
        scrub=await show_scrub(caller),
        scrub_every=_duration_text(settings.scrub.every),
        damaged=damaged.items,
        has_more_damaged=damaged.next is not None,
        backups=backups,
        backup_target=settings.backup.target,
        backup_problem=backup_problem,
        **_job_values(),
    )


async def _read_backups(caller: Caller) -> tuple[list[BackupResponse], str | None]:
    """Returns the newest backups and None. If the backups cannot be read, returns an empty list and the reason. If the
    settings have no target for backups, returns an empty list and None."""
    try:
        return (await list_backups(caller)).items[:SHOWN_BACKUPS], None
    except BackupTargetUnknown:
        return [], None
    except BackupFailed as error:
        return [], error.message


async def _last_job(caller: Caller, kind: str) -> JobResponse | None:
    """Returns the newest job of a kind; None if there is none."""
    newest = (await list_jobs(caller, kind, None, 1)).items
    return newest[0] if newest else None


def _rules_as_texts(caller: Caller) -> list[dict[str, Any]]:
    """Returns the retention rules, with durations as texts. If `keep_pushed_within` or `keep_pulled_within` is not set
    (0), its text is empty. If `delete_untagged_after` is not set, its value is None instead of a text. The value 0 of
    `delete_untagged_after` is a duration, and becomes a text."""
    return [
        {
            "repositories": rule.repositories,
            "keep_last": rule.keep_last,
            "keep_tags": rule.keep_tags,
            "keep_pushed_within": _duration_text(rule.keep_pushed_within),
            "keep_pulled_within": _duration_text(rule.keep_pulled_within),
            "delete_untagged_after": (
                None if rule.delete_untagged_after is None else format_duration(rule.delete_untagged_after)
            ),
            "delete_all": rule.delete_all,
        }
        for rule in caller.upkeep.settings.retention
    ]


def _duration_text(seconds: float | None) -> str:
    """Returns a duration as text. Returns an empty text for 0 and None, which mean that no duration is set."""
    return format_duration(seconds) if seconds else ""


def _job_values() -> dict[str, Any]:
    return {"job_kinds": JOB_KIND_NAMES, "job_states": JOB_STATE_NAMES, "now": datetime.now(UTC)}


router.routes.extend([*_slotless_routes.routes, *_forms.routes])
