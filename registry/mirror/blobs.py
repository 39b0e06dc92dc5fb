"""Blobs of an upstream: from the store, or through a fill that any number of readers follow."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from registry.mirror.fill import Tools
from registry.mirror.fills import Fills
from registry.mirror.flights import Flights
from registry.mirror.following import FollowingReader
from registry.mirror.prefetch import Prefetch
from registry.mirror.source import BlobDoubtful
from storage.content import BLOB_TYPE, Descriptor, Manifest, Span
from storage.errors import BlobUnknown, DigestInvalid, PartialLost, UpstreamTimeout, UpstreamUnavailable
from storage.interface import BlobReader, Records
from storage.names import Digest, RepositoryName

SMALL: Final = 64 * 1024
"""Bytes up to which a blob is given to nobody before it is checked: that costs no time worth naming."""
ATTEMPTS: Final = 5
BEGINNING: Final = 25.0
"""Seconds in which a client is answered, whatever the upstream does: containerd waits 30 s for headers."""


class Blobs:
    """A blob may be read through a repository when the upstream says that the repository has it. Where everybody may
    read all of the upstream, a manifest of the repository that names the blob is enough."""

    def __init__(
        self, tools: Tools, records: Records, fills: Fills, prefetch: Prefetch, beginning: float = BEGINNING
    ) -> None:
        self._tools = tools
        self._records = records
        self._fills = fills
        self._prefetch = prefetch
        self._beginning = beginning
        self._sizes: Flights[int] = Flights()

    async def resolve(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        """Nothing is fetched for it. Raises BlobUnknown, and what the source raises."""
        ends = asyncio.get_running_loop().time() + self._beginning
        tools = self._tools
        if await tools.entitled(repo, digest):
            with suppress(BlobUnknown):
                return await tools.local.resolve_blob(repo, digest)
        size, _ = await self._entitle(repo, digest, ends)
        if tools.private and (holder := await tools.mount(repo, digest, size)):  # so that it need not be asked again
            with suppress(BlobUnknown):
                return await tools.local.resolve_blob(holder, digest)
        return Descriptor(BLOB_TYPE, digest, size, verified=False)

    async def open(self, repo: RepositoryName, digest: Digest, span: Span | None) -> BlobReader:
        """Waits until the upstream has begun to send, never for the whole; for a while where only connections to it are
        wanting. Raises BlobUnknown, RangeInvalid, UpstreamTimeout, and what the source raises."""
        ends = asyncio.get_running_loop().time() + self._beginning
        local = self._tools.local
        if await self._tools.entitled(repo, digest):
            with suppress(BlobUnknown):
                reader = await local.open_blob(repo, digest, span)
                self._prefetch.on_hit(repo, digest)
                return reader
        size, manifests = await self._entitle(repo, digest, ends)
        within = span.within(size) if span else (0, size)
        for _ in range(ATTEMPTS):
            if holder := await self._tools.mount(repo, digest, size):
                with suppress(BlobUnknown):
                    return await local.open_blob(holder, digest, span)
            fill = self._fills.want(repo, digest, size)
            self._prefetch.on_blob(repo, digest, manifests)
            try:
                async with asyncio.timeout_at(ends):
                    opened = size > SMALL and await fill.opened()
                    if not opened:
                        await fill.finished()
                if opened:
                    return FollowingReader(fill, within, self._prefetch.pulls_of(digest))
            except TimeoutError:
                if size > SMALL and fill.queued:
                    return FollowingReader(fill, within, self._prefetch.pulls_of(digest))
                raise _too_late(digest) from None
            except BlobUnknown:
                if fill.repo == repo:
                    raise
            except (DigestInvalid, PartialLost):
                continue  # nothing of it was given to anybody here
        raise UpstreamUnavailable(f"{digest} could not be fetched; try again in a moment")

    async def lacks(self, repo: RepositoryName, blob: Descriptor) -> bool:
        """Whether a blob that a manifest of `repo` names is worth asking for: it is not here, nor known not to be
        there. Raises what `resolve` raises."""
        tools, digest = self._tools, blob.digest
        if await tools.entitled(repo, digest):
            with suppress(BlobUnknown):
                await tools.local.resolve_blob(repo, digest)
                return False
        if tools.private:
            size, _ = await self._entitle(repo, digest, asyncio.get_running_loop().time() + self._beginning)
            if size != blob.size:
                return False
        elif await tools.misses.has(repo, digest):
            return False
        return not await tools.mount(repo, digest, blob.size)

    async def aclose(self) -> None:
        await self._sizes.aclose()

    async def _entitle(self, repo: RepositoryName, digest: Digest, ends: float) -> tuple[int, Sequence[Manifest]]:
        """The blob's size and the manifests that name it. Raises BlobUnknown: the repository has no such blob;
        UpstreamTimeout: nobody said so until `ends`."""
        if await self._tools.misses.has(repo, digest):
            raise BlobUnknown("the upstream has no such blob; that is remembered for a moment")
        manifests = await self._records.referring(repo, digest)
        if self._tools.private:
            # Whoever may write a manifest at the upstream may name any digest in it, with any size.
            if (fill := self._fills.of(repo, digest)) is not None:
                return fill.size, manifests
        else:
            for blob in (blob for manifest in manifests for blob in manifest.blobs):
                if blob.digest == digest:
                    return blob.size, manifests
        try:
            async with asyncio.timeout_at(ends):
                return await self._sizes.join((repo, digest), lambda: self._ask_size(repo, digest)), manifests
        except TimeoutError:
            raise _too_late(digest) from None

    async def _ask_size(self, repo: RepositoryName, digest: Digest) -> int:
        tools = self._tools
        async with tools.turns.take(f"blob {repo} {digest}"):
            if await tools.misses.has(repo, digest):
                raise BlobUnknown("the upstream has no such blob")
            try:
                return (await tools.source.resolve_blob(tools.far(repo), digest)).size
            except BlobDoubtful:
                raise
            except BlobUnknown:
                await tools.misses.note(repo, digest)
                raise


def _too_late(digest: Digest) -> UpstreamTimeout:
    return UpstreamTimeout(f"{digest} does not begin to come in time; try again in a moment")
