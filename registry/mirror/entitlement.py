"""Decides which repositories of an upstream registry may serve a cached blob (`BlobEntitlement`).

A blob is stored once, even if several repositories of the upstream contain it. A client must not get a blob through a
repository just because the client knows the digest. The rule depends on the upstream:

- An upstream is *public* if its content can be read without a login, and without a grant (a permission that an
  administrator of this registry gives). Every client could download its blobs from the upstream directly. So a
  repository may serve a blob if a manifest in the repository names the blob.
- Any other upstream is *private*: a client that may read one repository may have no access to another. So a repository
  may serve a blob only after the upstream has answered that this repository has the blob. The mirror records the
  answer; the blob is then *confirmed* for the repository.
"""

from __future__ import annotations

from collections.abc import Sequence

from registry.mirror.blob_sizes import BlobSizes
from registry.mirror.freshness import NegativeCache
from registry.mirror.upstream_client import BlobSizeUnknown
from storage.content import MIRROR_ACTOR, Manifest
from storage.errors import BlobUnknown, DataDirectoryReplaced, Denied, StorageFull, TooManyRequests, UpstreamUnavailable
from storage.interface import Registry
from storage.names import Digest, RepositoryName
from storage.upstream_records import UpstreamRecords


class BlobEntitlement:
    """Applies the rule of the module docstring for one upstream. An entitlement is the right of a repository to serve a
    cached blob."""

    def __init__(
        self,
        local: Registry,
        upstream_name: str,
        records: UpstreamRecords,
        negative_cache: NegativeCache,
        sizes: BlobSizes,
        *,
        is_private: bool,
    ) -> None:
        """`local`: the registry in which the mirror stores content. `upstream_name`: the name of the upstream in the
        settings. `records`: the recorded answers of the upstream. `negative_cache`: says which blobs the upstream does
        not have. `sizes`: asks the upstream for the sizes of blobs. `is_private`: whether clients need a login or a
        grant to read the content of the upstream."""
        self.is_private = is_private
        self._local = local
        self._upstream_name = upstream_name
        self._records = records
        self._negative_cache = negative_cache
        self._sizes = sizes

    async def may_serve_if_stored(self, repo: RepositoryName, digest: Digest) -> bool:
        """Returns whether `repo` may serve the blob without a request to the upstream. Call this only if `repo` has the
        blob in the store. At a public upstream, returns True. At a private upstream, returns True if the blob is
        confirmed for `repo`."""
        return not self.is_private or await self._records.is_confirmed(repo, digest)

    async def is_known_missing(self, repo: RepositoryName, digest: Digest) -> bool:
        """Returns whether the upstream said a short time ago that `repo` does not have the blob."""
        return await self._negative_cache.has(repo, digest)

    async def check(
        self, repo: RepositoryName, digest: Digest, deadline: float, download_size: int | None
    ) -> tuple[int, Sequence[Manifest]]:
        """Checks that `repo` may serve the blob. Returns the blob's size in bytes, and the stored manifests of `repo`
        that name the blob (at most 8: see `UpstreamRecords.referring_manifests`).

        If the upstream said a short time ago that `repo` does not have the blob, raises BlobUnknown and asks nothing.

        At a public upstream, the first case that applies decides where the size comes from:

        - No manifest names the blob: asks the upstream.
        - An earlier call of `check` or `ask_size` has remembered a size a short time ago: takes this size.
        - All manifests state the same size: takes this size.
        - The manifests state different sizes: asks the upstream, and remembers the answer for a short time. If the
          upstream refuses, does not answer or states no size, takes the size in the newest manifest.

        At a private upstream, takes `download_size`. If it is None, asks the upstream. If the upstream has the blob but
        does not state the size, takes the size in the newest manifest.

        - `deadline`: in seconds of the event loop's clock.
        - `download_size`: the size of the blob if a download of the blob for `repo` is running; otherwise None.

        Raises BlobUnknown, UpstreamTimeout (the deadline has passed), and the errors of the upstream client."""
        if await self._negative_cache.has(repo, digest):
            raise BlobUnknown("the upstream does not have this blob; this answer is cached for a short time")
        manifests = await self._records.referring_manifests(repo, digest)
        stated_sizes = [blob.size for manifest in manifests for blob in manifest.blobs if blob.digest == digest]
        if self.is_private:
            # A manifest is no proof, because its author can name any digest and size. A running download for `repo` is
            # a proof: the upstream has confirmed that `repo` has the blob.
            if download_size is not None:
                return download_size, manifests
        else:
            if stated_sizes and (remembered := self._sizes.remembered_size(repo, digest)) is not None:
                return remembered, manifests
            if len(set(stated_sizes)) == 1:
                return stated_sizes[0], manifests
            if stated_sizes:
                try:
                    return await self._sizes.ask_and_remember(repo, digest, deadline), manifests
                except (Denied, TooManyRequests, UpstreamUnavailable):
                    # This size may be wrong. The response to a HEAD request, and the check of a requested range, then
                    # use the wrong size. If the blob is stored, the blob is served nevertheless: at a public upstream,
                    # `mount` does not use the size. If the blob is downloaded, the download detects a wrong size.
                    return stated_sizes[0], manifests
        try:
            return await self._sizes.ask(repo, digest, deadline), manifests
        except BlobSizeUnknown:
            if not stated_sizes:
                raise
            return stated_sizes[0], manifests

    async def ask_size(self, repo: RepositoryName, digest: Digest, deadline: float) -> int:
        """Asks the upstream for the blob's size in bytes. Call this if the size that `check` has returned differs from
        the size of the blob that the upstream has sent. Remembers the answer for a short time. At a public upstream,
        `check` uses the remembered size. Raises the errors of `check`."""
        return await self._sizes.ask_and_remember(repo, digest, deadline)

    async def mount(self, repo: RepositoryName, digest: Digest, size: int) -> RepositoryName | None:
        """Adds the blob to `repo`, if any repository of this upstream has the blob in the store. Call this only after
        `check` has returned this `size` for `repo`. Returns the repository to read the blob from:

        - `repo`, if the blob was added.
        - Another repository that has the blob, if the store cannot be changed: the disk is too full, or the data
          directory was replaced.
        - None, if no repository of this upstream has the blob in the store.
        - None, if the upstream is private and `size` is not the size of the stored blob. Such a `size` does not prove
          that the upstream has the blob for `repo`: an upstream can send a login page with status 200, and `check` then
          returns the size of this page.

        Does not use blobs of other upstreams, or blobs that clients have pushed: a manifest at one upstream must not
        give access to them."""
        prefix = f"{self._upstream_name}/"  # all repositories of this upstream have names with this prefix
        holder = await self._records.find_holder(prefix, digest)
        if holder is None:
            return None
        try:
            if self.is_private and (await self._local.resolve_blob(holder, digest)).size != size:
                return None
            await self._local.mount_blob(repo, digest, holder, MIRROR_ACTOR)
            if self.is_private:
                await self._records.confirm(repo, digest)
        except BlobUnknown:  # garbage collection has just deleted the blob
            return None
        except (StorageFull, DataDirectoryReplaced):
            return holder
        return repo

    async def aclose(self) -> None:
        """Cancels the running requests to the upstream."""
        await self._sizes.aclose()
