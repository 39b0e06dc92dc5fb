"""The names of jobs' kinds and states on pages, and the handler of the form that stops a job."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request, Response

from registry.admin.browser_login import local_path
from registry.admin.job_routes import stop_job
from registry.http.query import parse_number
from registry.ui.languages import translatable
from registry.ui.page_route import FormRoute, admin_of, receive_form, redirect

STOP_PATH: Final = "/ui/upkeep/stop"
JOB_KIND_NAMES: Final = {
    "gc": translatable("Garbage collection"),
    "fsck": translatable("Check of the store"),
    "scrub": translatable("Scrub"),
    "backup": translatable("Backup"),
    "evict": translatable("Eviction from the cache"),
    "retention": translatable("Retention"),
    "warm": translatable("Warming of the cache"),
    "import-registry": translatable("Import of a directory"),
    "import-remote": translatable("Import over the network"),
}
"""Maps each kind of job (a key of `UpkeepComponents.work_by_kind`) to its name on pages."""
JOB_STATE_NAMES: Final = {
    "queued": translatable("waits"),
    "running": translatable("runs"),
    "done": translatable("done"),
    "failed": translatable("failed"),
    "stopped": translatable("stopped"),
}


class JobFormRoute(FormRoute):
    """A route of the form that stops a job."""

    form_pages = ("/ui/upkeep", "/ui/upkeep/jobs", "/ui/upkeep/newest-jobs", "/ui/mirror", "/ui/mirror/downloads")
    """The paths of the pages that have the form. If a visitor who is not logged in sends the form, the visitor is asked
    to log in, and then returns to the page."""


router = APIRouter(include_in_schema=False, route_class=JobFormRoute)


@router.post(STOP_PATH)
async def stop(request: Request) -> Response:
    """Asks the process that runs the job to stop the job. Redirects to the path in the form's field `next`. Raises
    Unauthorized, Denied, JobUnknown, RequestInvalid."""
    caller, form = await receive_form(request, admin_of)
    await stop_job(caller, parse_number(form.one("job") or "", "this is not the number of a job"))
    return redirect(local_path(form.one("next"), JobFormRoute.form_pages[0]))
