"""`Guarded`: asks what the principal may do before each call on the registry behind it.

A refusal depends on who asks for what, never on what is there, and nothing is looked up before it. Reads are checked
against the name under which content is stored, writes against the name that is written to. Methods this class does not
know are refused.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

from registry.auth.rights.principal import PRINCIPAL, REQUESTED_NAME, Principal
from registry.auth.rights.sealed_cursors import CursorKind, SealedCursors, process_secrets
from storage.access import Action
from storage.content import Actor, Condition, Descriptor, Manifest, Page, Span
from storage.errors import BlobUnknown, Denied, ManifestUnknown, NameUnknown, RegistryError, Unauthorized
from storage.interface import BlobReader, BlobWriter, Registry
from storage.keyed_locks import KeyedLocks
from storage.names import Digest, Reference, RepositoryName, Tag, UploadID
from storage.patterns import ALL_NAMES, NameSet
from storage.wrappers import RefusingRegistry

INSUFFICIENT_SCOPE: Final = "insufficient_scope"
_PULL: Final = Action.PULL.value
_PUSH: Final = Action.PUSH.value
_DELETE: Final = Action.DELETE.value
_ACTION_PHRASES: Final = {Action.PULL: "pull from", Action.PUSH: "push to", Action.DELETE: "delete from"}


class RepositoryResolver(Protocol):
    """Where names lead, where some are mirrored (`registry.router`)."""

    def candidates(self, repo: RepositoryName) -> Sequence[RepositoryName]:
        """The stored names that `repo` may stand for, without a look at what there is."""
        ...

    async def stored_name(self, repo: RepositoryName) -> RepositoryName:
        """The one of them that it stands for now. It may change once, to `repo` itself."""
        ...


OnDenied = Callable[[Principal, Action, str], None]


def ignore_denial(principal: Principal, action: Action, name: str) -> None:
    """Nobody is told of a denial."""


async def keep_principal(principal: Principal) -> Principal:
    """It is what it was."""
    return principal


class Guarded(RefusingRegistry):
    """`inner`, for the principal in `PRINCIPAL`. `places`: None: nothing is mirrored, and every name is a stored one.
    `denied` is told what was refused to an account, and by which name it asked. `renew` gives what a principal is by
    now, or raises Unauthorized."""

    def __init__(
        self,
        inner: Registry,
        places: RepositoryResolver | None = None,
        denied: OnDenied = ignore_denial,
        renew: Callable[[Principal], Awaitable[Principal]] = keep_principal,
        positions: SealedCursors | None = None,
    ) -> None:
        """`cursors` seals places in lists; None: with a key of this process."""
        self.inner = inner
        self._positions = positions or SealedCursors(process_secrets())
        self._lists: KeyedLocks[str] = KeyedLocks()
        self._renew = renew
        self._places = places
        self._denied = denied

    # What may be done

    def check_push(self, repo: RepositoryName) -> None:
        """Raises what a push to `repo` is refused with: Unauthorized, Denied."""
        principal = PRINCIPAL.get()
        if not principal.actions(repo, REQUESTED_NAME.get() or repo) & _PUSH:
            raise self._refusal(principal, Action.PUSH, repo, (repo,))

    def _allows(self, action: int, repo: RepositoryName) -> bool:
        """Whether `action` is allowed wherever the name may lead."""
        principal, asked = PRINCIPAL.get(), REQUESTED_NAME.get() or repo
        if self._places is None:
            return principal.actions(repo, asked) & action != 0
        return all(principal.actions(name, asked) & action for name in self._places.candidates(repo))

    async def _settle(
        self, action: Action, repo: RepositoryName, missing: RegistryError, *, hidden: bool = True
    ) -> RepositoryName:
        """The stored name that `repo` leads to, where `action` is allowed on some of those it may lead to, and on that
        one. It is what the call goes on with: between here and there, somebody may push to `repo`.

        Raises `missing` in place of Denied where `hidden`; and for a name that is nobody's yet, so that a mirror would
        answer, to whom the name itself would be open: nothing of theirs is there. Raises Unauthorized, Denied."""
        principal, asked = PRINCIPAL.get(), REQUESTED_NAME.get() or repo
        names: Sequence[RepositoryName] = (repo,)
        if self._places is not None:
            names = self._places.candidates(repo)
            allowed = [name for name in names if principal.may(action, name, asked)]
            if allowed:
                stored = await self._places.stored_name(repo)
                if stored in allowed:
                    return stored
                if repo in allowed:
                    raise missing
                names = (stored,)
        raise self._refusal(principal, action, repo, names, missing if hidden else None)

    def _refusal(
        self,
        principal: Principal,
        action: Action,
        repo: RepositoryName,
        names: Sequence[RepositoryName],
        missing: RegistryError | None = None,
    ) -> RegistryError:
        """What `action` on `repo` is refused with, which leads to one of the stored `names`: the table in
        docs/adr/0011-who-may-do-what.md. `missing`: as if it were not there."""
        asked, doing = REQUESTED_NAME.get() or repo, _ACTION_PHRASES[action]
        if any(principal.entitled(action, name) for name in names):
            return Unauthorized(f"the token shown is not for this: to {doing} {asked}", reason=INSUFFICIENT_SCOPE)
        if principal.nobody:
            return Unauthorized(_grant_needed(names) if principal.open else f"log in to {doing} {asked}")
        self._denied(principal, action, asked)
        return missing or Denied(f"{principal.name} may not {doing} {asked}")

    # Reader

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        if self._allows(_PULL, repo):
            return await self.inner.resolve_blob(repo, digest)
        missing = no_blob(repo, digest)
        await self._settle(Action.PULL, repo, missing)
        # By the name as it was asked: of one that is nobody's yet the router asks no upstream.
        found = await self.inner.resolve_blob(repo, digest)
        await self._settle(Action.PULL, repo, missing)  # pushed to meanwhile, it may have led elsewhere
        return found

    async def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None = None) -> BlobReader:
        if not self._allows(_PULL, repo):
            repo = await self._settle(Action.PULL, repo, no_blob(repo, digest))
        return await self.inner.open_blob(repo, digest, span)

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        if not self._allows(_PULL, repo):
            repo = await self._settle(Action.PULL, repo, no_manifest(repo, reference))
        return await self.inner.resolve_manifest(repo, reference)

    async def get_manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        if not self._allows(_PULL, repo):
            repo = await self._settle(Action.PULL, repo, no_manifest(repo, reference))
        return await self.inner.get_manifest(repo, reference)

    # Writer

    async def start_upload(
        self, repo: RepositoryName, algorithm: str = "sha256", *, by: Actor | None = None
    ) -> BlobWriter:
        self.check_push(repo)
        return await self.inner.start_upload(repo, algorithm, by=by or _acting())

    async def resume_upload(
        self, repo: RepositoryName, upload: UploadID, offset: int | None = None, *, by: Actor | None = None
    ) -> BlobWriter:
        self.check_push(repo)
        return await self.inner.resume_upload(repo, upload, offset, by=by or _acting())

    async def upload_offset(self, repo: RepositoryName, upload: UploadID, *, by: Actor | None = None) -> int:
        self.check_push(repo)
        return await self.inner.upload_offset(repo, upload, by=by or _acting())

    async def mount_blob(
        self, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor
    ) -> Descriptor:
        """A source that may not be read has nothing to mount: BlobUnknown."""
        self.check_push(repo)
        if isinstance(source, NameSet):
            return await self.inner.mount_blob(repo, digest, self._within(source, self._sources()), by)
        return await self.inner.mount_blob(repo, digest, await self._source(source, digest), by)

    def _sources(self) -> NameSet:
        return PRINCIPAL.get().names(Action.PULL)

    async def _source(self, source: RepositoryName, digest: Digest) -> RepositoryName:
        """The stored name of a mount's source. Raises BlobUnknown. A token names it by itself, whatever the request's
        own repository was asked for by."""
        principal = PRINCIPAL.get()
        candidates = (source,) if self._places is None else self._places.candidates(source)
        allowed = [name for name in candidates if principal.may(Action.PULL, name, source)]
        stored = candidates[0]
        if allowed and self._places is not None and len(candidates) > 1:
            stored = await self._places.stored_name(source)
        if stored not in allowed:
            raise no_blob(source, digest)
        return stored

    async def put_manifest(
        self,
        repo: RepositoryName,
        manifest: Manifest,
        tags: Sequence[Tag] = (),
        *,
        by: Actor,
        sparse: bool = False,
        condition: Condition | None = None,
    ) -> Descriptor:
        """By the rights of now: since the request began, its body may have taken as long as the client liked."""
        PRINCIPAL.set(await self._renew(PRINCIPAL.get()))
        self.check_push(repo)
        return await self.inner.put_manifest(repo, manifest, tags, by=by, sparse=sparse, condition=condition)

    # Deleter

    async def delete_blob(
        self, repo: RepositoryName, digest: Digest, *, by: Actor, even_if_referenced: bool = False
    ) -> None:
        if not self._allows(_DELETE, repo):
            missing = no_blob(repo, digest)
            repo = await self._settle(Action.DELETE, repo, missing, hidden=False)
        await self.inner.delete_blob(repo, digest, by=by, even_if_referenced=even_if_referenced)

    async def delete_manifest(self, repo: RepositoryName, digest: Digest, *, by: Actor) -> None:
        if not self._allows(_DELETE, repo):
            repo = await self._settle(Action.DELETE, repo, no_repository(repo), hidden=False)
        await self.inner.delete_manifest(repo, digest, by=by)

    async def delete_tag(self, repo: RepositoryName, tag: Tag, *, by: Actor) -> None:
        if not self._allows(_DELETE, repo):
            repo = await self._settle(Action.DELETE, repo, no_repository(repo), hidden=False)
        await self.inner.delete_tag(repo, tag, by=by)

    # Lister

    async def repositories(self, after: str | None, limit: int, within: NameSet = ALL_NAMES) -> Page[RepositoryName]:
        """Those that may be pulled. Raises Unauthorized for who has shown nothing, and for a token without the catalog:
        a client that can log in only does so when it is told to; RequestInvalid for a place that nobody gave. Those who
        act under one name have their lists one after the other, so that none of them keeps the others' waiting."""
        principal = PRINCIPAL.get()
        if not principal.may_list:
            reason = INSUFFICIENT_SCOPE if principal.identity.access is not None else None
            raise Unauthorized("log in to list repositories", reason=reason)
        after = await self._positions.read(CursorKind.REPOSITORIES, after)
        async with self._lists.hold(principal.name):
            page = await self.inner.repositories(after, limit, self._within(within, principal.listed))
        if page.place is None or page.place in page.items[-1:]:
            return page
        return Page(page.items, page.more, await self._positions.seal(CursorKind.REPOSITORIES, page.place))

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        if not self._allows(_PULL, repo):
            repo = await self._settle(Action.PULL, repo, no_repository(repo))
        return await self.inner.tags(repo, after, limit)

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        if not self._allows(_PULL, repo):
            try:
                repo = await self._settle(Action.PULL, repo, no_repository(repo))
            except NameUnknown:
                return Page([])
        return await self.inner.referrers(repo, subject, artifact_type, after, limit)

    def _within(self, wanted: NameSet, allowed: NameSet) -> NameSet:
        """Both at once, where one of them is everything; other sets nobody asks for."""
        if not wanted.everything and not allowed.everything:
            self.refuse()
        return allowed if wanted.everything else wanted


# What is not there, as the store says it.


def no_blob(repo: RepositoryName, digest: Digest) -> BlobUnknown:
    return BlobUnknown(f"{repo} has no blob {digest}")


def no_manifest(repo: RepositoryName, reference: Reference) -> ManifestUnknown:
    return ManifestUnknown(f"{repo} has no manifest {reference}")


def no_repository(repo: RepositoryName) -> NameUnknown:
    return NameUnknown(f"there is no repository {repo}")


def may_pull(repo: RepositoryName) -> bool:
    """Whether who acts may pull from a repository, by its stored name."""
    return PRINCIPAL.get().may(Action.PULL, repo, REQUESTED_NAME.get() or repo)


def _acting() -> Actor:
    """Who is behind a call that does not say so."""
    return Actor(PRINCIPAL.get().name)


def _grant_needed(names: Sequence[RepositoryName]) -> str:
    upstream = names[-1].partition("/")[0]
    return (
        f"what is mirrored from {upstream} takes a grant of its own, and there are no accounts here yet: "
        "add one, or set require_grant = false for that upstream"
    )
