"""Downloads one blob from an upstream registry for any number of readers in several processes (`Fill`).

A *fill* is the work of one process to get one blob. The bytes are written into a *partial blob*, a file that all
processes can read. Each process that has readers for a blob has a fill of the blob. Only one of these fills
downloads: it is the *owner* of the partial blob. The fills of the other processes are its *followers*: they wait for
the bytes. If the owner dies, a follower becomes the owner and downloads the bytes that are still missing. A fill
continues after the request that started it has ended.

Usually a process uses one fill of a blob, the *shared* fill, for all repositories of the upstream. The owner of the
partial blob requests the bytes from one of these repositories. If the upstream does not respond, the process uses a
second fill, the *separate* fill, for the other repositories. The separate fill has a second partial blob. The owner of
this partial blob requests the bytes from one of the other repositories. Until the upstream responds, at most one
request is running for each of the two partial blobs, so at most two are running in all processes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from contextlib import suppress
from functools import partial as partial_function
from typing import Final

from registry.mirror.fill.demand import ClientsChanged, Demand, run_until_change
from registry.mirror.fill.download import Download, NoClients
from registry.mirror.fill.fill_context import FillContext
from registry.mirror.fill.reader_file import ReaderFile
from registry.mirror.fill.retry import decode_failure, encode_failure
from registry.mirror.upstream_client import BlobLengthWrong, UnconfirmedBlobUnknown
from registry.single_flight import cancel_and_wait, server_stopping_error
from storage.errors import (
    BlobUnknown,
    DigestInvalid,
    PartialBlobLost,
    RegistryError,
    StorageFailed,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from storage.names import Digest, RepositoryName
from storage.partials import Partial, discard_if_nearly_empty

log = logging.getLogger("registry.mirror")

READER_POLL_SECONDS: Final = 0.05
"""Longest time that a reader waits, after the owner has disappeared, before it tries to read from a new owner."""
FOLLOWER_PAUSE_SECONDS: Final = 0.01
"""Time between two attempts of a follower to become the owner, after the owner has disappeared."""
RESPONSE_POLL_SECONDS: Final = 0.01
"""Time between two checks in `_signal_response` whether the upstream has started to send to the owner."""
MAX_LOST_OWNERS: Final = 40
"""Largest number of owners that can disappear, one after another, before a follower gives up."""


class StoredByAnotherFill(Exception):
    """The fill has ended because another fill has stored the blob. The reader's file does not have the bytes."""


class Fill:
    """The fill of one blob in this process. `repo`: the repository from which the blob is requested at the upstream.
    `size`: size of the blob in bytes. `repositories`: the repositories to which the complete blob is added, including
    `repo`; the caller has checked that each of these repositories may serve the blob. `demand`: who needs the blob.
    `error`: why the fill failed; None while it is running and after it has succeeded. `is_separate`: whether this is
    the separate fill of the blob."""

    def __init__(
        self, context: FillContext, repo: RepositoryName, digest: Digest, size: int, *, is_separate: bool = False
    ) -> None:
        self.repo = repo
        self.digest = digest
        self.size = size
        self.repositories = {repo}
        self.demand = Demand()
        """The fill is *unattended* (`is_unattended`) if a client has requested the blob, and all clients have left."""
        self.error: RegistryError | None = None
        self._context = context
        self._source = context.upstream.name
        """The argument `source` of `Partials.claim`. The fills of a blob with the same source share a partial blob."""
        if is_separate:
            self._source += "@separate"
        self._partial: Partial | None = None
        """The partial blob that the bytes are written to; None before the first `_claim`. Another partial blob may
        replace it if `_must_keep_partial` is False."""
        self._verified_partial: Partial | None = None
        """The partial blob that has become the stored blob. None if the fill is running, if the fill has failed, or if
        the stored blob comes from another partial blob."""
        self._reader_files: set[ReaderFile] = set()
        """The open files of the readers."""
        self._response_or_end = asyncio.Event()
        """Set when the upstream has started to send the blob to any process, or when the fill has ended."""
        self._ended = asyncio.Event()
        self._owner_change_count = 0
        """How often this fill has noticed that the owner of the partial blob may have changed."""
        self._owner_change_event = asyncio.Event()
        """Set when `_owner_change_count` grows, and then replaced by a new event. Also set when the fill ends."""

    @property
    def has_ended(self) -> bool:
        """Whether the fill has ended, with success or with an error."""
        return self._ended.is_set()

    @property
    def has_response_or_ended(self) -> bool:
        """Whether the upstream has started to send the blob to any process, or the fill has ended."""
        return self._response_or_end.is_set()

    @property
    def _must_keep_partial(self) -> bool:
        """Whether readers may have got bytes of the partial blob. The fill must then not replace the partial blob,
        because one response must not mix the bytes of two partial blobs. Once the upstream has started to send, every
        reader may have got bytes. Before that, a reader may have got bytes that an earlier owner stored."""
        is_read = any(file.may_have_been_read and file.partial is self._partial for file in self._reader_files)
        return is_read or self.has_response_or_ended

    def open_file(self) -> ReaderFile:
        """Opens the file of the partial blob for one reader. The reader closes the file. Call this method right after
        `wait_for_response` has returned True, or while `is_queued` is True. Raises TooManyOpenFiles, StorageFailed."""
        assert self._partial is not None
        return ReaderFile(self._partial, self._reader_files)

    @property
    def is_queued(self) -> bool:
        """Whether the owner, in this or another process, is still waiting for a free connection to the upstream. Raises
        StorageFailed."""
        return not self.has_ended and self._partial is not None and not self._partial.has_upstream_request

    def awaits_other_repository(self, repo: RepositoryName) -> bool:
        """Returns True if the owner, in this or another process, has requested the blob, the upstream has not responded
        yet, and none of the requests was to `repo`. Raises StorageFailed."""
        partial = self._partial
        if partial is None or self.has_response_or_ended or not partial.has_upstream_request:
            return False
        return not partial.has_upstream_request_to(self._context.to_upstream_name(repo))

    async def wait_for_response(self) -> bool:
        """Waits until the upstream starts to send, and returns True. Returns False if the fill has ended and the blob
        is stored. If the fill has failed, raises its error.

        If the partial blob was just committed or deleted, waits until the fill has ended. The partial blob may have
        been deleted because its bytes are wrong. The caller then gets the fill's error before it sends a byte."""
        await self._response_or_end.wait()
        if self._partial is not None and not self.has_ended and self._partial.has_ended:
            await self._ended.wait()
        if self.error is not None:
            raise self.error
        return not self.has_ended

    async def wait_until_stored(self) -> None:
        """Waits until the fill has ended and the blob is stored. If the fill has failed, raises its error."""
        await self._ended.wait()
        if self.error is not None:
            raise self.error

    async def wait_until_requested(self) -> None:
        """Waits until a client requests the blob, or until the fill ends. Raises nothing."""
        waiting_tasks = [asyncio.create_task(event.wait()) for event in (self.demand.requested, self._ended)]
        try:
            await asyncio.wait(waiting_tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_and_wait(waiting_tasks)

    async def wait_for_byte(self, offset: int, file: ReaderFile) -> int:
        """Waits until the byte at `offset` is in `file`, the file of a reader of this fill. Returns the offset of the
        first missing byte after it. If `offset` is equal to `size`, waits until the digest of the file is verified and
        the blob is stored, and returns `size`.

        If the fill fails, raises its error. If the partial blob was replaced after the reader had got bytes of it,
        raises PartialBlobLost. If the blob was stored by another fill, raises StoredByAnotherFill."""
        with self.demand.waiting(offset):
            while not self.has_ended:
                partial, change_count = file.partial, self._owner_change_count
                if partial is not self._partial:  # the fill has a new partial blob, but this reader has the old file
                    raise PartialBlobLost
                try:
                    end = await partial.wait(offset)
                except PartialBlobLost:
                    await self._wait_for_owner(change_count)
                except DigestInvalid:
                    await self._ended.wait()  # the fill is about to end with its error, which is raised below
                else:
                    if file.partial is partial:  # otherwise the file was replaced just now, and may not have the byte
                        file.may_have_been_read = True
                        return end
        if self.error is not None:
            raise self.error
        if file.partial is self._verified_partial:
            return self.size
        raise StoredByAnotherFill

    async def run(self) -> None:
        """Runs the fill to its end, and sets `error` if it fails. Raises only CancelledError. After a cancellation, the
        stored bytes are kept for the next fill of the blob. After an error, they are deleted if they are few."""
        early_stop_error: RegistryError = server_stopping_error()
        error: RegistryError | None = early_stop_error
        try:
            try:
                await self._run()
                error = None
            except NoClients:
                error = early_stop_error = PartialBlobLost(
                    "the download was stopped because no client waited for the blob; try again"
                )
            except BlobUnknown as unknown:
                error = unknown
                if not isinstance(unknown, UnconfirmedBlobUnknown):
                    with suppress(RegistryError):
                        await self._context.negative_cache.add(self.repo, self.digest)
            except RegistryError as failure:
                error = failure
                await self._tell_followers(failure)
            except Exception:
                log.exception("the download of %s of %s failed", self.digest, self.repo)
                error = UpstreamUnavailable("the blob could not be fetched; the server's log says why")
            if error is not None and self._partial is not None:
                await discard_if_nearly_empty(self._partial)
        finally:
            self._end(error, is_abandoned=error is early_stop_error)

    async def _tell_followers(self, failure: RegistryError) -> None:
        """Stores the failure for the followers in other processes, so that they fail as well and do not repeat the
        download. If the upstream has not started to send, stores only timeouts. Does nothing if this fill is not the
        owner."""
        partial = self._partial
        if (
            partial is None
            or not partial.is_owner
            or not (self._response_or_end.is_set() or isinstance(failure, UpstreamTimeout))
        ):
            return
        if (reason := encode_failure(self.repo, failure)) is not None:
            await partial.report_failure(reason)

    def ensure_ended(self) -> None:
        """Ends the fill with an error, if its task was cancelled before `run` was started."""
        if not self.has_ended:
            self._end(server_stopping_error(), is_abandoned=True)

    def _end(self, error: RegistryError | None, *, is_abandoned: bool) -> None:
        """Sets the result of the fill, wakes everything that waits for the fill, and closes the partial blob.
        `is_abandoned`: whether no client of this process needs the blob, or the server stops."""
        self.error = error
        self._context.observer.on_fill_ended(error, is_abandoned=is_abandoned)
        self._ended.set()
        self._response_or_end.set()
        self._owner_change_event.set()
        if self._partial is not None:
            self._partial.close()

    async def _run(self) -> None:
        """Becomes the owner and downloads the blob, or follows the owner until the blob is stored. If the owner
        disappears, tries again to become the owner. Raises the error that ends the fill."""
        partial = await self._claim()
        is_owner, lost_owners = partial.is_owner, 0
        while not is_owner:
            if not self.demand.has_clients:  # a follower without clients is not needed
                raise NoClients
            failures_before = partial.owner_failures  # the number of failures, and the reason of the last one
            partial.add_waiter()  # tells the owner, in another process, that a client waits for the blob
            try:
                is_stored = await self._follow(partial)
            except ClientsChanged:  # the loop checks whether other clients have come since
                continue
            if is_stored:  # otherwise the owner has stopped
                self._verified_partial = partial
                return await self._mount_in(self.repositories)
            failures = partial.owner_failures
            if failures != failures_before and (failure := decode_failure(self.repo, failures.reason)):
                raise failure
            is_owner = partial.take_ownership()
            self._note_owner_change()
            if not is_owner:
                lost_owners += 1
                if lost_owners > MAX_LOST_OWNERS:
                    raise PartialBlobLost
                await asyncio.sleep(FOLLOWER_PAUSE_SECONDS)
                if not self._must_keep_partial:  # `partial` may have been deleted: claims the one that replaces it
                    partial = await self._claim()
                    is_owner = partial.is_owner
        return await self._download(partial)

    async def _claim(self) -> Partial:
        """Waits for a permit, and then claims the partial blob (`Partials.claim`). Gives its file to the readers that
        have got no bytes yet, and closes the handle to the earlier partial blob. Raises NoClients if the fill is
        unattended after the wait."""
        async with self._context.claim_permits:
            if self.demand.is_unattended:
                raise NoClients
            partial = await self._context.partials.claim(self.digest, self.size, self._source)
        for file in self._reader_files:
            file.switch_to_partial(partial)
        if self._partial is not None:
            self._partial.close()
        self._partial = partial
        return partial

    async def _follow(self, partial: Partial) -> bool:
        """Waits while the owner in another process downloads the blob. Returns True when the blob is stored, and False
        if the owner has stopped before that. Raises ClientsChanged when the clients of this process have left."""
        response_signal = asyncio.create_task(self._signal_response(partial, partial.missing()))
        try:
            await run_until_change(self.demand, partial.wait(self.size))
        except PartialBlobLost:
            return False
        finally:
            await cancel_and_wait([response_signal])
        return True

    async def _signal_response(self, partial: Partial, gaps: list[tuple[int, int]]) -> None:
        """Sets `_response_or_end` when the upstream has started to send to the owner. If all bytes are missing, sets it
        when the first one is stored. If none is missing, sets it when the blob is stored. `gaps`: the ranges
        of bytes that were missing when this fill began to follow."""
        if gaps in ([], [(0, self.size)]):
            await partial.wait(0 if gaps else self.size)
        else:
            # The bytes that are stored may come from an earlier owner. New bytes show that the upstream has responded,
            # even if the owner could not record the response.
            while not partial.has_response and partial.missing() == gaps:  # noqa: ASYNC110  another process changes them
                await asyncio.sleep(RESPONSE_POLL_SECONDS)
        self._response_or_end.set()

    async def _download(self, partial: Partial) -> None:
        """Downloads the missing bytes as the owner, verifies the digest, and makes the bytes a blob of all
        `repositories`."""
        context = self._context
        if not self._must_keep_partial and await self._mount_if_stored():
            if partial.missing() in ([], [(0, self.size)]):
                # No reader of this process needs `partial`: `wait_for_byte` will raise StoredByAnotherFill. A partial
                # blob with some of its bytes is kept, because a reader in another process may have begun to read it.
                await partial.discard()
            return
        # An earlier owner may have learned that the upstream does not have the blob.
        if self._owner_change_count and await context.negative_cache.has(self.repo, self.digest):
            raise BlobUnknown
        if self.has_response_or_ended:
            # This fill saw the response begin as a follower. A new owner must record it again (`Partial.has_response`).
            self._on_response(partial)
        download = Download(
            context.upstream,
            context.slots,
            context.to_upstream_name(self.repo),
            partial,
            self.demand,
            await context.bad_senders.find_avoided(self.repo, self.digest),
            partial_function(self._on_response, partial),
            on_fetched=partial_function(context.observer.on_fetched, "blob"),
            list_repos=lambda: sorted(map(context.to_upstream_name, self.repositories)),
            has_response=self._must_keep_partial,
            stall_timeout=context.stall_timeout,
        )
        while True:
            try:
                await download.run()
                break
            except NoClients:
                # If a client has requested the blob in the meantime, or a pull needs it again, the download continues.
                if not self.demand.needs_blob():
                    raise
            except BlobLengthWrong:
                # The stored bytes may be an error page. But this is not recorded as a fault of the URL that sent them,
                # because `size` may be wrong: it may come from a manifest.
                await partial.discard()
                raise
        await partial.commit(self.repo, lambda: context.bad_senders.add(self.repo, self.digest, download.senders))
        self._verified_partial = partial
        await self._mount_in(self.repositories - {self.repo})

    def _on_response(self, partial: Partial) -> None:
        """Records, for this and the other processes, that the upstream has started to send."""
        self._response_or_end.set()
        with suppress(StorageFailed):  # the followers then notice the new bytes instead
            partial.mark_response()

    async def _mount_if_stored(self) -> bool:
        """If another process stored the blob before this process became the owner, adds the blob to all `repositories`
        and returns True. Otherwise returns False."""
        if not await self._context.entitlement.mount(self.repo, self.digest, self.size):
            return False
        await self._mount_in(self.repositories - {self.repo})
        return True

    async def _mount_in(self, repositories: Collection[RepositoryName]) -> None:
        """Adds the stored blob to each of `repositories`."""
        for repo in list(repositories):
            await self._context.entitlement.mount(repo, self.digest, self.size)

    def _note_owner_change(self) -> None:
        """Wakes the readers that wait for a new owner."""
        self._owner_change_count += 1
        self._owner_change_event.set()
        self._owner_change_event = asyncio.Event()

    async def _wait_for_owner(self, previous_count: int) -> None:
        """Waits until `_owner_change_count` differs from its earlier value `previous_count`. Waits at most
        `READER_POLL_SECONDS`, because this process does not notice when another process becomes the owner."""
        if self._owner_change_count == previous_count and not self.has_ended:
            with suppress(TimeoutError):
                async with asyncio.timeout(READER_POLL_SECONDS):
                    await self._owner_change_event.wait()
