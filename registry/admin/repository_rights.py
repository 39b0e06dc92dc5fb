"""Checks the rights of callers of the management API on one repository. The errors are those of `/v2`
(`registry.auth.rights.guard`). A caller who may not read a repository gets the same error as for a repository that does
not exist.

Clients push to a *hosted* repository. A *mirrored* one has the content of an upstream registry. A name without a host
leads to a hosted repository, or to one of the *default upstream*. The *stored name* of the latter begins with the name
of the upstream."""

from __future__ import annotations

from registry.admin.caller import Caller
from registry.auth.rights.guard import INSUFFICIENT_SCOPE
from registry.auth.rights.principal import Principal
from storage.access import Action
from storage.errors import Denied, NameHidden, Unauthorized, Unsupported
from storage.names import RepositoryName


async def readable_repository(caller: Caller, name: RepositoryName) -> RepositoryName:
    """Returns the stored name of the repository that a read of `name` leads to. If the caller may not pull from it,
    raises NameHidden. Raises Unauthorized instead if the caller is not logged in, or if the caller's account may pull,
    but the token of the request does not allow it. Does not check whether the repository exists."""
    upkeep, principal = caller.upkeep, caller.principal
    names = upkeep.router.naming.candidates(name)
    allowed = [stored_name for stored_name in names if principal.may(Action.PULL, stored_name, name)]
    unknown = NameHidden(f"there is no repository {name}")
    if not allowed:
        if principal.is_anonymous or any(principal.account_may(Action.PULL, stored_name) for stored_name in names):
            raise _unauthorized(principal, f"pull from {name}")
        raise unknown
    stored_name = await upkeep.router.stored_name(name)
    if stored_name not in allowed:
        raise unknown
    return stored_name


async def pushable_repository(caller: Caller, name: RepositoryName) -> RepositoryName:
    """Returns the stored name of the hosted repository, if the caller may push to it and pull from it. The right to
    pull is needed because the responses to changes, and their errors, show stored content. Does not check whether the
    repository exists. Raises:

    - Denied if the caller may not push, and NameHidden if the caller may not pull. In both cases, it is Unauthorized
      instead if the caller is not logged in, or if the caller's account has the right, but the token of the request
      does not allow it.
    - Unsupported if the repository is mirrored, or if the registry is read-only.
    - NameUnknown if the name leads to the default upstream. If there is a default upstream, a name without a host does
      so until the first push to it by `/v2`, or the first import. From then on, it leads to a hosted repository."""
    _check_may(caller.principal, Action.PUSH, "push to", name)
    if caller.upkeep.settings.read_only:
        raise Unsupported("this registry is read-only")
    _check_may_pull(caller.principal, name)
    return await caller.upkeep.router.hosted_repository(name)


async def deletable_repository(caller: Caller, name: RepositoryName) -> RepositoryName:
    """Returns the stored name of the hosted repository, if the caller may delete from it and pull from it. Raises the
    errors of `pushable_repository`, with the right to delete in place of the right to push; Unsupported also if the
    settings forbid deletes."""
    settings = caller.upkeep.settings
    _check_may(caller.principal, Action.DELETE, "delete from", name)
    if settings.read_only or not settings.delete:
        raise Unsupported("this registry does not allow deletes")
    _check_may_pull(caller.principal, name)
    return await caller.upkeep.router.hosted_repository(name)


def check_may_download(caller: Caller) -> None:
    """Checks that the setting `downloads.allow` lets the caller download images that it may pull. Raises Unsupported or
    Unauthorized if not."""
    allowed = caller.upkeep.settings.downloads.allow
    if allowed == "nobody":
        raise Unsupported("this registry does not offer downloads of images; pull the image")
    if allowed == "accounts" and caller.principal.is_anonymous and not caller.principal.is_registry_open:
        raise Unauthorized("log in to download images")


def _check_may(principal: Principal, action: Action, action_phrase: str, name: RepositoryName) -> None:
    """Raises Denied, or Unauthorized, unless the caller may do `action` on the hosted repository `name`."""
    if not principal.may(action, name, name):
        if principal.is_anonymous or principal.account_may(action, name):
            raise _unauthorized(principal, f"{action_phrase} {name}")
        raise Denied(f"{principal.name} may not {action_phrase} {name}")


def _check_may_pull(principal: Principal, name: RepositoryName) -> None:
    """Raises NameHidden, or Unauthorized, unless the caller may pull from the hosted repository `name`."""
    try:
        _check_may(principal, Action.PULL, "pull from", name)
    except Denied:
        raise NameHidden(f"there is no repository {name}") from None


def _unauthorized(principal: Principal, action_phrase: str) -> Unauthorized:
    """Returns the error for a caller without an account, or for a token that does not allow an action that its account
    may do."""
    if principal.is_anonymous:
        return Unauthorized(f"log in to {action_phrase}")
    return Unauthorized(f"this token has no right to {action_phrase}", reason=INSUFFICIENT_SCOPE)
