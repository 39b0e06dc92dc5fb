"""Decides which repositories of an upstream a blob may be read from.

Blobs are stored once and shared between the repositories of one upstream. Knowing a digest must not open a blob:

- Public upstream (no login, no grant required): everybody can fetch the blob there, so a manifest of the repository
  that names the blob is enough.
- Private upstream: readers of one repository may have no access to the next one. A repository gets a blob only when
  the upstream itself says that this repository has it (`Records.confirmed`).
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
"""The actor recorded for content that comes from upstreams."""


class BlobEntitlement:
    """The access rule for blobs of one upstream. `upstream_name` returns a repository's name at the upstream.
    `private`: see `Upstream.private`."""

    def __init__(
        self,
        local: Registry,
        upstream: UpstreamClient,
        records: UpstreamRecords,
        leases: Leases,
        negative_cache: NegativeCache,
        upstream_name: Callable[[RepositoryName], RepositoryName],
        *,
        private: bool,
    ) -> None:
        self.private = private
        self._local = local
        self._upstream = upstream
        self._records = records
        self._leases = leases
        self._negative_cache = negative_cache
        self._upstream_name = upstream_name
        self._sizes: SingleFlight[int] = SingleFlight()

    async def is_confirmed(self, repo: RepositoryName, digest: Digest) -> bool:
        """Returns whether the blob, if stored in `repo`, may be served without asking the upstream."""
        return not self.private or await self._records.is_confirmed(repo, digest)

    async def is_known_missing(self, repo: RepositoryName, digest: Digest) -> bool:
        """Returns whether the upstream said a short time ago that `repo` has no such blob."""
        return await self._negative_cache.has(repo, digest)

    async def prove(
        self, repo: RepositoryName, digest: Digest, deadline: float, running_size: int | None
    ) -> tuple[int, Sequence[Manifest]]:
        """Returns the blob's size and the stored manifests of `repo` that name it, once the rule above holds.
        `deadline` is in seconds of the event loop's clock. `running_size`: the size of a fill for `repo`, which was
        proved when the fill started. Raises BlobUnknown; UpstreamTimeout at the deadline; what the upstream raises."""
        if await self._negative_cache.has(repo, digest):
            raise BlobUnknown("the upstream has no such blob; that is remembered for a moment")
        manifests = await self._records.referring_manifests(repo, digest)
        if self.private:
            # A manifest proves nothing: its author may name any digest in it, with any size.
            if running_size is not None:
                return running_size, manifests
        else:
            for blob in (blob for manifest in manifests for blob in manifest.blobs):
                if blob.digest == digest:
                    return blob.size, manifests
        try:
            async with asyncio.timeout_at(deadline):
                return await self._sizes.run((repo, digest), lambda: self._ask_size(repo, digest)), manifests
        except TimeoutError:
            raise start_timeout(digest) from None

    async def mount(self, repo: RepositoryName, digest: Digest, size: int) -> RepositoryName | None:
        """Links a stored blob of this upstream into `repo`, which `prove` must have accepted with this `size`. Returns
        the repository to read the blob from: `repo`, or, when the disk is full, the one that holds it; None: no
        repository of this upstream holds it.

        Blobs of other upstreams and hosted blobs are left out: a manifest published at one upstream must not open
        them. At a private upstream the size must match the stored blob's, since a login page answers 200 with a
        length, too."""
        holder = await self._records.find_holder(f"{self._upstream.name}/", digest)
        if holder is None:
            return None
        try:
            if self.private and (await self._local.resolve_blob(holder, digest)).size != size:
                return None
            await self._local.mount_blob(repo, digest, holder, MIRROR_ACTOR)
            if self.private:
                await self._records.confirm(repo, digest)
        except BlobUnknown:  # collected since
            return None
        except StorageFull:
            return holder
        return repo

    async def aclose(self) -> None:
        """Cancels running requests for sizes."""
        await self._sizes.aclose()

    async def _ask_size(self, repo: RepositoryName, digest: Digest) -> int:
        """Asks the upstream for the blob's size, in one process at a time."""
        async with self._leases.take(f"blob {repo} {digest}"):
            if await self._negative_cache.has(repo, digest):
                raise BlobUnknown("the upstream has no such blob")
            try:
                return (await self._upstream.resolve_blob(self._upstream_name(repo), digest)).size
            except UnconfirmedBlobUnknown:
                raise
            except BlobUnknown:
                await self._negative_cache.note(repo, digest)
                raise


def start_timeout(digest: Digest) -> UpstreamTimeout:
    """Returns the error for a blob whose first byte does not come in time."""
    return UpstreamTimeout(f"{digest} does not begin to come in time; try again in a moment")
