"""`VisitorRights` says what the visitor of a repository's page may do with the repository. The page offers only these
actions. `receive_repository_form` receives a form that changes a repository."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import Request

from registry.admin.caller import Caller
from registry.admin.repository_rights import check_may_download, require_deletable, require_pushable
from registry.http.query import Query
from registry.ui.page_route import MAX_FORM_BYTES, caller_of, receive_form
from storage.errors import Denied, NameUnknown, Unauthorized, Unsupported
from storage.names import RepositoryName


@dataclass(frozen=True, slots=True)
class VisitorRights:
    """What a visitor may do with a repository, according to the rights of their account and to the settings.

    - `may_push`: may write the description and restore tags. Always False for a mirrored repository.
    - `may_delete`: may delete tags. Always False for a mirrored repository.
    - `may_download`: may download an image as an archive."""

    may_push: bool
    may_delete: bool
    may_download: bool


async def find_visitor_rights(caller: Caller, name: RepositoryName) -> VisitorRights:
    """Returns what the visitor may do with a repository. `name`: the repository's *stored name*, its name in
    the store. The visitor may have requested the repository under another name (`registry.admin.repository_rights`).

    Use the result only to decide which actions a page offers. The routes that change a repository check the rights
    again."""
    return VisitorRights(
        may_push=await _is_allowed(require_pushable(caller, name)),
        may_delete=await _is_allowed(require_deletable(caller, name)),
        may_download=_may_download(caller),
    )


async def receive_repository_form(
    request: Request,
    name: RepositoryName,
    check: Callable[[Caller, RepositoryName], Awaitable[RepositoryName]],
    max_bytes: int = MAX_FORM_BYTES,
) -> tuple[Caller, RepositoryName, Query]:
    """Returns the visitor, the stored name of the repository `name`, and the fields of the form. `max_bytes`: the
    largest size of the form. Raises the errors of `receive_form`.

    `check`: a function such as `require_pushable`. It returns the stored name, or raises an error if the visitor may
    not change the repository. `check` is called before the form is received, so that nobody without rights can send a
    form. It is called again when the form has arrived, because the rights may have changed in the meantime."""

    async def check_visitor(request: Request) -> tuple[Caller, RepositoryName]:
        caller = caller_of(request)
        return caller, await check(caller, name)

    (caller, stored), form = await receive_form(request, check_visitor, max_bytes)
    return caller, stored, form


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
