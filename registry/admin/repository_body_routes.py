"""The route classes of requests that change a repository and have a body. These classes check the caller's rights on
the repository before the body is received. The function of the route checks the rights again when the body has
arrived."""

from __future__ import annotations

from fastapi import Request

from registry.admin.body_limits import MAX_LARGE_BODY_BYTES
from registry.admin.caller import Caller, identify_caller
from registry.admin.management_route import ManagementRoute
from registry.admin.repository_rights import require_deletable, require_pushable
from storage.names import RepositoryName


class PushRoute(ManagementRoute):
    """A route that needs `push` and `pull` on the repository that the path parameter `name` names."""

    async def check_rights(self, request: Request) -> None:
        """Raises NameInvalid, and the errors of `identify_caller` and `require_pushable`."""
        await require_pushable(*await _caller_and_repository(request))


class DeleteRoute(ManagementRoute):
    """A route that needs `delete` and `pull` on the repository that the path parameter `name` names."""

    async def check_rights(self, request: Request) -> None:
        """Raises NameInvalid, and the errors of `identify_caller` and `require_deletable`."""
        await require_deletable(*await _caller_and_repository(request))


class LargePushRoute(PushRoute):
    """A `PushRoute` whose requests may have large bodies: a long text, or a list of many tags."""

    max_body_bytes = MAX_LARGE_BODY_BYTES


class LargeDeleteRoute(DeleteRoute):
    """A `DeleteRoute` whose requests may have large bodies: a list of many tags."""

    max_body_bytes = MAX_LARGE_BODY_BYTES


async def _caller_and_repository(request: Request) -> tuple[Caller, RepositoryName]:
    # The last two parameters of `identify_caller` only serve the OpenAPI document. A direct call passes None.
    return await identify_caller(request), RepositoryName(request.path_params["name"])
