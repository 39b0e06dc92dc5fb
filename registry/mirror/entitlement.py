"""Decides through which repositories of an upstream registry a cached blob may be read.

A blob is stored once, even if several repositories of the upstream contain it. A client must not get a blob through a
repository just because it knows the digest. The rule depends on the upstream:

- A public upstream needs no login and no grant, so every client could download the blob there. A repository may serve
  the blob if a manifest in it names the blob.
- At a private upstream, a client that may read one repository may have no access to another. A repository may serve
  the blob only after the upstream has answered that this repository has it. The mirror records such an answer; the
  blob is then *confirmed* for the repository.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from registry.mirror.freshness import NegativeCache
from registry.mirror.upstream_client import UnconfirmedBlobUnknown, UpstreamClient
from registry.single_flight import SingleFlight
from storage.content import Actor, Manifest
from storage.errors import BlobUnknown, StorageFull, UpstreamTimeout
from storage.interface import Registry
from storage.leases import Leases
from storage.names import Digest, RepositoryName
from storage.upstream_records import UpstreamRecords

MIRROR_ACTOR: Final = Actor(name="mirror")
"""The actor that is recorded for content that the mirror stores."""


class BlobEntitlement:
    """Applies the rule of the module docstring for one upstream. An entitlement is the right of a repository to serve a
    cached blob."""

    def __init__(
        self,
        local: Registry,
        upstream: UpstreamClient,
        records: UpstreamRecords,
        leases: Leases,
        negative_cache: NegativeCache,
        to_upstream_name: Callable[[RepositoryName], RepositoryName],
        *,
        private: bool,
    ) -> None:
        """`local`: the registry in which the mirror stores content. `to_upstream_name`: returns the name that a
        repository has at the upstream. `private`: whether clients need a login or a grant to read the upstream's
        content."""
        self.private = private
        self._local = local
        self._upstream = upstream
        self._records = records
        self._leases = leases
        self._negative_cache = negative_cache
        self._to_upstream_name = to_upstream_name
        self._size_requests: SingleFlight[int] = SingleFlight()

    async def is_confirmed(self, repo: RepositoryName, digest: Digest) -> bool:
        """Returns whether `repo` may serve the blob, if it is stored there, without asking the upstream: always at a
        public upstream, otherwise if the blob is confirmed for `repo`."""
        return not self.private or await self._records.is_confirmed(repo, digest)

    async def is_known_missing(self, repo: RepositoryName, digest: Digest) -> bool:
        """Returns whether the upstream said a short time ago that `repo` does not have the blob."""
        return await self._negative_cache.has(repo, digest)

    async def prove(
        self, repo: RepositoryName, digest: Digest, deadline: float, download_size: int | None
    ) -> tuple[int, Sequence[Manifest]]:
        """Checks that `repo` may serve the blob. Returns the blob's size in bytes, and the stored manifests of `repo`
        that name it. At a private upstream, or if no manifest names the blob, asks the upstream.

        `deadline`: in seconds of the event loop's clock. `download_size`: the size of the blob if a download of it for
        `repo` is running (None otherwise); the right was checked when that download started. Raises BlobUnknown,
        UpstreamTimeout (the deadline has passed), and the errors of the upstream client."""
        if await self._negative_cache.has(repo, digest):
            raise BlobUnknown("the upstream does not have this blob; this answer is cached for a short time")
        manifests = await self._records.referring_manifests(repo, digest)
        if self.private:
            # A manifest is no proof here, because its author can name any digest in it, with any size.
            if download_size is not None:
                return download_size, manifests
        else:
            for blob in (blob for manifest in manifests for blob in manifest.blobs):
                if blob.digest == digest:
                    return blob.size, manifests
        try:
            async with asyncio.timeout_at(deadline):
                return await self._size_requests.run((repo, digest), lambda: self._ask_size(repo, digest)), manifests
        except TimeoutError:
            raise start_timeout(digest) from None

    async def mount(self, repo: RepositoryName, digest: Digest, size: int) -> RepositoryName | None:
        """Adds the blob to `repo`, if it is stored in any repository of this upstream. Call it only after `prove` has
        returned this `size` for `repo`. Returns the repository to read the blob from: `repo`, or the repository that
        has the blob, if the disk is too full to add it to `repo`. Returns None if no repository of this upstream has
        the blob.

        Does not use blobs of other upstreams or blobs that clients pushed, because a manifest at one upstream must not
        give access to them. At a private upstream, the size must be that of the stored blob: an upstream that answers
        with a login page also sends status 200 and a length."""
        holder = await self._records.find_holder(f"{self._upstream.name}/", digest)
        if holder is None:
            return None
        try:
            if self.private and (await self._local.resolve_blob(holder, digest)).size != size:
                return None
            await self._local.mount_blob(repo, digest, holder, MIRROR_ACTOR)
            if self.private:
                await self._records.confirm(repo, digest)
        except BlobUnknown:  # garbage collection has just deleted the blob
            return None
        except StorageFull:
            return holder
        return repo

    async def aclose(self) -> None:
        """Cancels the running requests to the upstream."""
        await self._size_requests.aclose()

    async def _ask_size(self, repo: RepositoryName, digest: Digest) -> int:
        """Asks the upstream for the blob's size in bytes. Only one process at a time asks about a blob. Raises
        BlobUnknown, and caches that answer if it comes from the registry itself."""
        async with self._leases.take(f"blob {repo} {digest}"):
            if await self._negative_cache.has(repo, digest):
                raise BlobUnknown("the upstream does not have this blob")
            try:
                return (await self._upstream.resolve_blob(self._to_upstream_name(repo), digest)).size
            except UnconfirmedBlobUnknown:
                raise
            except BlobUnknown:
                await self._negative_cache.add(repo, digest)
                raise


def start_timeout(digest: Digest) -> UpstreamTimeout:
    """Returns the error for a blob of which the upstream has not sent the first byte in time."""
    return UpstreamTimeout(f"the upstream did not begin to send {digest} in time; try again in a moment")
