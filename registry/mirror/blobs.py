"""Serves blobs of an upstream registry, from the local registry or while they are being downloaded (`MirroredBlobs`).

A *fill* is the download of one blob. It writes the bytes into a file that all readers of the blob share. A reader gets
the blob's last byte only after the digest was verified (`registry.mirror.withheld_last_byte`). *Prefetching* starts
fills for blobs that a client will probably request next.

Each fill requests the blob from one repository of the upstream. A blob can have two fills: the *shared* fill, which all
repositories use at first, and the *separate* fill, which other repositories use if the upstream does not respond to the
shared fill (`registry.mirror.fill.fill`). A client waits for only one fill at a time.

The *entitlement* of a repository is its right to serve a cached blob (`registry.mirror.entitlement`). A *grant* is a
permission that an administrator of this registry gives. An upstream is *private* in two cases: this registry has a
login at the upstream, or clients need a grant that names the upstream.
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
"""After this number of failed fills, a request ends with an error. A fill counts as failed if its bytes have a wrong
digest, or if it stops before the blob is complete. A fill that ends with an error of the upstream does not count."""
START_TIMEOUT_SECONDS: Final = 25.0
"""Longest time from a client's request to the start of the response. It must be less than the 30 s that containerd
waits for the headers of a response."""
SILENCE_SECONDS: Final = 8.0
"""A fill can request the blob from another repository than the client does. If the upstream does not respond to this
fill within this time, the client changes to the other fill of the blob. The time includes the request for a token.

The time must be longer than a working upstream usually takes to respond, because the upstream may send the bytes twice
if there are two fills. It must be much shorter than `START_TIMEOUT_SECONDS`, so that the upstream has enough time to
respond to the other fill."""


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
            # Usually, `stored_in` is `repo`: `mount` has added the blob to `repo`, and recorded that `repo` may serve
            # the blob without a request to the upstream. If the store cannot be changed, `stored_in` is another
            # repository that has the blob.
            with suppress(BlobUnknown):
                return await self._local.resolve_blob(stored_in, digest)
        return Descriptor(BLOB_TYPE, digest, size, verified=False)

    async def open(self, repo: RepositoryName, digest: Digest, span: Span | None) -> BlobReader:
        """Opens the blob for reading. If the blob is not stored, starts a fill, or joins the running one, and waits
        until the upstream starts to send. If the blob has at most `SMALL_BLOB_BYTES`, waits until the blob is complete
        and verified.

        If the start timeout passes during the wait, raises UpstreamTimeout. There is one exception: if the fill still
        waits for a free connection, and the blob is not empty, returns a reader that waits for the bytes. An empty blob
        has no last byte that the reader could withhold until the digest is verified.

        If the disk is too full for the blob, or if the data directory was replaced, the bytes are sent to the client
        without being stored. If the upstream sends a blob of another size than expected, asks the upstream for the
        size, and fetches the blob again with this size. Raises BlobUnknown, RangeInvalid, and the errors of
        the upstream client."""
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
        """Opens a blob that is not stored in `repo`: see `open`. Raises BlobSizeWrong if the upstream has a blob of
        another size.

        The fill may request the blob from another repository of the upstream. If the fill then fails, tries the next
        fill of the blob. If the fill then gets no response within `SILENCE_SECONDS`, changes to the other fill of the
        blob: from the shared to the separate fill, or back."""
        offsets = span.to_offsets(size) if span else (0, size)
        is_separate = False
        failed_fills = 0
        while failed_fills < MAX_FAILED_FILLS:
            if (stored := await self._open_stored(repo, digest, size, span)) is not None:
                return stored
            asked_repo = repo
            try:
                with self._fills.request(repo, digest, size, is_separate=is_separate) as fill:
                    asked_repo = fill.repo
                    self._prefetch.on_missing_blob(repo, digest, manifests)
                    if await self._wait_for_response(fill, repo, deadline):
                        # These pulls of images that contain the blob count as active while the reader is open, so that
                        # the prefetching for these images continues.
                        image_pulls = self._prefetch.pulls_of(digest)
                        return UnverifiedBlobReader(
                            *(fill, offsets, image_pulls), lambda: self._open_stored(repo, digest, size, None)
                        )
            except _NoResponse:
                is_separate = not is_separate
            except (BlobUnknown, Denied, TooManyRequests, UpstreamUnavailable):
                if asked_repo == repo or asyncio.get_running_loop().time() >= deadline:
                    raise
                # The fill requested the blob from another repository, so its failure does not count in `failed_fills`.
                # Clients of many other repositories could start such fills one after another. If their failures
                # counted, this request could end with an error before its own repository was asked. Only the deadline
                # limits the number of these failures.
            except (StorageFull, DataDirectoryReplaced):
                failed_fills += 1
                # After DigestInvalid, the client has got no byte, so the loop can try again. The next
                # pass-through prefers another URL of the upstream to the URL that sent the wrong bytes.
                with suppress(DigestInvalid):
                    return await self._open_pass_through(repo, digest, size, offsets, deadline)
            except (DigestInvalid, PartialBlobLost):
                failed_fills += 1  # the client has got no byte of the failed fill, so another fill can serve it
        raise UpstreamUnavailable(f"{digest} could not be fetched; try again in a moment")

    async def _open_stored(
        self, repo: RepositoryName, digest: Digest, size: int, span: Span | None
    ) -> BlobReader | None:
        """If any repository of the upstream has the blob in the store, adds the blob to `repo` and opens it. Otherwise
        returns None. Call this only after `BlobEntitlement.check` has returned this `size` for `repo`. Raises
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
        """Returns whether to download a blob before a client requests it. `blob`: the blob's descriptor in a manifest
        of `repo`. Returns False in these cases:

        - The blob is stored. If only another repository of the upstream has it, adds the blob to `repo`.
        - The upstream is public, and said a short time ago that it does not have the blob.
        - The upstream is private, and the manifest states a wrong size.

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
        """Returns when the start timeout of a request that arrives now ends, in seconds of the event loop's clock."""
        return asyncio.get_running_loop().time() + self._start_timeout

    async def _check_entitlement(
        self, repo: RepositoryName, digest: Digest, deadline: float
    ) -> tuple[int, Sequence[Manifest]]:
        """Checks that `repo` may serve the blob. Returns the blob's size and the stored manifests that name it."""
        fill = self._fills.find_running(repo, digest)
        return await self._entitlement.check(repo, digest, deadline, download_size=fill.size if fill else None)

    async def _wait_for_response(self, fill: Fill, repo: RepositoryName, deadline: float) -> bool:
        """Waits until the upstream starts to send. For a small blob, waits until the blob is complete. Returns False if
        the blob is stored after the wait; True if its bytes have to be read from the running fill.

        If the deadline passes while the fill of a blob that is not empty waits for a free connection, returns True. If
        the deadline passes in any other case, raises UpstreamTimeout. If the fill fails, raises the fill's error.

        If the fill requests the blob from another repository than `repo`, and the upstream does not respond for
        `SILENCE_SECONDS`, raises _NoResponse."""
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
                    # One check is not enough: the fill may have waited for a free connection until just before the
                    # check, so that the upstream had no time to respond.
                    has_no_response = fill.awaits_other_repository(repo)
                    if had_no_response and has_no_response:
                        raise _NoResponse
                    had_no_response = has_no_response
        except TimeoutError:
            if fill.size and fill.is_queued:
                return True
            raise start_timeout_error(fill.digest) from None
