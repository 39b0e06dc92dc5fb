"""Starts and finds the running fills of this process (`Fills`). A *fill* downloads one blob from one repository of an
upstream registry. Usually, one *shared* fill gets the blob for all repositories that contain it, and requests the blob
from one of them. If the upstream does not respond to the shared fill, a second fill of the blob gets it for the other
repositories. This *separate* fill requests the blob from one of these other repositories."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial as partial_function

from registry.mirror.fill.demand import ImagePull
from registry.mirror.fill.fill import Fill
from registry.mirror.fill.fill_context import FillContext
from registry.mirror.pass_through import PassThroughReader
from registry.single_flight import cancel_and_wait, server_stopping_error, start_detached
from storage.content import Descriptor
from storage.names import Digest, RepositoryName

_Key = tuple[Digest, int, bool]
"""Digest and size of a blob, and whether the fill is the separate fill."""


class Fills:
    """The running fills of this process. Each fill has its own task, and can outlive the requests that use the fill."""

    def __init__(self, context: FillContext) -> None:
        self._context = context
        self._fills: dict[_Key, tuple[Fill, asyncio.Task[None]]] = {}
        self._closed = False

    @contextmanager
    def requested_fill(
        self, repo: RepositoryName, digest: Digest, size: int, *, is_separate: bool = False
    ) -> Iterator[Fill]:
        """Yields the fill of a requested blob. Starts the fill if it is not running. Inside the `with` block, the fill
        counts the caller as a client. Awaits nothing, so the fill cannot end before the block begins. Raises
        UpstreamUnavailable if the server is stopping."""
        fill = self._find_or_start(repo, digest, size, is_separate=is_separate)
        with fill.demand.client():
            yield fill

    def start_prefetch(self, repo: RepositoryName, blob: Descriptor, pull: ImagePull) -> Fill:
        """Returns the fill of a blob that is prefetched for `pull`. Starts the fill if it is not running. If no client
        requests the blob, the fill ends when no pull that prefetches the blob is active. Raises UpstreamUnavailable if
        the server is stopping."""
        fill = self._find_or_start(repo, blob.digest, blob.size)
        fill.demand.pulls.add(pull)
        return fill

    async def open_pass_through(
        self, repo: RepositoryName, digest: Digest, size: int, span: tuple[int, int]
    ) -> PassThroughReader:
        """Returns a reader that downloads a blob for one client without storing the blob, for a disk that is too full.
        The caller must call the reader's `start`, and close the reader. `span`: offset of the first byte to read, and
        offset after the last byte. Raises UpstreamUnavailable if all endpoints (base URLs) of the upstream have
        recently sent corrupt bytes for the blob."""
        context = self._context
        return PassThroughReader(
            *(context.upstream, context.slots, context.to_upstream_name(repo), (digest, size), span),
            await context.bad_senders.find_avoided(repo, digest),
            context.pass_through_memory,
            on_corrupt=lambda endpoint: context.bad_senders.add(repo, digest, {endpoint}),
            on_fetched=partial_function(context.observer.on_fetched, "blob"),
        )

    def find_running(self, repo: RepositoryName, digest: Digest) -> Fill | None:
        """Returns a running fill that gets the blob for `repo`. Returns None if there is no such fill."""
        for fill, _ in self._fills.values():
            if fill.digest == digest and repo in fill.repositories and not fill.has_ended:
                return fill
        return None

    def list_running(self) -> list[Fill]:
        """Returns the running fills."""
        return [fill for fill, _ in self._fills.values()]

    async def aclose(self) -> None:
        """Cancels all fills, and prevents new fills. The bytes that have arrived stay."""
        self._closed = True
        await cancel_and_wait(task for _, task in self._fills.values())

    def _find_or_start(self, repo: RepositoryName, digest: Digest, size: int, *, is_separate: bool = False) -> Fill:
        """Returns the fill of a blob for `repo`. Starts the fill if it is not running. Adds `repo` to the fill's
        repositories. The first of these rules that applies determines the fill:

        - If `is_separate` is true: the separate fill.
        - If the shared fill is running and has a response: the shared fill.
        - If the separate fill is running and has a response: the separate fill.
        - If the separate fill is running and requests the blob from `repo`: the separate fill.
        - Otherwise: the shared fill."""
        shared, _ = self._fills.get((digest, size, False), (None, None))
        separate, _ = self._fills.get((digest, size, True), (None, None))
        if separate is not None and (shared is None or not shared.has_response_or_ended):
            is_separate = is_separate or separate.repo == repo or separate.has_response_or_ended
        fill = separate if is_separate else shared
        if fill is not None:
            fill.repositories.add(repo)
            return fill
        if self._closed:
            raise server_stopping_error()
        fill = Fill(self._context, repo, digest, size, is_separate=is_separate)
        self._context.observer.on_fill_started()
        key = (digest, size, is_separate)
        task = start_detached(self._run(fill, key))
        task.add_done_callback(lambda _: fill.ensure_ended())  # `run` is not called if the task is cancelled at once
        self._fills[key] = (fill, task)
        return fill

    async def _run(self, fill: Fill, key: _Key) -> None:
        """Runs a fill until it ends."""
        try:
            await fill.run()
        finally:
            del self._fills[key]
