"""`Router`: repository name → which registry. Who owns a name is decided here, and nowhere else.

- Under an upstream's name (`ghcr.io/org/app`): that upstream's mirror. Pushes are refused.
- With a default upstream, `library/*` is its mirror's as well; pushes are refused.
- A name that matches a pattern of `[hosted] prefixes`, or was ever pushed, is hosted here and never asked upstream: not
  per tag, not per digest, not after everything in it was deleted.
- Any other name without a host, with a default upstream: pushes make it hosted; until then the mirror of the default
  upstream answers. `ubuntu` means `library/ubuntu` on Docker Hub.
- All else is hosted, a name with the host of a registry that is not mirrored included.

What is mirrored has one stored name, however it is asked for: `docker.io/library/ubuntu`.

A client that pushes looks first which blobs are there. For a name that is nobody's yet and that nothing was pulled by,
the answer is "none" without asking anybody: so pushes work while the upstream does not, and tell it no private names.
What is pulled by a private name before its first push tells it; `[hosted] prefixes` keeps it from that, too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Final, NamedTuple, NoReturn

from registry.config import DOCKER_HUB, HUB_LIBRARY
from storage.content import Actor, Condition, Descriptor, Manifest, Page, Span
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
from storage.interface import BlobReader, BlobWriter, Registry
from storage.names import NAME_LENGTH, Digest, Reference, RepositoryName, Tag, UploadID
from storage.patterns import ALL_NAMES, NamePattern, NameSet
from storage.wrappers import RefusingRegistry

_MAX_USED_NAMES: Final = 65536
"""Names known to the store that are kept in memory, at the most."""
_UNOBTAINABLE: Final = (
    *(BlobUnknown, ManifestUnknown, NameUnknown, ManifestBlobUnknown),
    *(Denied, DigestInvalid, PartialLost, TooManyRequests, UpstreamUnavailable),
)
"""What says that something is neither here nor to be had from its upstream now."""


ReadableCheck = Callable[[RepositoryName], bool]


ConfirmedCheck = Callable[[RepositoryName, Digest], Awaitable[bool]]
"""Whether a repository has a blob by its upstream's own word."""


def everything_readable(repo: RepositoryName) -> bool:
    """Everything may be read."""
    return True


async def nothing_confirmed(repo: RepositoryName, digest: Digest) -> bool:
    """Nothing is confirmed."""
    return False


class Destination(NamedTuple):
    """Where reads of a name go. `upstream`: the mirror's it is; None: it is hosted here."""

    registry: Registry
    repo: RepositoryName
    upstream: str | None = None


class Router(RefusingRegistry):
    """`hosted` and the mirrors, by their upstreams' names. `default` is one of those, `prefixes` the patterns of names
    that are ours; `known` tells whether anything was ever put into a repository of the store that `hosted` is and the
    mirrors share, which must never become untrue. `readable` tells whether who acts may read a mirror's repository, by
    its stored name; what nobody asked to read is not brought over for them. `private` are the upstreams of which the
    store may hold links that the upstream has not confirmed; `confirmed` tells of one whether it has. Nothing is
    mounted by the others."""

    def __init__(
        self,
        hosted: Registry,
        mirrors: Mapping[str, Registry],
        known: Callable[[RepositoryName], Awaitable[bool]],
        *,
        default: str | None = None,
        prefixes: Sequence[str] = (),
        readable: ReadableCheck = everything_readable,
        private: Collection[str] = (),
        confirmed: ConfirmedCheck = nothing_confirmed,
    ) -> None:
        if default is not None and default not in mirrors:
            raise ValueError(f"the default upstream {default} is not mirrored")
        self.hosted = hosted
        self.mirrors = dict(mirrors)
        self.default = default
        self._known = known
        self._readable = readable
        self._private = frozenset(private)
        self._confirmed = confirmed
        self._patterns = [NamePattern(prefix) for prefix in prefixes]
        self._seen: set[RepositoryName] = set()

    # Who owns a name

    def upstream_of(self, repo: RepositoryName) -> str | None:
        """The upstream to which a name belongs whatever is pushed here; None: it can be hosted."""
        first, slash, _ = repo.partition("/")
        if first in self.mirrors:
            return first
        return self.default if first == HUB_LIBRARY and slash else None

    async def owns(self, repo: RepositoryName) -> bool:
        """Whether the name is hosted here for good, by pattern or because it was pushed once. Only "yes" is
        remembered: a push on another worker counts from its commit on."""
        if self.upstream_of(repo) is not None:
            return False
        return self._matches(repo) or await self._used(repo)

    def settled(self, repo: RepositoryName) -> bool:
        """Whether it is certain, without asking anybody, that reads of the name are answered by what is hosted here,
        and always will be."""
        if self.upstream_of(repo) is not None:
            return False
        return not self._open_to_default(repo) or self._matches(repo) or repo in self._seen

    async def _used(self, repo: RepositoryName) -> bool:
        if repo in self._seen:
            return True
        if not await self._known(repo):
            return False
        if len(self._seen) >= _MAX_USED_NAMES:
            self._seen.clear()
        self._seen.add(repo)
        return True

    def _matches(self, repo: RepositoryName) -> bool:
        return any(pattern.matches(repo) for pattern in self._patterns)

    async def locate(self, repo: RepositoryName) -> Destination:
        """Where reads of a name go, and under which name it is stored. Raises NameUnknown for the bare name of an
        upstream."""
        upstream = self.upstream_of(repo)
        if upstream is not None:
            return Destination(self.mirrors[upstream], self._stored(repo, upstream), upstream)
        if not self._open_to_default(repo) or await self.owns(repo):
            return Destination(self.hosted, repo)
        return self._on_default(repo)

    async def stored_name(self, repo: RepositoryName) -> RepositoryName:
        """The name that reads of `repo` lead to; the bare name of an upstream leads nowhere, and stays."""
        candidates = self.candidates(repo)
        return candidates[0] if len(candidates) == 1 else (await self.locate(repo)).repo

    def candidates(self, repo: RepositoryName) -> tuple[RepositoryName, ...]:
        """The stored names that reads of `repo` may lead to, without a look at what was pushed."""
        upstream = self.upstream_of(repo)
        if upstream is not None:
            return (repo if repo == upstream else self._stored(repo, upstream),)
        if not self._open_to_default(repo) or self._matches(repo):
            return (repo,)
        return repo, self._on_default(repo).repo

    def _open_to_default(self, repo: RepositoryName) -> bool:
        """Whether the default upstream may be asked for a name: not for one that has another registry's host, nor for
        one that would be too long below the upstream's."""
        first, slash, _ = repo.partition("/")
        if self.default is None or (slash and ("." in first or first == "localhost")):
            return False
        return len(repo) + len(self.default) + len(HUB_LIBRARY) + 2 <= NAME_LENGTH

    def _on_default(self, repo: RepositoryName) -> Destination:
        assert self.default is not None
        stored = self._stored(RepositoryName(f"{self.default}/{repo}"), self.default)
        return Destination(self.mirrors[self.default], stored, self.default)

    def _stored(self, repo: RepositoryName, upstream: str) -> RepositoryName:
        """The one name of mirrored content."""
        first, slash, rest = repo.partition("/")
        if first != upstream:
            rest = repo
        elif not slash:
            raise NameUnknown(f"{upstream} is mirrored here and is no repository itself; pull {upstream}/NAME")
        if upstream == DOCKER_HUB and "/" not in rest:
            rest = f"{HUB_LIBRARY}/{rest}"
        return RepositoryName(f"{upstream}/{rest}")

    def _check_push(self, repo: RepositoryName) -> None:
        """Raises Denied for a name that is mirrored whatever is pushed."""
        if (upstream := self.upstream_of(repo)) is not None:
            self._deny(repo, upstream)

    def _deny(self, repo: RepositoryName, upstream: str) -> NoReturn:
        raise Denied(
            f"{repo} is mirrored from {upstream} and takes no pushes; push under a name of your own, such as team/app"
        )

    # Reader and Lister: where the name leads

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        """Who pulls has had a manifest by that name first; who asks without that is about to push."""
        place = await self.locate(repo)
        if place.upstream is not None and self.upstream_of(repo) is None and not await self._used(place.repo):
            raise BlobUnknown(detail={"digest": digest})
        return await place.registry.resolve_blob(place.repo, digest)

    async def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None = None) -> BlobReader:
        place = await self.locate(repo)
        return await place.registry.open_blob(place.repo, digest, span)

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        place = await self.locate(repo)
        return await place.registry.resolve_manifest(place.repo, reference)

    async def get_manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        place = await self.locate(repo)
        return await place.registry.get_manifest(place.repo, reference)

    async def repositories(self, after: str | None, limit: int, within: NameSet = ALL_NAMES) -> Page[RepositoryName]:
        """All that the store holds, mirrored ones under their stored names."""
        return await self.hosted.repositories(after, limit, within)

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        place = await self.locate(repo)
        return await place.registry.tags(place.repo, after, limit)

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        place = await self.locate(repo)
        return await place.registry.referrers(place.repo, subject, artifact_type, after, limit)

    # Deleter: what a mirror has of it goes

    async def delete_blob(
        self, repo: RepositoryName, digest: Digest, *, by: Actor, even_if_referenced: bool = False
    ) -> None:
        place = await self.locate(repo)
        await place.registry.delete_blob(place.repo, digest, by=by, even_if_referenced=even_if_referenced)

    async def delete_manifest(self, repo: RepositoryName, digest: Digest, *, by: Actor) -> None:
        place = await self.locate(repo)
        await place.registry.delete_manifest(place.repo, digest, by=by)

    async def delete_tag(self, repo: RepositoryName, tag: Tag, *, by: Actor) -> None:
        place = await self.locate(repo)
        await place.registry.delete_tag(place.repo, tag, by=by)

    # Writer: always into what is hosted here

    async def start_upload(
        self, repo: RepositoryName, algorithm: str = "sha256", *, by: Actor | None = None
    ) -> BlobWriter:
        self._check_push(repo)
        return await self.hosted.start_upload(repo, algorithm, by=by)

    async def resume_upload(
        self, repo: RepositoryName, upload: UploadID, offset: int | None = None, *, by: Actor | None = None
    ) -> BlobWriter:
        self._check_push(repo)
        return await self.hosted.resume_upload(repo, upload, offset, by=by)

    async def upload_offset(self, repo: RepositoryName, upload: UploadID, *, by: Actor | None = None) -> int:
        self._check_push(repo)
        return await self.hosted.upload_offset(repo, upload, by=by)

    async def mount_blob(
        self, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor
    ) -> Descriptor:
        """The source may be mirrored; what of it is here can be mounted. A set is one of stored names; in those of
        private upstreams nothing is looked for unless the source is named."""
        self._check_push(repo)
        if isinstance(source, RepositoryName):
            return await self._mount_from((await self.locate(source)).repo, repo, digest, by)
        if self._private:
            source = source.without(self._private)
        return await self.hosted.mount_blob(repo, digest, source, by)

    async def _mount_from(self, source: RepositoryName, repo: RepositoryName, digest: Digest, by: Actor) -> Descriptor:
        """`source` is a stored name. Raises BlobUnknown."""
        if source.partition("/")[0] in self._private and not await self._confirmed(source, digest):
            raise BlobUnknown(f"{source} has no blob {digest}")
        return await self.hosted.mount_blob(repo, digest, source, by)

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
        """As its reads were answered by a mirror until now, a client may take for pushed what only that mirror has: it
        is brought over first. While the name is nobody's, that may mean to fetch it."""
        self._check_push(repo)
        try:
            return await self.hosted.put_manifest(repo, manifest, tags, by=by, sparse=sparse, condition=condition)
        except ManifestBlobUnknown as missing:
            source = await self._former(repo)
            if source is None:
                raise
            try:
                await self._bring(manifest, source, repo, by)
            except _UNOBTAINABLE:
                raise missing from None
        return await self.hosted.put_manifest(repo, manifest, tags, by=by, sparse=sparse, condition=condition)

    async def _former(self, repo: RepositoryName) -> Destination | None:
        """Where reads of a name that can be hosted may have led before its first push, if something was pulled there
        and may be read; of one that is ours by now, only what is here."""
        if not self._open_to_default(repo) or self._matches(repo):
            return None
        place = self._on_default(repo)
        if not self._readable(place.repo) or not await self._used(place.repo):
            return None
        return place._replace(registry=self.hosted) if await self.owns(repo) else place

    async def _bring(self, manifest: Manifest, source: Destination, repo: RepositoryName, by: Actor) -> None:
        """Has in `repo` what `manifest` refers to. Raises `_UNOBTAINABLE`. Cancelled: what was brought stays, as pushed
        blobs do."""
        for digest in ({part.digest for part in manifest.blobs} - manifest.foreign) | manifest.blob_children:
            await self._bring_blob(digest, source, repo, by)
        for child in {part.digest for part in manifest.manifests} - manifest.blob_children:
            await self._bring_manifest(child, source, repo, by)

    async def _bring_blob(self, digest: Digest, source: Destination, repo: RepositoryName, by: Actor) -> None:
        with suppress(BlobUnknown):
            await self.hosted.resolve_blob(repo, digest)
            return
        with suppress(BlobUnknown):
            await self._mount_from(source.repo, repo, digest, by)
            return
        # A client that does not wait until all of it is here finds it there the next time.
        async with aclosing(await source.registry.open_blob(source.repo, digest)) as reader:
            start, stop = reader.span
            if start < stop:
                await reader.ready(stop - 1)
        await self._mount_from(source.repo, repo, digest, by)

    async def _bring_manifest(self, digest: Digest, source: Destination, repo: RepositoryName, by: Actor) -> None:
        with suppress(ManifestUnknown):
            await self.hosted.resolve_manifest(repo, digest)
            return
        child = await source.registry.get_manifest(source.repo, digest)
        await self._bring(child, source, repo, by)
        await self.hosted.put_manifest(repo, child, by=by)
