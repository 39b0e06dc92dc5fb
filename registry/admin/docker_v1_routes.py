"""The parts of Docker's first registry API that clients still use. The clients are `docker search`, `podman search`,
and the image search of NAS systems (network storage). Pushes and pulls use `/v2`.

- `docker search HOST/TERM` sends `GET /v1/_ping` and then `GET /v1/search?q=TERM&n=25`. Docker sends a login only with
  the second request. The login depends on what `docker login` has stored:
  - A refresh token from this registry: Docker requests a bearer token for the scope `registry:catalog:search`, and
    sends the bearer token.
  - A password: Docker sends the user name and the password.
  - Nothing: Docker sends an empty user name and an empty password.

  Docker sends user names and passwords only over HTTPS, and only if the response to `GET /v1/_ping` has the header
  `X-Docker-Registry-Standalone`.
- `podman search HOST/TERM` sends `GET /v1/search` without a login. If the status is not 200, podman reads
  `/v2/_catalog` with its login.

If a search without a login finds nothing, this registry answers 401, so that the client sends its login. A registry
without accounts (`is_registry_open`) answers with an empty page instead.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel

from registry.admin.caller import Caller, identify_caller
from registry.admin.management_route import ManagementRoute
from registry.admin.repository_rights import require_readable
from storage.content_search import MAX_OFFSET
from storage.errors import Unauthorized
from storage.names import RepositoryName

router = APIRouter(route_class=ManagementRoute, prefix="/v1", include_in_schema=False)
DEFAULT_RESULTS: Final = 25
"""Number of results on a page if the request has no parameter `n`, or `n=0`."""
MAX_RESULTS: Final = 100
"""Largest number of results on a page."""
MAX_TAGS: Final = 1000
"""Largest number of tags in a list. Clients cannot request further tags."""
_HEADERS: Final = {"X-Docker-Registry-Version": "1.0", "X-Docker-Registry-Standalone": "true"}
_EMPTY_LOGIN: Final = b"Basic Og=="
"""The value of an Authorization header with an empty user name and an empty password."""


async def identify_v1_caller(request: Request) -> Caller:
    """Returns the caller. Treats an empty user name with an empty password as no login. Raises the errors of
    `identify_caller`."""
    headers = [header for header in request.scope["headers"] if header != (b"authorization", _EMPTY_LOGIN)]
    # `identify_caller` stores the actor in the dict `state` of the copied scope, and `ManagementRoute` reads the actor
    # in the original scope. So both scopes must share one dict.
    request.scope.setdefault("state", {})
    return await identify_caller(Request({**request.scope, "headers": headers}))


V1Caller = Annotated[Caller, Depends(identify_v1_caller)]


class V1Result(BaseModel):
    """A repository. Docker's client expects all of these fields."""

    name: str
    description: str = ""
    star_count: int = 0
    is_official: bool = False
    is_automated: bool = False
    is_trusted: bool = False


class V1Results(BaseModel):
    """A page of results. The total number of results is not known. `num_results` is the number of results on this and
    all earlier pages, plus one if there is a next page."""

    query: str
    page: int
    page_size: int
    num_pages: int
    num_results: int
    results: list[V1Result]


@router.get("/_ping")
async def ping(response: Response) -> dict[str, Any]:
    """Tells the client that this registry handles logins itself (`standalone`)."""
    response.headers.update(_HEADERS)
    return {"standalone": True}


@router.get("/search")
async def search(
    response: Response,
    caller: V1Caller,
    q: Annotated[str, Query(max_length=1024)] = "",
    n: Annotated[int, Query(ge=0, le=10**9)] = DEFAULT_RESULTS,
    page: Annotated[int, Query(ge=0, le=10**9)] = 1,
) -> V1Results:
    """Finds repositories by name. Stored repositories come first. The results of the upstream with the setting `search`
    follow, if there is such an upstream. In a registry with accounts, raises Unauthorized for an anonymous caller who
    may pull nothing, and for one whose first page is empty."""
    response.headers.update(_HEADERS)
    caller.content_searches.check_may_search(caller.principal)
    count, page = min(n or DEFAULT_RESULTS, MAX_RESULTS), max(page, 1)
    # Clients search for Docker Hub's official images with or without this prefix.
    text = q.strip().removeprefix("library/")
    offset = min((page - 1) * count, MAX_OFFSET + 1)  # an offset above MAX_OFFSET finds nothing
    stored_page = await caller.content_searches.find_repositories(caller.searcher, text, offset, count)
    results = [V1Result(name=name) for name in stored_page.items]
    has_more = stored_page.more
    if text and len(results) < count:
        upstream_results = await caller.content_searches.search_upstream(caller.searcher, text, count, page)
        listed_names = {result.name for result in results}
        results += [
            V1Result(
                name=name,
                description=upstream_result.description,
                star_count=upstream_result.stars,
                is_official=upstream_result.is_official,
            )
            for name, upstream_result in upstream_results
            if name not in listed_names
        ][: count - len(results)]
        has_more |= len(upstream_results) == count  # a full page is probably not the last one
    if not results and page == 1 and caller.principal.is_anonymous and not caller.principal.is_registry_open:
        raise Unauthorized("log in to search")
    total = (page - 1) * count + len(results) + (1 if has_more else 0)
    return V1Results(
        query=q,
        page=page,
        page_size=count,
        num_pages=page + 1 if has_more else page,
        num_results=total,
        results=results,
    )


@router.get("/repositories/{name:path}/tags")
async def list_tags(response: Response, caller: V1Caller, name: str) -> dict[str, str]:
    """Lists the tags of a stored repository, each with the hex digest of its manifest. Needs `pull` on the
    repository."""
    response.headers.update(_HEADERS)
    stored_name = await require_readable(caller, RepositoryName(name))
    tags = await caller.content_searches.list_tags(stored_name, MAX_TAGS)
    return {tag: digest.encoded for tag, digest in tags}
