"""`Router`: decides which registry serves a repository name: the one hosted here, or an upstream's mirror.

`registry.naming` says what a name may mean. Where it may be hosted here or belong to the default upstream:

- A name that was ever pushed is hosted here and never requested upstream: not per tag, not per digest, not after
  everything in it was deleted.
- Until then the mirror of the default upstream answers reads, and a push makes the name hosted.
- Pushes to a name that belongs to an upstream are refused.

A client that pushes first asks which blobs exist. For a name that was never pushed and that nothing was pulled by, the
answer is "none" without a request upstream: so pushes work while the upstream is down, and it learns no private names.
It does learn a private name that is pulled before its first push; `[hosted] prefixes` prevents that, too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import aclosing, suppress
from typing import Final, NamedTuple, TypeVar

from registry.naming import NamingRules
from registry.request import current_request
from storage.access import Action
from storage.content import Actor, Descriptor, Manifest
from storage.errors import (
    BlobUnknown,
    Denied,
    DigestInvalid,
    ManifestBlobUnknown,
    ManifestUnknown,
    NameUnknown,
    PartialLost,
    TooManyRequests,
    UpstreamUnavailable,
)
from storage.interface import Registry
from storage.names import Digest, RepositoryName
from storage.wrappers import Call, RefusingRegistry

T = TypeVar("T")
_MAX_USED_NAMES: Final = 65536
"""Names that were pushed to, cached in memory."""
_UNOBTAINABLE: Final = (
    *(BlobUnknown, ManifestUnknown, NameUnknown, ManifestBlobUnknown),
    *(Denied, DigestInvalid, PartialLost, TooManyRequests, UpstreamUnavailable),
)
"""The errors of content that is not here and cannot be fetched from its upstream now."""

UsedCheck = Callable[[RepositoryName], Awaitable[bool]]
"""Returns whether anything was ever put into a repository, by its stored name. Must never turn false again."""
ConfirmedCheck = Callable[[RepositoryName, Digest], Awaitable[bool]]
"""Returns whether the upstream itself has said that a mirrored repository has the blob."""


async def nothing_confirmed(repo: RepositoryName, digest: Digest) -> bool:
    """Returns False: no link is confirmed."""
    return False


class Destination(NamedTuple):
    """Where reads of a name go. `upstream`: the one whose mirror `registry` is; None: the name is hosted here."""

    registry: Registry
    repo: RepositoryName
    upstream: str | None = None


class Router(RefusingRegistry):
    """The registry `hosted` and the mirrors, by their upstreams' names, which share one store.

    `is_used`: whether a stored name was ever put to use. `private`: the upstreams of which the store may hold links
    that the upstream has not confirmed; `is_confirmed` tells for one link. Nothing is mounted by other links."""

    def __init__(
        self,
        hosted: Registry,
        mirrors: Mapping[str, Registry],
        is_used: UsedCheck,
        naming: NamingRules,
        *,
        private: Collection[str] = (),
        is_confirmed: ConfirmedCheck = nothing_confirmed,
    ) -> None:
        self.hosted = hosted
        self.mirrors = dict(mirrors)
        self.naming = naming
        self._store_is_used = is_used
        self._private = frozenset(private)
        self._is_confirmed = is_confirmed
        self._used: set[RepositoryName] = set()

    async def locate(self, repo: RepositoryName) -> Destination:
        """Returns where reads of a name go, and under which stored name. Raises NameUnknown for the bare name of an
        upstream."""
        upstream = self.naming.upstream_of(repo)
        if upstream is not None:
            return Destination(self.mirrors[upstream], self.naming.mirrored_name(repo, upstream), upstream)
        default = self.naming.default_name(repo)
        if default is None or await self._is_used(repo):
            return Destination(self.hosted, repo)
        return self._on_default(default)

    async def stored_name(self, repo: RepositoryName) -> RepositoryName:
        """Returns the stored name that reads of `repo` lead to; the bare name of an upstream as it is."""
        candidates = self.naming.candidates(repo)
        return candidates[0] if len(candidates) == 1 else (await self.locate(repo)).repo

    def is_always_hosted(self, repo: RepositoryName) -> bool:
        """Returns whether it is certain, without a look-up, that what is hosted here answers every read of the name,
        now and later."""
        if self.naming.upstream_of(repo) is not None:
            return False
        return self.naming.default_name(repo) is None or repo in self._used

    async def _is_used(self, repo: RepositoryName) -> bool:
        """Returns whether the name was ever pushed to or pulled by. Only "yes" is cached: a push through another worker
        counts from its commit on."""
        if repo in self._used:
            return True
        if not await self._store_is_used(repo):
            return False
        if len(self._used) >= _MAX_USED_NAMES:
            self._used.clear()
        self._used.add(repo)
        return True

    def _on_default(self, stored: RepositoryName) -> Destination:
        upstream = self.naming.default
        assert upstream is not None, "only a default upstream gives a default name"
        return Destination(self.mirrors[upstream], stored, upstream)

    async def handle(self, call: Call[T]) -> T:
        if call.action is Action.PUSH:
            return await self._push(call)
        if not call.repo:  # the list of repositories, mirrored ones under their stored names
            return await call.invoke_on(self.hosted)
        place = await self.locate(call.repo)
        if call.operation == "resolve_blob" and await self._is_unknown_blob(call.repo, place):
            raise BlobUnknown(detail={"digest": call.args[0]})
        call.repo = place.repo
        return await call.invoke_on(place.registry)

    async def _is_unknown_blob(self, repo: RepositoryName, place: Destination) -> bool:
        """Returns whether a question for a blob comes from a client that is about to push: one that pulls has fetched
        a manifest by that name before."""
        if place.upstream is None or self.naming.upstream_of(repo) is not None:
            return False
        return not await self._is_used(place.repo)

    async def _push(self, call: Call[T]) -> T:
        """Makes a call of a Writer: always on what is hosted here."""
        if (upstream := self.naming.upstream_of(call.repo)) is not None:
            raise Denied(
                f"{call.repo} is mirrored from {upstream} and takes no pushes; push under a name of your own, such as "
                "team/app"
            )
        match call.operation:
            case "mount_blob":
                return await self._mount_blob(call)
            case "put_manifest":
                return await self._put_manifest(call)
        return await call.invoke_on(self.hosted)

    async def _mount_blob(self, call: Call[T]) -> T:
        """Mounts from a hosted repository, or from what the store has of a mirrored one. A set of sources is one of
        stored names; private upstreams are left out of it, and have to be named."""
        digest, source = call.args
        if isinstance(source, RepositoryName):
            stored = (await self.locate(source)).repo
            await self._check_source(stored, digest)
            call.args = digest, stored
        elif self._private:
            call.args = digest, source.without_segments(self._private)
        return await call.invoke_on(self.hosted)

    async def _check_source(self, source: RepositoryName, digest: Digest) -> None:
        """Raises BlobUnknown for a link in a private upstream's repository that the upstream has not confirmed."""
        if source.partition("/")[0] in self._private and not await self._is_confirmed(source, digest):
            raise BlobUnknown(f"{source} has no blob {digest}")

    async def _put_manifest(self, call: Call[T]) -> T:
        """Stores a manifest. Until its first push, a mirror answered the reads of this name, so a client may believe
        that blobs are pushed which only that mirror has: they are copied first, or fetched from the upstream."""
        try:
            return await call.invoke_on(self.hosted)
        except ManifestBlobUnknown as missing:
            source = await self._former_source(call.repo)
            if source is None:
                raise
            try:
                await self._copy_parts(call.args[0], source, call.repo, call.options["by"])
            except _UNOBTAINABLE:
                raise missing from None
        return await call.invoke_on(self.hosted)

    async def _former_source(self, repo: RepositoryName) -> Destination | None:
        """Returns where reads of a name went before its first push; None: nowhere else, nothing was pulled there, or
        the principal may not pull there. For a name that is hosted by now, only content that is here."""
        default = self.naming.default_name(repo)
        if default is None or not current_request().may_pull(default) or not await self._is_used(default):
            return None
        place = self._on_default(default)
        return place._replace(registry=self.hosted) if await self._is_used(repo) else place

    async def _copy_parts(self, manifest: Manifest, source: Destination, repo: RepositoryName, by: Actor) -> None:
        """Copies everything that `manifest` refers to into `repo`. Raises `_UNOBTAINABLE`. Cancelled: what was copied
        stays, as pushed blobs do."""
        for digest in ({part.digest for part in manifest.blobs} - manifest.foreign) | manifest.blob_children:
            await self._copy_blob(digest, source, repo, by)
        for child in {part.digest for part in manifest.manifests} - manifest.blob_children:
            await self._copy_manifest(child, source, repo, by)

    async def _copy_blob(self, digest: Digest, source: Destination, repo: RepositoryName, by: Actor) -> None:
        with suppress(BlobUnknown):
            await self.hosted.resolve_blob(repo, digest)
            return
        with suppress(BlobUnknown):
            await self._mount(digest, source.repo, repo, by)
            return
        # A client that does not wait for the end of the download finds the blob here the next time.
        async with aclosing(await source.registry.open_blob(source.repo, digest)) as reader:
            start, stop = reader.span
            if start < stop:
                await reader.readable_until(stop - 1)
        await self._mount(digest, source.repo, repo, by)

    async def _mount(self, digest: Digest, source: RepositoryName, repo: RepositoryName, by: Actor) -> Descriptor:
        await self._check_source(source, digest)
        return await self.hosted.mount_blob(repo, digest, source, by)

    async def _copy_manifest(self, digest: Digest, source: Destination, repo: RepositoryName, by: Actor) -> None:
        with suppress(ManifestUnknown):
            await self.hosted.resolve_manifest(repo, digest)
            return
        child = await source.registry.get_manifest(source.repo, digest)
        await self._copy_parts(child, source, repo, by)
        await self.hosted.put_manifest(repo, child, by=by)
