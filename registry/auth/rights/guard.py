"""`Guarded`: a wrapper of a registry object that checks the rights of the request's principal before each call of a
method.

The principal is the account, or anonymous client, that makes the request. A refusal does not reveal what is stored: a
client without the right to read a repository gets the same error whether or not the content exists.

A *stored name* is the name of a repository in the store. Pushed content is stored under the name to which the client
pushed it. Content that is mirrored from an *upstream* (another registry) is stored under a name that begins with the
name of the upstream: `ubuntu` as `docker.io/library/ubuntu`.

The *candidates* of the repository name `repo` in a call are the stored names to which `repo` can lead:

- If `repo` belongs to an upstream, as `ghcr.io/app` does, the only candidate is the stored name of the mirrored
  content.
- If `repo` can only be pushed content, for example because there is no default upstream, the only candidate is `repo`.
- Otherwise there are two candidates. With the default upstream `docker.io`, the name `ubuntu` has the candidates
  `ubuntu`, for pushed content, and `docker.io/library/ubuntu`, for mirrored content. Before the first push to `ubuntu`,
  the name leads to the mirrored content. After the first push, it leads to the pushed content.

For reads and deletes, the account needs the right on the stored name to which `repo` leads now. For pushes, the account
needs the right on `repo` itself.

If the client sends a bearer token, the token must also allow the action. A bearer token lists names of repositories,
with the allowed actions on each. The token must list the action for at least one of these names:

- The name on which the account needs the right.
- The *requested name*: the name in the path of the request. It can differ from `repo` only if the Host header or
  the query names an upstream: `repo` then begins with the name of the upstream.

The guard refuses calls of methods that this module does not handle: it raises Unsupported.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeVar, cast

from registry.auth.rights.principal import Principal, current_principal
from registry.auth.rights.sealed_cursors import CursorKind, SealedCursors, process_secrets_reader
from registry.naming import NamingRules
from registry.request import current_request
from registry.visitor_limits import Limits, VisitorLimits
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
from storage.names import Digest, RepositoryName
from storage.patterns import NameSet
from storage.wrappers import Call, ForwardingRegistry

T = TypeVar("T")
INSUFFICIENT_SCOPE: Final = "insufficient_scope"
"""The error code in the challenge (`WWW-Authenticate`) if a token with more access would be accepted (RFC 6750,
3.1)."""
_PUSH_BITS: Final = Action.PUSH.value
"""The bits of the action push as a plain int, because comparing ints is faster."""
LIST_LIMITS: Final = Limits(max_running=4, max_running_per_visitor=1, max_pending=1000, max_pending_per_visitor=100)
"""How many lists of repositories a process makes at a time. A list *runs* when the process may read the store for it. A
list is *pending* when it runs or waits until it may run. A *visitor* is an account, or a network of anonymous clients.
One thread reads the store for all running lists. Only one list of each visitor may run, so that one visitor does not
occupy the thread."""
_ACTION_PHRASES: Final = {Action.PULL: "pull from", Action.PUSH: "push to", Action.DELETE: "delete from"}
"""The phrases for actions on a repository in error texts."""

OnDenied = Callable[[Principal, Action, str], None]
"""A function that records that an account was refused an action. The last argument is the name that the client
requested."""
ResolveName = Callable[[RepositoryName], Awaitable[RepositoryName]]
"""A function that returns the stored name to which the name `repo` of a call leads now."""


def _blob_not_found(call: Call[Any]) -> RegistryError:
    return BlobUnknown(f"{call.repo} has no blob {call.args[0]}")


def _manifest_not_found(call: Call[Any]) -> RegistryError:
    return ManifestUnknown(f"{call.repo} has no manifest {call.args[0]}")


def _repository_not_found(call: Call[Any]) -> RegistryError:
    return NameUnknown(f"there is no repository {call.repo}")


class _Rule(NamedTuple):
    """How the guard checks one kind of read or delete.

    - `action`: the action that must be allowed.
    - `bits`: the bits of `action` as a plain int, because comparing ints is faster.
    - `not_found`: returns the error that a call gets if the repository never had content. For deletes of manifests and
      tags this is NameUnknown, because the store raises NameUnknown in this case, not ManifestUnknown.
    - `hides_content`: whether an account without the right gets the error of `not_found` instead of Denied. The account
      then does not learn whether the content exists.
    """

    action: Action
    bits: int
    not_found: Callable[[Call[Any]], RegistryError]
    hides_content: bool


def _read_rule(not_found: Callable[[Call[Any]], RegistryError]) -> _Rule:
    return _Rule(Action.PULL, Action.PULL.value, not_found, hides_content=True)


def _delete_rule(not_found: Callable[[Call[Any]], RegistryError]) -> _Rule:
    return _Rule(Action.DELETE, Action.DELETE.value, not_found, hides_content=False)


_RULES: Final[Mapping[str, _Rule]] = MappingProxyType(
    {
        "resolve_blob": _read_rule(_blob_not_found),
        "open_blob": _read_rule(_blob_not_found),
        "resolve_manifest": _read_rule(_manifest_not_found),
        "get_manifest": _read_rule(_manifest_not_found),
        "tags": _read_rule(_repository_not_found),
        "referrers": _read_rule(_repository_not_found),
        "delete_blob": _delete_rule(_blob_not_found),
        "delete_manifest": _delete_rule(_repository_not_found),
        "delete_tag": _delete_rule(_repository_not_found),
    }
)
"""The rules for reads and deletes, by the name of the method of `Registry`. `Guarded._handle_other` checks calls of all
other methods."""


def ignore_denial(principal: Principal, action: Action, name: str) -> None:
    """An `OnDenied` that does nothing."""


async def keep_principal(principal: Principal) -> Principal:
    """Returns `principal` unchanged. This is the default of the argument `renew` of `Guarded`."""
    return principal


class Guarded(ForwardingRegistry):
    """A registry that checks the rights of the current request's principal before it forwards a call to `inner`.

    - `naming`: returns the stored names to which the name `repo` of a call can lead. None: each name leads only to
      itself.
    - `resolve_name`: returns the stored name to which a name leads now. None: each name leads to its first candidate.
    - `on_denied`: a function that is called when the guard refuses an action to an account.
    - `renew`: returns the principal of the same client with the rights that the client has now. Raises Unauthorized if
      the credential was revoked.
    - `cursors`: encrypts the cursors of lists. None: they are encrypted with a random key of this process.
    """

    def __init__(
        self,
        inner: Registry,
        naming: NamingRules | None = None,
        resolve_name: ResolveName | None = None,
        on_denied: OnDenied = ignore_denial,
        renew: Callable[[Principal], Awaitable[Principal]] = keep_principal,
        cursors: SealedCursors | None = None,
    ) -> None:
        super().__init__(inner)
        self._naming = naming or NamingRules()
        self._is_mirroring = bool(self._naming.upstreams)
        self._resolve_name = resolve_name
        self._on_denied = on_denied
        self._renew = renew
        self._cursors = cursors or SealedCursors(process_secrets_reader())
        self._lists = VisitorLimits(LIST_LIMITS, "lists")

    async def handle(self, call: Call[T]) -> T:
        """Checks the rights for a call, forwards it to `inner`, and returns the result. If the rights do not suffice,
        raises Unauthorized, Denied, or the error for content that does not exist.

        An error of `inner` can name stored digests or tags. If the principal may not pull from the repository, raises
        the `redacted` form of such an error instead."""
        repo = call.repo
        try:
            rule = _RULES.get(call.operation)
            if rule is None:
                return await self._handle_other(call)
            if self._is_allowed_on_all(rule.bits, repo):
                return await self.forward(call)
            if call.operation == "resolve_blob":
                return await self._resolve_blob(rule, call)
            try:
                call.repo = await self._allowed_stored_name(rule, repo, rule.not_found(call))
            except NameUnknown:
                if call.operation == "referrers":  # the list of referrers of an unknown repository is empty
                    return cast(T, Page([]))
                raise
            return await self.forward(call)
        except RegistryError as error:
            if error.redacted is None or await self._is_readable(repo):
                raise
            raise error.redacted from None

    async def _handle_other(self, call: Call[T]) -> T:
        """Handles the calls without a rule in `_RULES`: pushes, mounts, and the list of repositories."""
        match call.operation:
            case "start_upload" | "resume_upload" | "upload_offset":
                # An upload session belongs to the account that starts it, so the store needs the account of this call.
                call.options["by"] = call.actor or Actor(current_principal().name)
            case "mount_blob":
                self.check_push(call.repo)
                digest, source = call.args
                call.args = digest, await self._allowed_mount_source(source, digest)
                return await self.forward(call)
            case "put_manifest":
                # The client may have sent the body slowly, so the rights may have changed since the request was
                # authenticated. `check_push` below uses the current rights.
                principal = current_principal()
                if (renewed := await self._renew(principal)) is not principal:
                    current_request().principal = renewed
            case "repositories":
                return cast(T, await self._list_repositories(*call.args))
            case _:
                raise Unsupported
        self.check_push(call.repo)
        return await self.forward(call)

    async def readable_name(self, repo: RepositoryName) -> RepositoryName:
        """Returns the stored name that `repo` leads to now. Raises Unauthorized or NameUnknown if the principal may not
        pull from this stored name."""
        rule = _RULES["tags"]
        if self._is_allowed_on_all(rule.bits, repo):
            return await self._stored_name(repo, self._naming.candidates(repo))
        return await self._allowed_stored_name(rule, repo, NameUnknown(f"there is no repository {repo}"))

    async def _is_readable(self, repo: RepositoryName) -> bool:
        """Returns whether the principal may pull from the stored name that `repo` leads to now. Records no denial."""
        principal, requested = current_principal(), current_request().requested_name or repo
        names = self._naming.candidates(repo)
        allowed = [name for name in names if principal.may(Action.PULL, name, requested)]
        return bool(allowed) and await self._stored_name(repo, names) in allowed

    def check_push(self, repo: RepositoryName) -> None:
        """Checks that the principal may push to `repo`. Raises Unauthorized or Denied if not."""
        principal = current_principal()
        if not principal.action_bits(repo, current_request().requested_name or repo) & _PUSH_BITS:
            raise self._refusal(principal, Action.PUSH, repo, (repo,))

    def _is_allowed_on_all(self, bits: int, repo: RepositoryName) -> bool:
        """Returns whether the action with these `bits` is allowed on every stored name that `repo` can lead to. Returns
        False if the request is not authenticated yet."""
        request = current_request()
        principal, requested = request.principal, request.requested_name or repo
        if type(principal) is not Principal:
            return False
        if not self._is_mirroring:
            return principal.action_bits(repo, requested) & bits != 0
        return all(principal.action_bits(name, requested) & bits for name in self._naming.candidates(repo))

    async def _allowed_stored_name(self, rule: _Rule, repo: RepositoryName, not_found: RegistryError) -> RepositoryName:
        """Returns the stored name that `repo` leads to now, if the rule's action is allowed on that name. The call must
        use the returned name, because a push to `repo` after this check could change where `repo` leads.

        If the action is not allowed on that name, raises one of these errors:

        - `not_found` if the action is allowed on the name `repo` itself. In this case, `repo` leads to mirrored
          content, because nothing was ever pushed to `repo`.
        - Otherwise Unauthorized or Denied. If the rule hides content, `not_found` in place of Denied.
        """
        principal, requested = current_principal(), current_request().requested_name or repo
        names: Sequence[RepositoryName] = self._naming.candidates(repo)
        allowed = [name for name in names if principal.may(rule.action, name, requested)]
        if allowed:
            stored_name = await self._stored_name(repo, names)
            if stored_name in allowed:
                return stored_name
            if repo in allowed:
                raise not_found
            names = (stored_name,)  # the refusal is about the name to which `repo` leads now
        raise self._refusal(principal, rule.action, repo, names, not_found if rule.hides_content else None)

    async def _stored_name(self, repo: RepositoryName, candidates: Sequence[RepositoryName]) -> RepositoryName:
        """Returns the name in `candidates` to which `repo` leads now."""
        if len(candidates) == 1 or self._resolve_name is None:
            return candidates[0]
        return await self._resolve_name(repo)

    def _refusal(
        self,
        principal: Principal,
        action: Action,
        repo: RepositoryName,
        names: Sequence[RepositoryName],
        not_found: RegistryError | None = None,
    ) -> RegistryError:
        """Returns the error for a refusal of `action` on `repo`, which leads to one of the stored `names`. Calls
        `on_denied` if the client is an account whose rights do not suffice. `not_found` is the error to return in place
        of Denied. None: returns Denied. The table in docs/adr/0011-who-may-do-what.md lists the errors."""
        requested, action_phrase = current_request().requested_name or repo, _ACTION_PHRASES[action]
        if any(principal.account_may(action, name) for name in names):
            return Unauthorized(f"this token has no right to {action_phrase} {requested}", reason=INSUFFICIENT_SCOPE)
        if principal.is_anonymous:
            # If `principal.is_registry_open` is true, the registry has no accounts yet, so nobody can log in.
            text = _grant_needed_text(names) if principal.is_registry_open else f"log in to {action_phrase} {requested}"
            return Unauthorized(text)
        self._on_denied(principal, action, requested)
        return not_found or Denied(f"{principal.name} may not {action_phrase} {requested}")

    async def _resolve_blob(self, rule: _Rule, call: Call[T]) -> T:
        """Resolves a blob. Forwards the call with the name `repo`, in contrast to other reads, for which `handle`
        replaces `repo` by the stored name.

        Before a push, a client asks whether `repo` has the blob. `inner` must answer this request without asking an
        upstream. The stored name of mirrored content begins with the name of an upstream, and nobody can push to such a
        name. With the stored name, `inner` would therefore take the request for a part of a pull.

        With the name `repo`, `inner` itself chooses between pushed and mirrored content. A push during the call could
        change this choice, so this method checks the rights before and after the call."""
        repo, not_found = call.repo, rule.not_found(call)
        await self._allowed_stored_name(rule, repo, not_found)
        result = await self.forward(call)
        await self._allowed_stored_name(rule, repo, not_found)
        return result

    async def _allowed_mount_source(self, source: RepositoryName | NameSet, digest: Digest) -> RepositoryName | NameSet:
        """Returns the stored name of `source`, the repository from which the client mounts the blob `digest`. If the
        client names no repository, `source` is the set of all names. This method then returns the set of names from
        which the principal may pull.

        Raises BlobUnknown if the principal may not pull from `source`. A bearer token must allow pulls from `source`;
        access to the repository that the request pushes to does not suffice.
        """
        principal = current_principal()
        if isinstance(source, NameSet):
            return _intersect(source, principal.names_allowing(Action.PULL))
        candidates = self._naming.candidates(source)
        allowed = [name for name in candidates if principal.may(Action.PULL, name, source)]
        stored_name = await self._stored_name(source, candidates) if allowed else candidates[0]
        if stored_name not in allowed:
            raise BlobUnknown(f"{source} has no blob {digest}")
        return stored_name

    async def _list_repositories(self, after: str | None, limit: int, names: NameSet) -> Page[RepositoryName]:
        """Returns a page of the repositories in `names` that the principal may pull.

        `after` is the cursor that the client sent: the position after which the page starts. None: returns the first
        page. Waits until `LIST_LIMITS` allow one more list for the visitor.

        Raises RequestInvalid for an unknown cursor. Raises TooManyRequests if too many lists run or wait. Raises
        Unauthorized if the client sent no credential, or if its bearer token does not allow the list of repositories.
        """
        principal = current_principal()
        if not principal.may_list:
            reason = INSUFFICIENT_SCOPE if principal.identity.access is not None else None
            raise Unauthorized("log in to list repositories", reason=reason)
        after = await self._cursors.read(CursorKind.REPOSITORIES, after)
        visitor = principal.visitor_key_at(current_request().address)
        async with self._lists.slot(visitor):
            page = await self.inner.repositories(after, limit, _intersect(names, principal.listable_names))
        # A cursor that is the last name on the page reveals nothing. Other cursors are sealed (encrypted).
        if page.next_after is None or page.next_after in page.items[-1:]:
            return page
        return Page(page.items, page.more, await self._cursors.seal(CursorKind.REPOSITORIES, page.next_after))


def _intersect(wanted: NameSet, allowed: NameSet) -> NameSet:
    """Returns the set of names that are in both sets. Raises Unsupported unless one of the sets contains every name."""
    if not wanted.has_every_name and not allowed.has_every_name:
        raise Unsupported
    return allowed if wanted.has_every_name else wanted


def _grant_needed_text(names: Sequence[RepositoryName]) -> str:
    """Returns the error text with which a registry without accounts refuses content. Such a registry refuses
    only content of upstreams that need a grant of their own (the setting `require_grant`). The last of the stored names
    `names` begins with the name of the upstream."""
    upstream = names[-1].partition("/")[0]
    return (
        f"content mirrored from {upstream} needs a grant of its own, and this registry has no accounts yet: "
        "add one, or set require_grant = false for that upstream"
    )
