"""`Router`: passes each call to the registry that the repository name belongs to.

Behind the router are the *hosted registry*, which has the content that clients push, and one *mirror* for each upstream
registry in the settings. A mirror is a pull-through cache. The hosted registry and the mirrors share one store. The
*stored name* of a repository is its name in the store. The stored name of a mirrored repository begins with the
upstream's name, as in `docker.io/library/ubuntu`.

A name such as `ghcr.io/org/app` belongs to the upstream `ghcr.io`. Clients can pull from such names, but not push to
them. A name without a host, such as `team/app`, can mean a hosted repository, or a repository of the *default upstream*
in the settings (`registry.naming`). The first push to the name decides:

- Before the first push, the mirror of the default upstream answers reads of the name.
- After the first push, the name is hosted. It stays hosted for all tags and digests, even after all its content was
  deleted. The router never asks the upstream for the name again.

Before a client pushes, it asks with HEAD which blobs the repository has. If nothing was ever pushed to or pulled from
the name, the router answers this HEAD with 404 and does not ask the default upstream. So a push works while the
upstream is down, and does not tell the upstream the name. But a pull before the first push sends the name to the
upstream. To keep names private, an operator lists their prefixes in `[hosted] prefixes`: these names are always hosted.
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
    PartialBlobLost,
    QuotaExceeded,
    TooManyRequests,
    Unsupported,
    UpstreamUnavailable,
)
from storage.interface import Registry
from storage.names import Digest, RepositoryName
from storage.wrappers import Call, RefusingRegistry

T = TypeVar("T")
_MAX_CACHED_NAMES: Final = 65536
"""Largest number of names in the router's cache of used names. The cache is cleared when it is full."""
MAX_NESTED_INDEXES: Final = 10
"""Largest number of levels of manifests below a pushed index. The router copies manifests only down to this level."""
_UNOBTAINABLE: Final = (
    *(BlobUnknown, ManifestUnknown, NameUnknown, ManifestBlobUnknown),
    *(Denied, DigestInvalid, PartialBlobLost, TooManyRequests, UpstreamUnavailable),
)
"""Errors which mean that content is not in the store, and cannot be fetched from the upstream now."""

IsUsed = Callable[[RepositoryName], Awaitable[bool]]
"""Returns whether the store has, or ever had, content of the repository with this stored name. After it has returned
True for a name, it never returns False for that name."""
IsConfirmed = Callable[[RepositoryName, Digest], Awaitable[bool]]
"""Returns whether the upstream has confirmed that the repository with this stored name has this blob."""


async def never_confirmed(repo: RepositoryName, digest: Digest) -> bool:
    """The default `IsConfirmed`: returns False. A router without private upstreams does not call it."""
    return False


class Destination(NamedTuple):
    """The registry that answers reads of a repository name, and the repository's stored name. `upstream`: if `registry`
    is a mirror, the name of its upstream; if `registry` is the hosted registry, None."""

    registry: Registry
    repo: RepositoryName
    upstream: str | None = None


class Router(RefusingRegistry):
    """Passes each call to the hosted registry or to a mirror, under the repository's stored name. The base class
    `RefusingRegistry` makes a `Call` object of each call of a method of `Registry`, and passes it to `handle`. The
    base class's own `handle` refuses every call. This class overrides `handle`.

    - `hosted`: the registry of pushed content.
    - `mirrors`: the mirror of each upstream, by the upstream's name.
    - `is_used`: returns whether the store ever had content of a repository.
    - `naming`: tells which upstream a name belongs to.
    - `private`: the names of the private upstreams. Such an upstream may have repositories that only some clients are
      allowed to read.
    - `is_confirmed`: returns whether a private upstream has confirmed that a repository of this upstream has a blob.
      From a repository of a private upstream, clients can mount only confirmed blobs, even if the store lists more
      blobs in the repository."""

    def __init__(
        self,
        hosted: Registry,
        mirrors: Mapping[str, Registry],
        is_used: IsUsed,
        naming: NamingRules,
        *,
        private: Collection[str] = (),
        is_confirmed: IsConfirmed = never_confirmed,
    ) -> None:
        self.hosted = hosted
        self.mirrors = dict(mirrors)
        self.naming = naming
        self._is_used_in_store = is_used
        self._private_upstreams = frozenset(private)
        self._is_confirmed = is_confirmed
        self._used_names: set[RepositoryName] = set()  # names for which `is_used` has returned True

    async def locate(self, repo: RepositoryName) -> Destination:
        """Returns the registry that answers reads of `repo` now, with the stored name. Raises NameUnknown if `repo` is
        only the name of an upstream, such as `ghcr.io`. Raises NameInvalid if the stored name would be too long."""
        upstream = self.naming.upstream_of(repo)
        if upstream is not None:
            return Destination(self.mirrors[upstream], self.naming.mirrored_name(repo, upstream), upstream)
        # None: `repo` cannot mean a repository of the default upstream.
        name_at_default = self.naming.name_at_default_upstream(repo)
        if name_at_default is None or await self._is_used(repo):
            return Destination(self.hosted, repo)
        return self._default_destination(name_at_default)

    async def stored_name(self, repo: RepositoryName) -> RepositoryName:
        """Returns the stored name of the repository that clients read now under the name `repo`. If `repo` is only the
        name of an upstream, returns `repo`."""
        candidates = self.naming.candidates(repo)  # the stored names that `repo` can mean: one or two
        return candidates[0] if len(candidates) == 1 else (await self.locate(repo)).repo

    async def require_hosted(self, repo: RepositoryName) -> RepositoryName:
        """Checks that `repo` is hosted, and returns its stored name. The repository need not exist. Use this before an
        operation that is impossible on mirrored repositories, such as a change of a tag. Raises Unsupported if `repo`
        belongs to an upstream. Raises NameUnknown if the mirror of the default upstream answers reads of `repo`."""
        if (upstream := self.naming.upstream_of(repo)) is not None:
            raise Unsupported(f"{repo} is mirrored from {upstream}, and its tags follow that registry")
        destination = await self.locate(repo)
        if destination.upstream is not None:
            raise NameUnknown(f"nothing was ever pushed to {repo}")
        return destination.repo

    async def require_mirrored(self, repo: RepositoryName, *, consequence: str = "") -> Destination:
        """Checks that a mirror answers reads of `repo`. Returns the mirror, the stored name and the upstream's name.
        Raises NameUnknown if `repo` is hosted, and the errors of `locate`. `consequence`: the end of the error text for
        a hosted repository, such as ", so there is nothing to freeze"."""
        mirrored = await self.locate(repo)
        if mirrored.upstream is None:
            raise NameUnknown(f"{repo} is hosted here and has no upstream{consequence}")
        return mirrored

    def is_always_hosted(self, repo: RepositoryName) -> bool:
        """Returns True if the hosted registry certainly answers all reads of `repo`, now and later. Does not read the
        store. False: `repo` is mirrored, or only the store shows whether `repo` is hosted."""
        if self.naming.upstream_of(repo) is not None:
            return False
        return self.naming.name_at_default_upstream(repo) is None or repo in self._used_names

    async def _is_used(self, repo: RepositoryName) -> bool:
        """Returns whether the store ever had content of the repository with the stored name `repo`: clients have pushed
        to it, or pulled from it. Does not cache False, because any worker can store the first content at any time."""
        if repo in self._used_names:
            return True
        if not await self._is_used_in_store(repo):
            return False
        if len(self._used_names) >= _MAX_CACHED_NAMES:
            self._used_names.clear()
        self._used_names.add(repo)
        return True

    def _default_destination(self, stored: RepositoryName) -> Destination:
        """Returns the destination in the mirror of the default upstream. `stored`: the repository's stored name."""
        upstream = self.naming.default
        assert upstream is not None, "without a default upstream, no name leads to its mirror"
        return Destination(self.mirrors[upstream], stored, upstream)

    async def handle(self, call: Call[T]) -> T:
        """Makes `call` on the registry that its repository name belongs to, and returns its result. Raises Denied for a
        push to a name of an upstream, and the errors of `locate` and of the call."""
        if call.action is Action.PUSH:
            return await self._push(call)
        if not call.repo:
            # The call lists all repositories. The hosted registry lists everything in the shared store, including
            # mirrored repositories.
            return await call.invoke_on(self.hosted)
        destination = await self.locate(call.repo)
        if call.operation == "resolve_blob" and await self._is_check_before_push(call.repo, destination):
            raise BlobUnknown(detail={"digest": call.args[0]})
        call.repo = destination.repo
        return await call.invoke_on(destination.registry)

    async def _is_check_before_push(self, repo: RepositoryName, destination: Destination) -> bool:
        """Returns whether a client that asks for a blob's descriptor is probably about to push to `repo`.
        `destination`: the result of `locate` for `repo`. Returns True if both conditions hold:

        - The mirror of the default upstream answers reads of `repo`, because nothing was ever pushed to `repo`.
        - Nothing was ever pulled from the repository `destination.repo` of this mirror. A client that pulls requests a
          manifest before the blobs, and the mirror stores the manifest. So this client does not pull."""
        if destination.upstream is None or self.naming.upstream_of(repo) is not None:
            return False
        return not await self._is_used(destination.repo)

    async def _push(self, call: Call[T]) -> T:
        """Makes `call`, which writes content, on the hosted registry. Raises Denied for a name of an upstream."""
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
        """Adds to the call's repository a blob that the store already has in a source repository, hosted or mirrored.
        Never asks an upstream. Raises BlobUnknown if the source does not have the blob.

        The call has either the name of the source, or a set of stored names from which the hosted registry chooses the
        source. From a repository of a private upstream, a client can mount only by name, so this method removes these
        repositories from the set."""
        digest, source = call.args
        if isinstance(source, RepositoryName):
            stored = (await self.locate(source)).repo
            await self._check_confirmed(stored, digest)
            call.args = digest, stored
        elif self._private_upstreams:
            # The stored names of an upstream's repositories begin with the upstream's name and a slash.
            call.args = digest, source.without_names_below(self._private_upstreams)
        return await call.invoke_on(self.hosted)

    async def _check_confirmed(self, source: RepositoryName, digest: Digest) -> None:
        """Raises BlobUnknown if `source`, a stored name, belongs to a private upstream, and the upstream has not
        confirmed that `source` has the blob."""
        if source.partition("/")[0] in self._private_upstreams and not await self._is_confirmed(source, digest):
            raise BlobUnknown(f"{source} has no blob {digest}")

    async def _put_manifest(self, call: Call[T]) -> T:
        """Stores a manifest in the hosted registry.

        Before the first push to a name, clients read the name from the mirror of the default upstream. A client that
        finds a blob or a child manifest there does not push it. So if the hosted repository lacks content that the
        manifest refers to, this method first copies the content from the mirror. Raises ManifestBlobUnknown if the
        content cannot be copied, or if indexes are nested too deep (`MAX_NESTED_INDEXES`)."""
        try:
            return await call.invoke_on(self.hosted)
        except ManifestBlobUnknown as missing:
            source = await self._mirrored_source(call.repo)
            if source is None:
                raise
            try:
                await self._copy_content(call.args[0], source, call.repo, call.options["by"])
            except QuotaExceeded:  # a subclass of Denied, which is in `_UNOBTAINABLE`
                raise
            except _UNOBTAINABLE:
                raise missing from None
        return await call.invoke_on(self.hosted)

    async def _mirrored_source(self, repo: RepositoryName) -> Destination | None:
        """Returns the mirrored repository of the default upstream that clients read under the name `repo` until
        something is pushed to `repo`. Also returns the registry from which to read this mirrored repository:

        - If nothing was ever pushed to `repo`, the registry is the mirror.
        - If something was pushed to `repo`, the registry is the hosted registry. The hosted registry reads the mirrored
          repository from the shared store, and never asks the upstream.

        Returns None if `repo` cannot mean a repository of the default upstream, if nothing was ever pulled from the
        mirrored repository, or if the client is not allowed to pull from the mirrored repository."""
        name_at_default = self.naming.name_at_default_upstream(repo)
        if name_at_default is None or not current_request().may_pull(name_at_default):
            return None
        if not await self._is_used(name_at_default):
            return None
        if await self._is_used(repo):
            return Destination(self.hosted, name_at_default)
        return self._default_destination(name_at_default)

    async def _copy_content(
        self, manifest: Manifest, source: Destination, repo: RepositoryName, by: Actor, depth: int = 0
    ) -> None:
        """Copies all blobs and child manifests of `manifest` from `source` into the hosted repository `repo`. Omits
        foreign layers, which clients download elsewhere. `by`: the client that pushes, for the audit log. `depth`: the
        number of levels between the pushed manifest and `manifest`. Raises one of `_UNOBTAINABLE` if content cannot be
        copied. After an error or a cancellation, the content that was already copied stays in `repo`."""
        # `blob_children` are entries of an index that are blobs, as in BuildKit's cache indexes.
        for digest in ({blob.digest for blob in manifest.blobs} - manifest.foreign) | manifest.blob_children:
            await self._copy_blob(digest, source, repo, by)
        for child in {entry.digest for entry in manifest.manifests} - manifest.blob_children:
            await self._copy_manifest(child, source, repo, by, depth + 1)

    async def _copy_blob(self, digest: Digest, source: Destination, repo: RepositoryName, by: Actor) -> None:
        """Adds a blob of `source` to `repo`, unless `repo` has the blob already. If the store lacks the blob, first
        fetches the blob from the upstream."""
        with suppress(BlobUnknown):
            await self.hosted.resolve_blob(repo, digest)
            return
        with suppress(BlobUnknown):
            await self._mount_mirrored_blob(digest, source.repo, repo, by)
            return
        # Opening the blob at the mirror starts the download, which continues even if the client disconnects. Then this
        # method waits for the last byte.
        async with aclosing(await source.registry.open_blob(source.repo, digest)) as reader:
            start, stop = reader.span
            if start < stop:
                await reader.readable_until(stop - 1)
        with suppress(BlobUnknown):
            await self._mount_mirrored_blob(digest, source.repo, repo, by)
            return
        # The download may have been started for another repository. Then the store has the blob now, but `source` may
        # not have it. When the mirror opens a stored blob for `source`, the mirror adds the blob to `source`. So this
        # method opens the blob again.
        async with aclosing(await source.registry.open_blob(source.repo, digest)):
            await self._mount_mirrored_blob(digest, source.repo, repo, by)

    async def _mount_mirrored_blob(
        self, digest: Digest, source: RepositoryName, repo: RepositoryName, by: Actor
    ) -> Descriptor:
        """Adds a stored blob of `source` to `repo`. Raises BlobUnknown if `source` does not have the blob, or if a
        private upstream has not confirmed the blob."""
        await self._check_confirmed(source, digest)
        return await self.hosted.mount_blob(repo, digest, source, by)

    async def _copy_manifest(
        self, digest: Digest, source: Destination, repo: RepositoryName, by: Actor, depth: int
    ) -> None:
        """Copies a child manifest and everything that it refers to, unless `repo` has the manifest already. Raises
        ManifestBlobUnknown if the child is more than `MAX_NESTED_INDEXES` levels below the pushed manifest."""
        with suppress(ManifestUnknown):
            await self.hosted.resolve_manifest(repo, digest)
            return
        if depth > MAX_NESTED_INDEXES:
            raise ManifestBlobUnknown
        child = await source.registry.get_manifest(source.repo, digest)
        await self._copy_content(child, source, repo, by, depth)
        await self.hosted.put_manifest(repo, child, by=by)
