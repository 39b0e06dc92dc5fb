"""The page that compares two images of a repository: which layers they share, and how their configs differ."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request, Response

from registry.admin.repository_rights import require_readable
from registry.browse.models import ComparisonView
from registry.http.error_statuses import status_of
from registry.request import RequestInvalid
from registry.ui.image_page import path_of, repository_in
from registry.ui.languages import translatable
from registry.ui.page_route import SlotlessRoute, caller_of, page_response, page_slot, query_of, redirect_with_query
from registry.ui.pages import PageComponents
from storage.errors import DigestInvalid, ManifestUnknown, TagInvalid
from storage.names import as_reference

COMPARISON_PATH: Final = "/ui/comparison"
MAX_LAYERS_PER_TABLE: Final = 200
"""Largest number of layers in each table of the page: one table for the layers of both images, and one for each image
with the layers that only this image has. The page does not show further layers."""
_MAX_CHARACTERS: Final = 200
"""Largest length of a tag or platform in the query. Further characters are ignored."""
FIELD_NAMES: Final = {
    "user": translatable("User"),
    "working_dir": translatable("Working directory"),
    "stop_signal": translatable("Stop signal"),
    "author": translatable("Author"),
    "entrypoint": translatable("Entrypoint"),
    "cmd": translatable("Command"),
    "healthcheck": translatable("Health check"),
    "exposed_ports": translatable("Ports"),
    "volumes": translatable("Volumes"),
    "env": translatable("Environment"),
    "labels": translatable("Labels"),
}
"""What the page calls each field of an image's config. The keys are the values of `ConfigChange.field`
(`registry.browse.models`)."""

# A *slot* is the permit to render a page. A handler of a `SlotlessRoute` first reads the page's data without a slot.
# Then it acquires a slot (`page_slot`) and renders the page.
router = APIRouter(route_class=SlotlessRoute, include_in_schema=False)


@router.get(COMPARISON_PATH + "/{path:path}")
async def comparison(request: Request, path: str) -> Response:
    """Compares two images of a repository, and shows a form to choose others. The query parameter `tag` occurs twice,
    each time with a tag or a digest. If it occurs only once or never, the page has only the form. If a tag points at
    an index, the optional parameter `platform` chooses the image in the index. Needs `pull`. Raises Unauthorized,
    NameUnknown, RequestInvalid."""
    caller, query = caller_of(request), query_of(request)
    name = repository_in(path)
    stored_name = await require_readable(caller, name)
    components: PageComponents = request.app.service.pages
    # Raises NameUnknown if there is no such repository. The redirect comes later, so that the error's text has the name
    # from the visitor's URL, such as `ubuntu`, and not `docker.io/library/ubuntu`.
    await components.content.tags(name, None, 1)
    if stored_name != name:
        return redirect_with_query(request, f"{COMPARISON_PATH}/{path_of(stored_name, None)}", "tag", "platform")
    chosen_images = [text.strip()[:_MAX_CHARACTERS] for text in query.all("tag") if text.strip()]
    if len(chosen_images) > 2:
        raise RequestInvalid("choose two tags to compare")
    platform = (query.one("platform") or "").strip()[:_MAX_CHARACTERS] or None
    comparison_view: ComparisonView | None = None
    problem, status = "", 200
    if len(chosen_images) == 2:
        try:
            base, other = (as_reference(text) for text in chosen_images)
            comparison_view = await caller.repository_browser.compare(
                caller.context_for(stored_name), stored_name, base, other, platform
            )
        except (DigestInvalid, ManifestUnknown, TagInvalid) as error:
            problem, status = error.message, status_of(error)
    async with page_slot(request):
        return await page_response(
            request,
            "comparison.html",
            status_code=status,
            section="repositories",
            name=stored_name,
            upstream=components.naming.upstream_of(stored_name),
            chosen=[*chosen_images, "", ""][:2],  # the values of the form's two fields
            platform=platform or "",
            found=comparison_view,
            problem=problem,
            field_names=FIELD_NAMES,
            max_layers_per_table=MAX_LAYERS_PER_TABLE,
        )
