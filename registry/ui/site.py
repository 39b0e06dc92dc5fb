"""The routes of all pages (`SiteRoutes`), and the route of `/`. The route of `/` redirects browsers to the pages, and
sends programs a short text."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from starlette.routing import BaseRoute, Match

from registry.admin.documentation import welcome
from registry.asgi import Receive, Scope, Send
from registry.http.error_statuses import PathUnknown
from registry.ui import (
    access_account_page,
    access_group_page,
    access_pages,
    account_pages,
    activity_page,
    comparison_page,
    description_page,
    grant_pages,
    job_texts,
    mirror_page,
    overview_page,
    own_account_page,
    page_files,
    repository_pages,
    search_page,
    setup_page,
    system_page,
    tag_history_page,
    tag_removal_page,
    upkeep_page,
)
from registry.ui.account_pages import HOME_PATH
from registry.ui.page_route import PageRoute, redirect

UI_PREFIX: Final = "/ui/"


def is_page_path(path: str) -> bool:
    """Returns whether a path is below `UI_PREFIX` and is not the path of a style sheet, script or icon."""
    return path.startswith(UI_PREFIX) and not path.startswith(f"{page_files.STATIC_PATH}/")


router = APIRouter(include_in_schema=False)
"""The routes of `/` and of `/ui`."""
_page_routes: Final[list[BaseRoute]] = []
"""The routes below `UI_PREFIX`, in the order in which they are compared with a request."""
_fallback_router = APIRouter(route_class=PageRoute, include_in_schema=False)
"""The last routes of `_page_routes`. One of them matches every path below `UI_PREFIX`."""


class SiteRoutes(BaseRoute):
    """Combines all routes below `UI_PREFIX` in a single route, so that an application compares requests for other paths
    with only one route. All applications of a process share the routes. With `include_router`, FastAPI would prepare
    the routes again for each application."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Returns the match of the first page route that matches the path and the method, and what this page route adds
        to the scope. If there is none, does the same for the first page route that matches only the path."""
        partial: tuple[Match, Scope] = Match.NONE, {}
        if scope["type"] != "http" or not scope["path"].startswith(UI_PREFIX):
            return partial
        for route in _page_routes:
            match, child_scope = route.matches(scope)
            if match is Match.FULL:
                return match, child_scope
            if match is Match.PARTIAL and partial[0] is Match.NONE:
                partial = match, child_scope
        return partial

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request to the page route that `matches` has put into the scope."""
        route: BaseRoute = scope["route"]
        await route.handle(scope, receive, send)


@router.get("/")
async def root(request: Request) -> Response:
    """Redirects clients that accept HTML, such as browsers, to the pages. Sends all other clients the text of
    `welcome`."""
    if "text/html" in request.headers.get("accept", ""):
        return redirect(HOME_PATH)
    return PlainTextResponse(await welcome(request), headers={"vary": "Accept"})


@router.get("/ui")
async def redirect_ui() -> Response:
    """Redirects to the home page."""
    return redirect(HOME_PATH)


@_fallback_router.get(HOME_PATH)
async def home(request: Request) -> Response:
    """Redirects to the page *Overview*."""
    return redirect(overview_page.OVERVIEW_PATH)


@_fallback_router.get(UI_PREFIX + "{path:path}")
async def unknown_page(path: str) -> Response:
    """Raises PathUnknown, because no page has this path."""
    raise PathUnknown


_MODULES: Final = (
    *(page_files, account_pages, overview_page, setup_page, system_page, search_page),
    *(mirror_page, upkeep_page, job_texts),
    *(tag_removal_page, tag_history_page, description_page, comparison_page),
    *(access_pages, access_account_page, access_group_page, grant_pages, own_account_page, activity_page),
    repository_pages,
)
_page_routes.extend(route for module in _MODULES for route in module.router.routes)
_page_routes.extend(_fallback_router.routes)
ROUTES: Final[list[BaseRoute]] = [SiteRoutes(), *router.routes]
"""The routes of the pages, for every application that has pages."""
