"""`VisitorRights`: what a visitor may do with a repository. A page offers only these actions."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass

from registry.admin.caller import Caller
from registry.admin.repository_rights import check_may_download, deletable_repository, pushable_repository
from storage.errors import Denied, NameUnknown, Unauthorized, Unsupported
from storage.names import RepositoryName


@dataclass(frozen=True, slots=True)
class VisitorRights:
    """What a visitor may do with a repository, according to the rights of their account and to the settings.

    - `may_push`: may write the description and restore tags. `may_delete`: may delete tags. Nobody may do either in a
      mirrored repository.
    - `may_download`: may download an image as an archive."""

    may_push: bool
    may_delete: bool
    may_download: bool


async def visitor_rights(caller: Caller, name: RepositoryName) -> VisitorRights:
    """Returns what the visitor may do with the repository with this stored name. Pages use the result to decide which
    actions to offer. The routes that change something check the rights again."""
    return VisitorRights(
        may_push=await _is_allowed(pushable_repository(caller, name)),
        may_delete=await _is_allowed(deletable_repository(caller, name)),
        may_download=_may_download(caller),
    )


async def _is_allowed(check: Awaitable[object]) -> bool:
    try:
        await check
    except (Denied, NameUnknown, Unauthorized, Unsupported):
        return False
    return True


def _may_download(caller: Caller) -> bool:
    try:
        check_may_download(caller)
    except (Unauthorized, Unsupported):
        return False
    return True
