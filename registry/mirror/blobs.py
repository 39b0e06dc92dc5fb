"""Serves blobs of an upstream registry: from the local store, or while they are being downloaded.

A *fill* is the download of one blob. It writes the bytes into a file that all readers share, a *partial blob*. A reader
of such a file gets the blob's last byte only after the digest was verified (`registry.mirror.withheld_last_byte`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from registry.mirror.entitlement import BlobEntitlement, start_timeout
from registry.mirror.fill.fill import Fill, Fills
from registry.mirror.prefetch import Prefetcher
from registry.mirror.withheld_last_byte import UnverifiedBlobReader
from storage.content import BLOB_TYPE, Descriptor, Manifest, Span
from storage.errors import BlobUnknown, DigestInvalid, PartialLost, UpstreamUnavailable
from storage.interface import BlobReader, Registry
from storage.names import Digest, RepositoryName

SMALL_BLOB_BYTES: Final = 64 * 1024
"""Blobs up to this size are served only after their download is complete and verified, which takes little longer."""
MAX_FILL_ATTEMPTS: Final = 5
"""Fills that are tried for one request, if the earlier ones got wrong bytes or were broken off."""
START_TIMEOUT_SECONDS: Final = 25.0
"""Time after which a client gets an answer at the latest. Must be less than the 30 s that containerd waits for response
headers."""


class MirroredBlobs:
    """Implements the blob reads of `Mirror` for one upstream."""

    def __init__(
        self,
        local: Registry,
        entitlement: BlobEntitlement,
        fills: Fills,
        prefetch: Prefetcher,
        start_timeout: float = START_TIMEOUT_SECONDS,
    ) -> None:
        """`local`: the registry in which the mirror stores blobs. `entitlement`: decides through which repositories a
        blob may be read. `start_timeout`: seconds, see `START_TIMEOUT_SECONDS`."""
        self._local = local
        self._entitlement = entitlement
        self._fills = fills
        self._prefetch = prefetch
        self._start_timeout = start_timeout

    async def resolve(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        """Returns the blob's descriptor. Downloads no bytes. Raises BlobUnknown, and the errors of the upstream
        client."""
        deadline = self._deadline()
        if await self._entitlement.is_confirmed(repo, digest):
            with suppress(BlobUnknown):
                return await self._local.resolve_blob(repo, digest)
        size, _ = await self._prove(repo, digest, deadline)
        if self._entitlement.private and (stored_in := await self._entitlement.mount(repo, digest, size)):
            with suppress(BlobUnknown):  # the mount has recorded the upstream's answer, so the next request needs none
                return await self._local.resolve_blob(stored_in, digest)
        return Descriptor(BLOB_TYPE, digest, size, verified=False)

    async def open(self, repo: RepositoryName, digest: Digest, span: Span | None) -> BlobReader:
        """Opens the blob for reading. If it is not stored, starts a fill, or joins the running one, and waits until the
        upstream begins to send; for a blob of up to `SMALL_BLOB_BYTES`, until the blob is complete and verified.

        At the start timeout raises UpstreamTimeout, except if the fill of a larger blob is still waiting for a free
        connection: then returns a reader, whose reads wait further. Raises BlobUnknown, RangeInvalid, and the errors of
        the upstream client."""
        deadline = self._deadline()
        if await self._entitlement.is_confirmed(repo, digest):
            with suppress(BlobUnknown):
                reader = await self._local.open_blob(repo, digest, span)
                self._prefetch.on_hit(repo, digest)
                return reader
        size, manifests = await self._prove(repo, digest, deadline)
        offsets = span.to_offsets(size) if span else (0, size)
        for _ in range(MAX_FILL_ATTEMPTS):
            if stored_in := await self._entitlement.mount(repo, digest, size):
                with suppress(BlobUnknown):
                    return await self._local.open_blob(stored_in, digest, span)
            fill = self._fills.request(repo, digest, size)
            self._prefetch.on_blob(repo, digest, manifests)
            try:
                if await self._wait_started(fill, deadline):
                    return UnverifiedBlobReader(fill, offsets, self._prefetch.pulls_of(digest))
            except BlobUnknown:
                if fill.repo == repo:
                    raise
                # The fill asked the upstream for another repository. The next attempt asks it for `repo`.
            except (DigestInvalid, PartialLost):
                continue  # this client has got no byte of the failed fill, so another fill can be tried
        raise UpstreamUnavailable(f"{digest} could not be fetched; try again in a moment")

    async def should_prefetch(self, repo: RepositoryName, blob: Descriptor) -> bool:
        """Returns whether to download `blob`, which a manifest of `repo` names, before a client requests it. Returns
        False if the blob is stored, or if the upstream said a short time ago that it does not have the blob. Raises the
        same errors as `resolve`."""
        entitlement, digest = self._entitlement, blob.digest
        if await entitlement.is_confirmed(repo, digest):
            with suppress(BlobUnknown):
                await self._local.resolve_blob(repo, digest)
                return False
        if entitlement.private:
            size, _ = await self._prove(repo, digest, self._deadline())
            if size != blob.size:
                return False
        elif await entitlement.is_known_missing(repo, digest):
            return False
        return not await entitlement.mount(repo, digest, blob.size)

    def _deadline(self) -> float:
        """Returns the end of the start timeout, in seconds of the event loop's clock."""
        return asyncio.get_running_loop().time() + self._start_timeout

    async def _prove(self, repo: RepositoryName, digest: Digest, deadline: float) -> tuple[int, Sequence[Manifest]]:
        """Checks that `repo` may serve the blob. Returns the blob's size and the stored manifests that name it."""
        fill = self._fills.find_running(repo, digest)
        return await self._entitlement.prove(repo, digest, deadline, fill.size if fill else None)

    async def _wait_started(self, fill: Fill, deadline: float) -> bool:
        """Waits until the upstream begins to send, or until the blob is complete if it is small. Returns False if the
        blob is stored then. Returns True if a reader has to follow the fill: it is running, or it still waits for a
        free connection at the deadline. Raises UpstreamTimeout at the deadline otherwise, and the error of the fill."""
        try:
            async with asyncio.timeout_at(deadline):
                if fill.size > SMALL_BLOB_BYTES:
                    return await fill.wait_started()
                await fill.wait_finished()
                return False
        except TimeoutError:
            if fill.size > SMALL_BLOB_BYTES and fill.is_queued:
                return True
            raise start_timeout(fill.digest) from None
