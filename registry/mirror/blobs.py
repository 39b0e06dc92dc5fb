"""Serves blobs of an upstream registry, from the local registry or while they are being downloaded (`MirroredBlobs`).

A *fill* is the download of one blob. It writes the bytes into a file that all readers of the blob share. A reader gets
the blob's last byte only after the digest was verified (`registry.mirror.withheld_last_byte`). *Prefetching* starts
fills for blobs that a client will probably request next.

Several repositories of the upstream can contain the same blob. They usually use one *shared* fill of the blob, which
requests the blob from one of them. If the upstream does not respond to the shared fill, the other repositories use a
second fill, the *separate* fill (`registry.mirror.fill.fill`). A client waits for only one fill at a time.

The *entitlement* of a repository is its right to serve a cached blob (`registry.mirror.entitlement`). An upstream is
*private* if this registry has a login at the upstream, or if clients need a grant for the upstream: a permission that
an administrator of this registry gives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from registry.mirror.blob_sizes import start_timeout_error
from registry.mirror.entitlement import BlobEntitlement
from registry.mirror.fill.fill import Fill
from registry.mirror.fill.fills import Fills
from registry.mirror.fill.slots import SMALL_BLOB_BYTES
from registry.mirror.prefetch import Prefetcher
from registry.mirror.upstream_client import BlobSizeWrong
from registry.mirror.withheld_last_byte import UnverifiedBlobReader
from registry.request import set_cache_state
from storage.content import BLOB_TYPE, Descriptor, Manifest, Span
from storage.errors import (
    BlobUnknown,
    DataDirectoryReplaced,
    Denied,
    DigestInvalid,
    PartialBlobLost,
    StorageFull,
    TooManyRequests,
    UpstreamUnavailable,
)
from storage.interface import BlobReader, Registry
from storage.names import Digest, RepositoryName

MAX_FAILED_FILLS: Final = 5
"""After this number of failed fills, a client's request ends with an error. A fill counts as failed if its bytes have a
wrong digest, cannot be stored, or are lost. Errors of the upstream do not count."""
START_TIMEOUT_SECONDS: Final = 25.0
"""Longest time from a client's request to the start of the response. It must be less than the 30 s that containerd
waits for the headers of a response."""
SILENCE_SECONDS: Final = 8.0
"""A client requests a blob from one repository. The fill that serves the client may request the blob from another
repository. If the upstream does not respond to such a fill, the client waits at most this time, and then changes to the
other fill of the blob. The time includes the request for a token.

The time must be longer than a working upstream takes to respond, because two fills may download the bytes twice. It
must be much shorter than `START_TIMEOUT_SECONDS`, so that there is time for a response to the other fill."""


class _NoResponse(Exception):
    """The upstream does not respond to a fill that requests the blob from another repository than the client does."""


class MirroredBlobs:
    """Implements the blob reads of `Mirror` for one upstream."""

    def __init__(
        self,
        local: Registry,
        entitlement: BlobEntitlement,
        fills: Fills,
        prefetch: Prefetcher,
        upstream_name: str,
        start_timeout: float = START_TIMEOUT_SECONDS,
    ) -> None:
        """`local`: the registry in which the mirror stores blobs. `entitlement`: decides through which repositories a
        blob may be read. `upstream_name`: the name of the upstream in the settings. `start_timeout`: longest time, in
        seconds, from a client's request to the start of the response."""
        self._local = local
        self._entitlement = entitlement
        self._fills = fills
        self._prefetch = prefetch
        self._upstream_name = upstream_name
        self._start_timeout = start_timeout

    async def resolve(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        """Returns the blob's descriptor, without downloading the blob. Raises BlobUnknown, and the errors of the
        upstream client."""
        deadline = self._deadline()
        if await self._entitlement.may_serve_if_stored(repo, digest):
            with suppress(BlobUnknown):
                set_cache_state("hit", self._upstream_name)
                return await self._local.resolve_blob(repo, digest)
        set_cache_state("miss", self._upstream_name)
        size, _ = await self._check_entitlement(repo, digest, deadline)
        if self._entitlement.is_private and (stored_in := await self._entitlement.mount(repo, digest, size)):
            # Usually, `stored_in` is `repo`: `mount` has added the blob to `repo`. If the store cannot be changed,
            # `stored_in` is another repository that has the blob.
            with suppress(BlobUnknown):
                return await self._local.resolve_blob(stored_in, digest)
        return Descriptor(BLOB_TYPE, digest, size, verified=False)

    async def open(self, repo: RepositoryName, digest: Digest, span: Span | None) -> BlobReader:
        """Opens the blob for reading. If the blob is not stored, starts a fill or joins the running fill, and waits
        until the upstream starts to send. For a blob of at most `SMALL_BLOB_BYTES`, waits until the blob is complete
        and verified.

        The wait ends with the start timeout. If the fill is still waiting for a free connection, and the blob is not
        empty, this method then returns a reader that waits for the bytes. Otherwise, it raises UpstreamTimeout.

        If the disk is too full for the blob, or if the data directory was replaced, the reader passes the bytes to the
        client without storing them. If the size of the upstream's blob differs from the expected size, asks the
        upstream for the size, and fetches the blob again. Raises BlobUnknown, RangeInvalid, and the errors of the
        upstream client."""
        deadline = self._deadline()
        if await self._entitlement.may_serve_if_stored(repo, digest):
            with suppress(BlobUnknown):
                set_cache_state("hit", self._upstream_name)
                reader = await self._local.open_blob(repo, digest, span)
                self._prefetch.on_stored_blob(repo, digest)
                return reader
        set_cache_state("miss", self._upstream_name)
        size, manifests = await self._check_entitlement(repo, digest, deadline)
        try:
            return await self._open_missing(repo, digest, size, span, manifests, deadline)
        except BlobSizeWrong:
            upstream_size = await self._entitlement.ask_size(repo, digest, deadline)
            if upstream_size == size:
                raise
        return await self._open_missing(repo, digest, upstream_size, span, manifests, deadline)

    async def _open_missing(
        self,
        repo: RepositoryName,
        digest: Digest,
        size: int,
        span: Span | None,
        manifests: Sequence[Manifest],
        deadline: float,
    ) -> BlobReader:
        """Opens a blob that is not stored in `repo` (`open`). Raises BlobSizeWrong if the upstream's blob does not have
        the size `size`.

        If a fill for another repository fails, requests a fill again. If such a fill gets no response within
        `SILENCE_SECONDS`, changes from the shared to the separate fill of the blob, or back."""
        offsets = span.to_offsets(size) if span else (0, size)
        is_separate = False
        failed_fills = 0
        while failed_fills < MAX_FAILED_FILLS:
            if (stored := await self._open_stored(repo, digest, size, span)) is not None:
                return stored
            asked_repo = repo
            try:
                with self._fills.requested_fill(repo, digest, size, is_separate=is_separate) as fill:
                    asked_repo = fill.repo
                    self._prefetch.on_missing_blob(repo, digest, manifests)
                    if await self._wait_for_response(fill, repo, deadline):
                        # A pull is a client's download of an image. The reader keeps the pulls of the images that
                        # contain the blob active while it is open, so prefetching for these images continues.
                        image_pulls = self._prefetch.pulls_of(digest)
                        return UnverifiedBlobReader(
                            *(fill, offsets, image_pulls), lambda: self._open_stored(repo, digest, size, None)
                        )
            except _NoResponse:
                is_separate = not is_separate
            except (BlobUnknown, Denied, TooManyRequests, UpstreamUnavailable):
                if asked_repo == repo or asyncio.get_running_loop().time() >= deadline:
                    raise
                # The fill requested the blob from another repository. Its failure does not count in `failed_fills`,
                # because the upstream may still have the blob in `repo`. The deadline limits these failures.
            except (StorageFull, DataDirectoryReplaced):
                failed_fills += 1
                # After DigestInvalid, the loop can try again, because the client has not got any byte. The next
                # pass-through prefers another URL of the upstream to the URL that sent the wrong bytes.
                with suppress(DigestInvalid):
                    return await self._open_pass_through(repo, digest, size, offsets, deadline)
            except (DigestInvalid, PartialBlobLost):
                failed_fills += 1  # another fill can serve the client, because the client has not got any byte
        raise UpstreamUnavailable(f"{digest} could not be fetched; try again in a moment")

    async def _open_stored(
        self, repo: RepositoryName, digest: Digest, size: int, span: Span | None
    ) -> BlobReader | None:
        """If the blob is stored in any repository of the upstream, adds the blob to `repo` and opens it. If it is not
        stored, returns None. Call this method only after `BlobEntitlement.check` has returned `size` for `repo`. Raises
        RangeInvalid, StorageFailed."""
        if stored_in := await self._entitlement.mount(repo, digest, size):
            with suppress(BlobUnknown):
                return await self._local.open_blob(stored_in, digest, span)
        return None

    async def _open_pass_through(
        self, repo: RepositoryName, digest: Digest, size: int, offsets: tuple[int, int], deadline: float
    ) -> BlobReader:
        """Opens a blob that cannot be stored, for example because the disk is too full. Waits until the upstream starts
        to send. Raises UpstreamTimeout, and the errors of the upstream client. Raises DigestInvalid if the blob is
        empty and its digest is wrong."""
        reader = await self._fills.open_pass_through(repo, digest, size, offsets)
        try:
            async with asyncio.timeout_at(deadline):
                await reader.start()
        except BaseException as error:
            await reader.aclose()
            if isinstance(error, TimeoutError):
                raise start_timeout_error(digest) from None
            raise
        return reader

    async def should_prefetch(self, repo: RepositoryName, blob: Descriptor) -> bool:
        """Returns whether a blob should be downloaded before a client requests it. If another repository of the
        upstream has the blob in the store, adds the blob to `repo`. `blob`: the blob's descriptor in a manifest of
        `repo`. Returns False in these cases:

        - The blob is stored.
        - The upstream is public, and said a short time ago that it does not have the blob.
        - The upstream is private, and the size in `blob` is wrong.

        Raises the errors of `resolve`."""
        entitlement, digest = self._entitlement, blob.digest
        if await entitlement.may_serve_if_stored(repo, digest):
            with suppress(BlobUnknown):
                await self._local.resolve_blob(repo, digest)
                return False
        if entitlement.is_private:
            size, _ = await self._check_entitlement(repo, digest, self._deadline())
            if size != blob.size:
                return False
        elif await entitlement.is_known_missing(repo, digest):
            return False
        return not await entitlement.mount(repo, digest, blob.size)

    def _deadline(self) -> float:
        """Returns the end of the start timeout for a request that arrives now, in seconds of the event loop's clock."""
        return asyncio.get_running_loop().time() + self._start_timeout

    async def _check_entitlement(
        self, repo: RepositoryName, digest: Digest, deadline: float
    ) -> tuple[int, Sequence[Manifest]]:
        """Checks that `repo` may serve the blob. Returns the blob's size in bytes, and the stored manifests that name
        the blob."""
        fill = self._fills.find_running(repo, digest)
        return await self._entitlement.check(repo, digest, deadline, download_size=fill.size if fill else None)

    async def _wait_for_response(self, fill: Fill, repo: RepositoryName, deadline: float) -> bool:
        """Waits until the upstream starts to send. For a blob of at most `SMALL_BLOB_BYTES`, waits until the blob is
        complete. Returns True if the blob has to be read from the fill; False if the blob is stored.

        - If the fill fails, raises the fill's error.
        - If the fill requests the blob from another repository than `repo`, checks every half of `SILENCE_SECONDS`
          whether the fill has sent its request and has no response. If two checks in a row find this, raises
          _NoResponse.
        - If the deadline passes, the fill is waiting for a free connection, and the blob is not empty, returns True.
          The response may then begin before the digest is verified, because the reader withholds the last byte until
          the digest is verified.
        - If the deadline passes in any other case, raises UpstreamTimeout. An empty blob has no last byte to withhold,
          so its response must not begin before the digest is verified."""
        had_no_response = False
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(SILENCE_SECONDS / 2):
                            if fill.size > SMALL_BLOB_BYTES:
                                return await fill.wait_for_response()
                            await fill.wait_until_stored()
                            return False
                    # The fill may have sent its request only a moment before a check, after it had waited for a free
                    # connection. So one check does not show that the upstream is silent; the next check does.
                    has_no_response = fill.awaits_other_repository(repo)
                    if had_no_response and has_no_response:
                        raise _NoResponse
                    had_no_response = has_no_response
        except TimeoutError:
            if fill.size and fill.is_queued:
                return True
            raise start_timeout_error(fill.digest) from None
