"""The page *Mirror*, for admins. The page shows the upstreams, their cached content and the unfinished downloads. Its
forms refresh, freeze, purge and fetch images. A *frozen* tag stays at one digest, whatever the upstream does.

There are two more pages:

- The list of cached images. The page *Mirror* does not contain this list, because the list reads much from the
  database.
- A page with only the downloads. While the page *Mirror* is open, the browser repeatedly requests this smaller page, to
  update the downloads on the page *Mirror*.

A *fill* is the download of one blob from an upstream. The variable `fills` of the templates has the unfinished fills.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Final

from fastapi import APIRouter, Request, Response

from registry.admin.caller import Caller
from registry.admin.frozen_tag_routes import (
    MAX_REFERENCE_CHARACTERS,
    TagToFreeze,
    freeze,
    list_frozen_tags,
    unfreeze,
)
from registry.admin.job_models import JobResponse
from registry.admin.job_routes import list_jobs
from registry.admin.mirror_routes import (
    MAX_IMAGE_TEXT_CHARACTERS,
    ContentToPurge,
    ImagesToWarm,
    ImageToRefresh,
    list_cached_images,
    list_downloads,
    purge,
    read_mirror,
    refresh,
    warm,
)
from registry.http.error_statuses import status_of
from registry.http.query import Query
from registry.request import RequestInvalid
from registry.ui.job_texts import JOB_KIND_NAMES, JOB_STATE_NAMES
from registry.ui.languages import translatable
from registry.ui.page_route import (
    FormRoute,
    PageRoute,
    admin_of,
    page_response,
    page_slot,
    query_of,
    receive_form,
    redirect,
)
from registry.ui.system_page import BREAKER_NAMES
from registry.upkeep.cached_content import RefreshOutcome
from registry.upkeep.warm_work import MAX_WARMED_IMAGES, WARM_KIND
from storage.cached_images import MAX_LISTED_IMAGES, ImageOrder
from storage.errors import (
    DigestInvalid,
    ManifestUnknown,
    NameInvalid,
    NameUnknown,
    RegistryError,
    TagInvalid,
    TooManyRequests,
    UpstreamUnavailable,
)
from storage.names import parse_reference
from storage.upstream_tags import TagFrozen, TagNotFrozen

MIRROR_PATH: Final = "/ui/mirror"
IMAGES_PATH: Final = "/ui/mirror/images"
DOWNLOADS_PATH: Final = "/ui/mirror/downloads"
IMAGES_ON_A_PAGE: Final = 25
SHOWN_JOBS: Final = 5
SHOWN_FROZEN_TAGS: Final = 100
"""Largest numbers of images, jobs and frozen tags that a page shows."""
ORDERS: Final = {
    ImageOrder.SIZE: translatable("Size"),
    ImageOrder.NEWEST_PULL: translatable("Last pull, newest first"),
    ImageOrder.OLDEST_PULL: translatable("Last pull, oldest first"),
}
"""The names of the orders in which images can be listed."""
REFRESH_TEXTS: Final = {
    RefreshOutcome.NEW: translatable("The image was not cached before. Its manifest is cached now."),
    RefreshOutcome.UNCHANGED: translatable("The tag points at the same image as before."),
    RefreshOutcome.CHANGED: translatable("The tag points at another image now."),
    RefreshOutcome.FROZEN: translatable("The tag is frozen, so the upstream was not asked."),
    RefreshOutcome.CACHED: translatable("The image is cached, and the content of a digest never changes."),
    RefreshOutcome.FETCHED_LATER: translatable("This is the digest of a blob. The next pull fetches the blob."),
}
"""The text for each outcome of a refresh. For CACHED, the visitor has named the digest of a cached manifest, so the
upstream was not asked."""
_SHOWN_ERRORS: Final = (
    *(DigestInvalid, NameInvalid, TagInvalid, RequestInvalid),
    *(ManifestUnknown, NameUnknown, TagFrozen, TagNotFrozen, UpstreamUnavailable),
)
"""Errors of which a page shows the message: errors in the form that the visitor sent, and errors of the upstream."""


class MirrorFormRoute(FormRoute):
    """A route that receives a form from the page *Mirror* or from the list of cached images."""

    form_pages = (MIRROR_PATH, IMAGES_PATH)


router = APIRouter(route_class=PageRoute, include_in_schema=False)
_forms = APIRouter(prefix=MIRROR_PATH, route_class=MirrorFormRoute, include_in_schema=False)
"""The routes of forms. A *slot* is the permit to render a page. A handler of a `FormRoute` runs without a slot, and
acquires one itself before it renders a page (`page_slot`)."""


@router.get(MIRROR_PATH)
async def mirror(request: Request) -> Response:
    """Shows the upstreams, their cached content, the downloads and the frozen tags. Raises Unauthorized, Denied."""
    caller = await admin_of(request)
    state = await read_mirror(caller)
    frozen = await list_frozen_tags(caller, None, SHOWN_FROZEN_TAGS)
    return await page_response(
        request,
        "mirror.html",
        section="mirror",
        upstreams=state.upstreams,
        cache_by_upstream={cache.upstream: cache for cache in state.cache},
        fills=state.fills,
        jobs=await _warm_jobs(caller),
        frozen=frozen.items,
        has_more_frozen=frozen.next is not None,
        breaker_names=BREAKER_NAMES,
        max_images=MAX_WARMED_IMAGES,
        **_job_values(),
    )


@router.get(DOWNLOADS_PATH)
async def downloads(request: Request) -> Response:
    """Shows the unfinished downloads from the upstreams. Raises Unauthorized, Denied."""
    caller = await admin_of(request)
    fills, jobs = await list_downloads(caller), await _warm_jobs(caller)
    return await page_response(
        request, "mirror_downloads.html", section="mirror", fills=fills, jobs=jobs, **_job_values()
    )


@router.get(IMAGES_PATH)
async def images(request: Request) -> Response:
    """Lists the cached images. The query can have `in`, the name of an upstream; `q`, a text that the names of the
    repositories contain; `sort`, a key of `ORDERS`; and `after`, the number of images before this page. Raises
    Unauthorized, Denied, NameUnknown, RequestInvalid."""
    caller, query = await admin_of(request), query_of(request)
    upstream, text = query.one("in") or None, (query.one("q") or "").strip()[:MAX_IMAGE_TEXT_CHARACTERS]
    order = _parse_order(query.one("sort"))
    position = _parse_position(query.one("after"))
    page = await list_cached_images(caller, upstream, text, order, position, IMAGES_ON_A_PAGE)
    return await page_response(
        request,
        "mirror_images.html",
        section="mirror",
        images=page.items,
        total=page.total,
        next_after=page.next,
        is_complete=page.complete,
        max_listed=MAX_LISTED_IMAGES,
        upstream=upstream,
        upstreams=[configured.name for configured in caller.upkeep.settings.upstream],
        text=text,
        order=order.value,
        orders=ORDERS,
        now=datetime.now(UTC),
    )


@_forms.post("/refresh")
async def refresh_image(request: Request) -> Response:
    """Refreshes the image `reference` (`registry.upkeep.cached_content`), and shows the result. Holds no slot during
    the wait for the upstream, which can be long. Raises Unauthorized, Denied, RequestInvalid."""
    caller, form = await receive_form(request, admin_of)
    reference = _reference_in(form)

    async def work() -> dict[str, Any]:
        result = await refresh(caller, ImageToRefresh(reference=reference))
        return {"text": REFRESH_TEXTS[result.outcome], "result": result}

    return await _result_page(request, reference, work)


@_forms.post("/freeze")
async def freeze_image(request: Request) -> Response:
    """Freezes the tag `reference`. Raises Unauthorized, Denied, RequestInvalid."""
    caller, form = await receive_form(request, admin_of)
    reference = _reference_in(form)

    async def work() -> dict[str, Any]:
        frozen = await freeze(caller, TagToFreeze(reference=reference))
        return {
            "text": translatable("The tag is frozen: pulls get this image, whatever the upstream does."),
            "frozen_digest": frozen.digest,
        }

    return await _result_page(request, reference, work)


@_forms.post("/unfreeze")
async def unfreeze_image(request: Request) -> Response:
    """Lets the frozen tag `reference` follow the upstream again. Raises Unauthorized, Denied, RequestInvalid."""
    caller, form = await receive_form(request, admin_of)
    reference = _reference_in(form)

    async def work() -> dict[str, Any]:
        await unfreeze(caller, reference)
        return {"text": translatable("The tag follows the upstream again.")}

    return await _result_page(request, reference, work)


@_forms.post("/purge")
async def purge_image(request: Request) -> Response:
    """Deletes the image `reference` from the cache. With the field `everything`, deletes all cached content of the
    image's repository. With `force`, also deletes content that a frozen tag needs. Without `sure`, deletes nothing, and
    asks the visitor to confirm. Raises Unauthorized, Denied, RequestInvalid."""
    caller, form = await receive_form(request, admin_of)
    reference, everything = _reference_in(form), bool(form.one("everything"))
    try:
        repository = parse_reference(reference).repository if everything else ""
    except _SHOWN_ERRORS as error:
        return await _problem_page(request, reference, error)
    if not form.one("sure"):
        values: dict[str, Any] = {"section": "mirror", "reference": reference, "repository": repository}
        async with page_slot(request):
            return await page_response(request, "mirror_purge.html", here=MIRROR_PATH, **values)
    body = ContentToPurge(reference=reference, everything=everything, force=bool(form.one("force")))

    async def work() -> dict[str, Any]:
        return {
            "text": translatable("The content was deleted from the cache. The next pull fetches it again."),
            "purged": await purge(caller, body),
        }

    return await _result_page(request, repository or reference, work)


@_forms.post("/warm")
async def warm_images(request: Request) -> Response:
    """Starts a job that fetches images, and redirects to the page with the progress of the job. The field `references`
    names one image in each line. The field `platform` lists platforms, such as `linux/arm64`, or is `all`. If it is
    empty, the job fetches the platforms that the settings name. Raises Unauthorized, Denied."""
    caller, form = await receive_form(request, admin_of)
    references, platforms = (form.one("references") or "").split(), (form.one("platform") or "").split()

    async def start_job() -> None:
        if not 0 < len(references) <= MAX_WARMED_IMAGES or max(map(len, references)) > MAX_REFERENCE_CHARACTERS:
            raise RequestInvalid(f"name between one and {MAX_WARMED_IMAGES} images, one in each line")
        if len(platforms) > 20 or max(map(len, platforms), default=0) > 100:  # the limits of `ImagesToWarm`
            raise RequestInvalid("name at most 20 platforms, each with at most 100 characters")
        await warm(caller, ImagesToWarm(references=references, platforms=platforms))

    try:
        await start_job()
    except (*_SHOWN_ERRORS, TooManyRequests) as error:
        return await _problem_page(request, "", error)
    return redirect(f"{MIRROR_PATH}#downloads")


async def _result_page(request: Request, reference: str, work: Callable[[], Awaitable[dict[str, Any]]]) -> Response:
    """Runs `work`, which returns values for the template, and returns a page with these values. If `work` raises one
    of `_SHOWN_ERRORS`, returns a page with the message of the error."""
    try:
        values = await work()
    except _SHOWN_ERRORS as error:
        return await _problem_page(request, reference, error)
    async with page_slot(request):
        return await page_response(request, "mirror_done.html", **{**_default_values(reference), **values})


async def _problem_page(request: Request, reference: str, error: RegistryError) -> Response:
    values = {**_default_values(reference), "problem": error.message}
    async with page_slot(request):
        return await page_response(request, "mirror_done.html", status_code=status_of(error), **values)


def _default_values(reference: str) -> dict[str, Any]:
    """Returns a value for each variable of `mirror_done.html`. A variable that only some pages need is None."""
    values: dict[str, Any] = dict.fromkeys(("text", "problem", "result", "frozen_digest", "purged"))
    return {**values, "section": "mirror", "here": MIRROR_PATH, "reference": reference}


async def _warm_jobs(caller: Caller) -> list[JobResponse]:
    """Returns the newest jobs that fetch images into the cache."""
    return (await list_jobs(caller, WARM_KIND, None, SHOWN_JOBS)).items


def _job_values() -> dict[str, Any]:
    return {"job_kinds": JOB_KIND_NAMES, "job_states": JOB_STATE_NAMES, "now": datetime.now(UTC)}


def _parse_order(text: str | None) -> ImageOrder:
    try:
        return ImageOrder(text or ImageOrder.SIZE)
    except ValueError:
        raise RequestInvalid("images cannot be sorted by this") from None


def _parse_position(text: str | None) -> int:
    """Parses a position in a list. Returns 0 for None and for an empty text. Raises RequestInvalid."""
    if not text:
        return 0
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise RequestInvalid("this is not a position in the list")
    return int(text)


def _reference_in(form: Query) -> str:
    """Returns the field `reference`. Raises RequestInvalid if it is empty or too long."""
    reference = (form.one("reference") or "").strip()
    if not 0 < len(reference) <= MAX_REFERENCE_CHARACTERS:
        raise RequestInvalid("name an image, such as ubuntu:24.04")
    return reference


router.routes.extend(_forms.routes)
