"""Checks which rights a caller of the management API has on a repository. The errors are those of `/v2`
(`registry.auth.rights.guard`). A caller who may not read a repository gets the same error as for a repository that does
not exist.

Clients push to a *hosted* repository. A *mirrored* repository has the content of an upstream registry. The *stored
name* of a repository is its name in the store. The stored name of a mirrored repository begins with the name of the
upstream.

A name with the host of an upstream belongs to a mirrored repository. Any other name belongs to:

- a hosted repository, if the settings have no default upstream.
- a hosted repository, if a client has pushed to the name by `/v2`, or an import has stored content under the name.
- a repository of the default upstream in all other cases."""

from __future__ import annotations

from registry.admin.caller import Caller
from registry.auth.rights.guard import INSUFFICIENT_SCOPE
from registry.auth.rights.principal import Principal
from storage.access import Action
from storage.errors import Denied, NameHidden, Unauthorized, Unsupported
from storage.names import RepositoryName


async def require_readable(caller: Caller, name: RepositoryName) -> RepositoryName:
    """Returns the stored name of the repository to which `name` belongs now. Does not check whether the repository
    exists.

    `name` has one or two *candidates*: the repositories to which it can belong. It belongs to one of them now. If the
    caller may pull from a candidate, but not from the one to which `name` belongs now, raises NameHidden. If the caller
    may pull from no candidate, raises:

    - Unauthorized if the caller is not logged in.
    - Unauthorized if the caller's account may pull from a candidate. The token of the request then lacks this right.
    - NameHidden if the caller's account may pull from no candidate."""
    router, principal = caller.upkeep.router, caller.principal
    names = router.naming.candidates(name)
    allowed = [stored_name for stored_name in names if principal.may(Action.PULL, stored_name, name)]
    hidden_error = NameHidden(f"there is no repository {name}")
    if not allowed:
        if principal.is_anonymous or any(principal.account_may(Action.PULL, stored_name) for stored_name in names):
            raise _unauthorized(principal, f"pull from {name}")
        raise hidden_error
    stored_name = await router.stored_name(name)
    if stored_name not in allowed:
        raise hidden_error
    return stored_name


async def require_pushable(caller: Caller, name: RepositoryName) -> RepositoryName:
    """Returns the stored name of the hosted repository, if the caller may push to the repository and pull from it. The
    caller needs the right to pull because the responses to changes show stored content. Does not check whether the
    repository exists. Raises:

    - Unauthorized if the caller is not logged in and lacks one of the two rights.
    - Unauthorized if the token of the request lacks a right that the caller's account has.
    - Denied if the account may not push.
    - NameHidden if the account may push, but not pull.
    - Unsupported if the registry is read-only.
    - Unsupported if the name can belong only to a mirrored repository.
    - NameUnknown if the name can belong to a hosted repository, but now belongs to a repository of the default
      upstream."""
    _check_may(caller.principal, Action.PUSH, "push to", name)
    if caller.upkeep.settings.read_only:
        raise Unsupported("this registry is read-only")
    _check_may_pull(caller.principal, name)
    return await caller.upkeep.router.require_hosted(name)


async def require_deletable(caller: Caller, name: RepositoryName) -> RepositoryName:
    """Returns the stored name of the hosted repository, if the caller may delete from the repository and pull from it.
    Raises Unsupported if the settings forbid deletes, and the errors of `require_pushable`, with the right to delete in
    place of the right to push."""
    settings = caller.upkeep.settings
    _check_may(caller.principal, Action.DELETE, "delete from", name)
    if settings.read_only or not settings.delete:
        raise Unsupported("this registry does not allow deletes")
    _check_may_pull(caller.principal, name)
    return await caller.upkeep.router.require_hosted(name)


def check_may_download(caller: Caller) -> None:
    """Checks the setting `downloads.allow`. Does not check whether the caller may pull. Raises Unsupported if the
    setting allows downloads to nobody. Raises Unauthorized if the setting requires a login, the registry has accounts
    (`is_registry_open` is False), and the caller is not logged in."""
    allowed = caller.upkeep.settings.downloads.allow
    if allowed == "nobody":
        raise Unsupported("this registry does not offer downloads of images; pull the image")
    if allowed == "accounts" and caller.principal.is_anonymous and not caller.principal.is_registry_open:
        raise Unauthorized("log in to download images")


def _check_may(principal: Principal, action: Action, action_phrase: str, name: RepositoryName) -> None:
    """If the caller may not do `action` on the hosted repository `name`, raises Denied or Unauthorized."""
    if not principal.may(action, name, name):
        if principal.is_anonymous or principal.account_may(action, name):
            raise _unauthorized(principal, f"{action_phrase} {name}")
        raise Denied(f"{principal.name} may not {action_phrase} {name}")


def _check_may_pull(principal: Principal, name: RepositoryName) -> None:
    """If the caller may not pull from the hosted repository `name`, raises NameHidden or Unauthorized."""
    try:
        _check_may(principal, Action.PULL, "pull from", name)
    except Denied:
        raise NameHidden(f"there is no repository {name}") from None


def _unauthorized(principal: Principal, action_phrase: str) -> Unauthorized:
    """Returns the error for an anonymous caller, or for a token that lacks a right of its account."""
    if principal.is_anonymous:
        return Unauthorized(f"log in to {action_phrase}")
    return Unauthorized(f"this token has no right to {action_phrase}", reason=INSUFFICIENT_SCOPE)
