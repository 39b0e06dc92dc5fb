"""Route classes for requests with a body that change a repository. They check the caller's rights on the repository
before the server receives the body. The route's function checks the rights again when the body is complete."""

from __future__ import annotations

from fastapi import Request

from registry.admin.body_limits import MAX_LARGE_BODY_BYTES
from registry.admin.caller import Caller, identify_caller
from registry.admin.management_route import ManagementRoute
from registry.admin.repository_rights import require_deletable, require_pushable
from storage.names import RepositoryName


class PushRoute(ManagementRoute):
    """A route for callers with the rights `push` and `pull` on the repository in the path parameter `name`."""

    async def check_rights(self, request: Request) -> None:
        """Raises NameInvalid, and the errors of `identify_caller` and `require_pushable`."""
        await require_pushable(*await _caller_and_repository(request))


class DeleteRoute(ManagementRoute):
    """A route for callers with the rights `delete` and `pull` on the repository in the path parameter `name`."""

    async def check_rights(self, request: Request) -> None:
        """Raises NameInvalid, and the errors of `identify_caller` and `require_deletable`."""
        await require_deletable(*await _caller_and_repository(request))


class LargePushRoute(PushRoute):
    """A `PushRoute` whose requests may have bodies of up to `MAX_LARGE_BODY_BYTES`, such as a long text or many
    tags."""

    max_body_bytes = MAX_LARGE_BODY_BYTES


class LargeDeleteRoute(DeleteRoute):
    """A `DeleteRoute` whose requests may have bodies of up to `MAX_LARGE_BODY_BYTES`, such as a list of many tags."""

    max_body_bytes = MAX_LARGE_BODY_BYTES


async def _caller_and_repository(request: Request) -> tuple[Caller, RepositoryName]:
    return await identify_caller(request), RepositoryName(request.path_params["name"])
