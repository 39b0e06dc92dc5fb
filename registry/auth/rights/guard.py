"""`Guarded`: checks the principal's rights before each call on the registry behind it.

A refusal depends on who asks for what, never on what is stored, and no look-up comes before it. Reads and deletes are
checked against the name under which content is stored, pushes against the name that is pushed to. A call without a
rule here is refused.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeVar, cast

from registry.auth.rights.principal import Principal, current_principal
from registry.auth.rights.sealed_cursors import CursorKind, SealedCursors, process_secrets
from registry.naming import NamingRules
from registry.request import current_request
from storage.access import Action
from storage.content import Actor, Page
from storage.errors import (
    BlobUnknown,
    Denied,
    ManifestUnknown,
    NameUnknown,
    RegistryError,
    Unauthorized,
    Unsupported,
)
from storage.interface import Registry
from storage.keyed_locks import KeyedLocks
from storage.names import Digest, RepositoryName
from storage.patterns import NameSet
from storage.wrappers import Call, ForwardingRegistry

T = TypeVar("T")
INSUFFICIENT_SCOPE: Final = "insufficient_scope"
_PUSH: Final = Action.PUSH.value
_ACTION_PHRASES: Final = {Action.PULL: "pull from", Action.PUSH: "push to", Action.DELETE: "delete from"}

OnDenied = Callable[[Principal, Action, str], None]
ResolveName = Callable[[RepositoryName], Awaitable[RepositoryName]]


def _no_blob(call: Call[Any]) -> RegistryError:
    return BlobUnknown(f"{call.repo} has no blob {call.args[0]}")


def _no_manifest(call: Call[Any]) -> RegistryError:
    return ManifestUnknown(f"{call.repo} has no manifest {call.args[0]}")


def _no_repository(call: Call[Any]) -> RegistryError:
    return NameUnknown(f"there is no repository {call.repo}")


class _Rule(NamedTuple):
    """How a read or a delete is checked. `bits`: those of `action`, as a plain number. `missing`: makes the error that
    the store raises where nothing is there. `hidden`: a denied account gets that error in place of Denied."""

    action: Action
    bits: int
    missing: Callable[[Call[Any]], RegistryError]
    hidden: bool


def _reads(missing: Callable[[Call[Any]], RegistryError]) -> _Rule:
    return _Rule(Action.PULL, Action.PULL.value, missing, hidden=True)


def _deletes(missing: Callable[[Call[Any]], RegistryError]) -> _Rule:
    return _Rule(Action.DELETE, Action.DELETE.value, missing, hidden=False)


_RULES: Final[Mapping[str, _Rule]] = MappingProxyType(
    {
        "resolve_blob": _reads(_no_blob),
        "open_blob": _reads(_no_blob),
        "resolve_manifest": _reads(_no_manifest),
        "get_manifest": _reads(_no_manifest),
        "tags": _reads(_no_repository),
        "referrers": _reads(_no_repository),
        "delete_blob": _deletes(_no_blob),
        "delete_manifest": _deletes(_no_repository),
        "delete_tag": _deletes(_no_repository),
    }
)
"""The rules of reads and deletes; `Guarded._handle_other` has those of the other calls."""


def ignore_denial(principal: Principal, action: Action, name: str) -> None:
    """Records no denial."""


async def keep_principal(principal: Principal) -> Principal:
    """Returns the principal as it is."""
    return principal


class Guarded(ForwardingRegistry):
    """`inner`, for the principal of the current request.

    `naming`: which stored names a requested name may lead to; none without mirrors. `resolve_name`: which of them it
    leads to now; it may change once, to the requested name itself. `denied` is called for what an account was refused,
    with the name it requested. `renew` returns a principal as of now, or raises Unauthorized. `cursors` seals places in
    lists; None: with a key of this process."""

    def __init__(
        self,
        inner: Registry,
        naming: NamingRules | None = None,
        resolve_name: ResolveName | None = None,
        denied: OnDenied = ignore_denial,
        renew: Callable[[Principal], Awaitable[Principal]] = keep_principal,
        cursors: SealedCursors | None = None,
    ) -> None:
        super().__init__(inner)
        self._naming = naming or NamingRules()
        self._is_mirroring = bool(self._naming.upstreams)
        self._resolve_name = resolve_name
        self._denied = denied
        self._renew = renew
        self._cursors = cursors or SealedCursors(process_secrets())
        self._lists: KeyedLocks[str] = KeyedLocks()

    async def handle(self, call: Call[T]) -> T:
        rule = _RULES.get(call.operation)
        if rule is None:
            return await self._handle_other(call)
        if self._allows(rule.bits, call.repo):
            return await self.forward(call)
        if call.operation == "resolve_blob":
            return await self._resolve_blob(rule, call)
        try:
            call.repo = await self._settle(rule, call.repo, rule.missing(call))
        except NameUnknown:
            if call.operation == "referrers":  # an unknown repository has an empty list
                return cast(T, Page([]))
            raise
        return await self.forward(call)

    async def _handle_other(self, call: Call[T]) -> T:
        match call.operation:
            case "start_upload" | "resume_upload" | "upload_offset":
                call.options["by"] = call.actor or Actor(current_principal().name)
            case "mount_blob":
                self.check_push(call.repo)
                digest, source = call.args
                call.args = digest, await self._mount_source(source, digest)
                return await self.forward(call)
            case "put_manifest":
                # The body may have taken as long as the client liked: the rights of now count.
                principal = current_principal()
                if (renewed := await self._renew(principal)) is not principal:
                    current_request().principal = renewed
            case "repositories":
                return cast(T, await self._repositories(*call.args))
            case _:
                raise Unsupported
        self.check_push(call.repo)
        return await self.forward(call)

    def check_push(self, repo: RepositoryName) -> None:
        """Raises what a push to `repo` is refused with: Unauthorized, Denied."""
        principal = current_principal()
        if not principal.actions(repo, current_request().requested_name or repo) & _PUSH:
            raise self._refusal(principal, Action.PUSH, repo, (repo,))

    def _allows(self, bits: int, repo: RepositoryName) -> bool:
        """Returns whether the action of `bits` is allowed on every stored name that `repo` may lead to."""
        request = current_request()
        principal, requested = request.principal, request.requested_name or repo
        if type(principal) is not Principal:  # as `current_principal`, without a call on the hot path
            return False
        if not self._is_mirroring:
            return principal.actions(repo, requested) & bits != 0
        return all(principal.actions(name, requested) & bits for name in self._naming.candidates(repo))

    async def _settle(self, rule: _Rule, repo: RepositoryName, missing: RegistryError) -> RepositoryName:
        """Returns the stored name that `repo` leads to, where the action is allowed on it and not on all the names it
        may lead to. The call goes on with that name: somebody may push to `repo` meanwhile.

        Raises `missing` in place of Denied where the rule hides what is there; and where a name that was never pushed
        leads to a mirror that is closed to this principal, while the name itself is open: nothing of its own is there.
        Raises Unauthorized, Denied."""
        principal, requested = current_principal(), current_request().requested_name or repo
        names: Sequence[RepositoryName] = self._naming.candidates(repo)
        allowed = [name for name in names if principal.may(rule.action, name, requested)]
        if allowed:
            stored = await self._stored_name(repo, names)
            if stored in allowed:
                return stored
            if repo in allowed:
                raise missing
            names = (stored,)
        raise self._refusal(principal, rule.action, repo, names, missing if rule.hidden else None)

    async def _stored_name(self, repo: RepositoryName, candidates: Sequence[RepositoryName]) -> RepositoryName:
        if len(candidates) == 1 or self._resolve_name is None:
            return candidates[0]
        return await self._resolve_name(repo)

    def _refusal(
        self,
        principal: Principal,
        action: Action,
        repo: RepositoryName,
        names: Sequence[RepositoryName],
        missing: RegistryError | None = None,
    ) -> RegistryError:
        """Returns the error for `action` on `repo`, which leads to one of the stored `names`: the table in
        docs/adr/0011-who-may-do-what.md. `missing`: the error to use in place of Denied."""
        requested, doing = current_request().requested_name or repo, _ACTION_PHRASES[action]
        if any(principal.entitled(action, name) for name in names):
            return Unauthorized(f"the token shown is not for this: to {doing} {requested}", reason=INSUFFICIENT_SCOPE)
        if principal.is_anonymous:
            return Unauthorized(_grant_needed(names) if principal.open else f"log in to {doing} {requested}")
        self._denied(principal, action, requested)
        return missing or Denied(f"{principal.name} may not {doing} {requested}")

    async def _resolve_blob(self, rule: _Rule, call: Call[T]) -> T:
        """Asks by the requested name, not the stored one: the router asks no upstream about a blob of a name that was
        never pushed. A push meanwhile can lead the name elsewhere, so the rights are checked once more afterwards."""
        repo, missing = call.repo, rule.missing(call)
        await self._settle(rule, repo, missing)
        found = await self.forward(call)
        await self._settle(rule, repo, missing)
        return found

    async def _mount_source(self, source: RepositoryName | NameSet, digest: Digest) -> RepositoryName | NameSet:
        """Returns the stored name of a mount's source, or the set of names that may be pulled. Raises BlobUnknown for a
        source that may not be read. A token is checked by the source's own name, whatever the request names."""
        principal = current_principal()
        if isinstance(source, NameSet):
            return _intersect(source, principal.names(Action.PULL))
        candidates = self._naming.candidates(source)
        allowed = [name for name in candidates if principal.may(Action.PULL, name, source)]
        stored = await self._stored_name(source, candidates) if allowed else candidates[0]
        if stored not in allowed:
            raise BlobUnknown(f"{source} has no blob {digest}")
        return stored

    async def _repositories(self, after: str | None, limit: int, within: NameSet) -> Page[RepositoryName]:
        """Lists the repositories that may be pulled. Raises Unauthorized without a credential and for a token without
        the catalog, since some clients log in only after such an answer; RequestInvalid for an unknown cursor. An
        account's lists run one at a time, so that they do not delay those of others."""
        principal = current_principal()
        if not principal.may_list:
            reason = INSUFFICIENT_SCOPE if principal.identity.access is not None else None
            raise Unauthorized("log in to list repositories", reason=reason)
        after = await self._cursors.read(CursorKind.REPOSITORIES, after)
        async with self._lists.hold(principal.name):
            page = await self.inner.repositories(after, limit, _intersect(within, principal.listed))
        if page.next_after is None or page.next_after in page.items[-1:]:
            return page
        return Page(page.items, page.more, await self._cursors.seal(CursorKind.REPOSITORIES, page.next_after))


def _intersect(wanted: NameSet, allowed: NameSet) -> NameSet:
    """Returns the names in both sets. Raises Unsupported unless one of them holds every name: no caller needs more."""
    if not wanted.has_every_name and not allowed.has_every_name:
        raise Unsupported
    return allowed if wanted.has_every_name else wanted


def _grant_needed(names: Sequence[RepositoryName]) -> str:
    upstream = names[-1].partition("/")[0]
    return (
        f"what is mirrored from {upstream} takes a grant of its own, and there are no accounts here yet: "
        "add one, or set require_grant = false for that upstream"
    )
