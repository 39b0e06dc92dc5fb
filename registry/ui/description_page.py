"""The page on which people write the description of a repository, with a preview."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fastapi import APIRouter, Request, Response

from registry.admin.caller import Caller
from registry.admin.repository_rights import require_pushable, require_readable
from registry.http.error_statuses import status_of
from registry.http.query import parse_number
from registry.ui.image_page import path_of, repository_in
from registry.ui.languages import translatable
from registry.ui.page_route import (
    FormRoute,
    SlotlessRoute,
    caller_of,
    page_response,
    page_slot,
    redirect,
    visit_of,
)
from registry.ui.visitor_rights import receive_repository_form
from storage.descriptions import MAX_DESCRIPTION_BYTES
from storage.errors import PreconditionFailed
from storage.names import RepositoryName

if TYPE_CHECKING:
    from markupsafe import Markup

    from registry.browse.markdown_rendering import RenderedText
    from registry.browse.models import DescriptionView

DESCRIPTION_PATH: Final = "/ui/description"
_MAX_FORM_BYTES: Final = 3 * MAX_DESCRIPTION_BYTES + 16 * 1024
"""The largest size of the form. A form encodes each byte of a text as three characters (`%XX`), except for letters,
digits and a few others."""
TOP_HEADING_LEVEL: Final = 3
"""The level of the highest headings of a description. The page and its section have headings of levels 1 and 2."""

router = APIRouter(route_class=SlotlessRoute, include_in_schema=False)
_forms = APIRouter(route_class=FormRoute, include_in_schema=False)
"""The routes that receive a form. Handlers of `router` and `_forms` start without a *slot*, which is the permit to
render a page. They acquire a slot with `page_slot` before they render a page."""


def description_html(html: str) -> Markup:
    """Returns the HTML of a description as a value that templates do not escape. `html`: only HTML that
    `registry.browse.markdown_rendering` has made safe."""
    from markupsafe import Markup  # imported late, like all modules that only pages need

    return Markup(html)


@router.get(DESCRIPTION_PATH + "/{path:path}")
async def description_form(request: Request, path: str) -> Response:
    """Shows the form with the stored description. Needs the rights `pull` and `push`. Raises Unauthorized, Denied,
    Unsupported, NameUnknown."""
    caller, name = caller_of(request), repository_in(path)
    stored = await _require_writable(caller, name)  # the stored name of the repository
    description = await caller.repository_browser.stored_description(caller.context_for(stored), stored)
    async with page_slot(request):
        if description is None:
            return await _form_page(request, stored, "", 0)
        return await _form_page(request, stored, description.text, description.revision)


@_forms.post(DESCRIPTION_PATH + "/{path:path}")
async def write_description(request: Request, path: str) -> Response:
    """Receives the form. The field `revision` is the revision that the description had when the visitor got the form.
    The field `action` has one of these values:

    - `save`: replaces the description by the field `text` and redirects to the repository. An empty text removes the
      description. If the description has another revision now, saves nothing, and shows the form again together with
      the stored description.
    - `preview`: shows how the text will look.

    Needs the rights `pull` and `push`. Raises Unauthorized, Denied, Unsupported, NameUnknown, RequestInvalid,
    FormTooLarge."""
    # `stored` is the stored name of the repository.
    caller, stored, form = await receive_repository_form(
        request, repository_in(path), _require_writable, _MAX_FORM_BYTES
    )
    text = (form.one("text") or "").replace("\r\n", "\n")  # browsers send CRLF
    revision = _revision(form.one("revision"))
    context = caller.context_for(stored)
    if form.one("action") == "save":
        try:
            await caller.repository_browser.put_description(
                context, stored, text, revision, caller.actor, TOP_HEADING_LEVEL
            )
        except PreconditionFailed as error:
            theirs = await caller.repository_browser.rendered_description(context, stored, TOP_HEADING_LEVEL)
            problem = translatable("Somebody else has changed the description. Saving replaces theirs, shown below.")
            async with page_slot(request):
                return await _form_page(
                    request, stored, text, theirs.revision, theirs=theirs, problem=problem, status=status_of(error)
                )
        return redirect(f"/ui/repositories/{path_of(stored, None)}")
    preview = await caller.repository_browser.preview_description(context, text, TOP_HEADING_LEVEL)
    async with page_slot(request):
        return await _form_page(request, stored, text, revision, preview=preview)


async def _require_writable(caller: Caller, name: RepositoryName) -> RepositoryName:
    """Returns the stored name of the hosted repository `name`. Raises the errors of `require_readable` and
    `require_pushable` if the visitor may not read and write the description."""
    await require_readable(caller, name)
    return await require_pushable(caller, name)


async def _form_page(
    request: Request,
    name: RepositoryName,
    text: str,
    revision: int,
    *,
    preview: RenderedText | None = None,
    theirs: DescriptionView | None = None,
    problem: str = "",
    status: int = 200,
) -> Response:
    """Returns the page with the form. `text`: the text in the form. `preview`: the same text, rendered; None: no
    preview. `theirs`: the description that somebody else has saved in the meantime; None: nobody has."""
    return await page_response(
        request,
        "description.html",
        status_code=status,
        section="repositories",
        here=visit_of(request).path,
        name=name,
        text=text,
        revision=revision,
        preview=None if preview is None else description_html(preview.html),
        is_preview_fully_formatted=preview is None or preview.is_fully_formatted,
        theirs=None if theirs is None else description_html(theirs.html),
        are_theirs_fully_formatted=theirs is None or theirs.formatted,
        problem=problem,
        # The browser counts characters, not bytes. A character takes at least one byte, so the browser accepts every
        # allowed text. The limit in bytes is checked when the text is saved or previewed.
        max_characters=MAX_DESCRIPTION_BYTES,
    )


def _revision(text: str | None) -> int:
    """Converts the field `revision` of a form to a number. Raises RequestInvalid."""
    return parse_number(text or "", "the form has no revision of the description")


router.routes.extend(_forms.routes)
