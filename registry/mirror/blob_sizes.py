"""Asks an upstream registry for the sizes of blobs, and remembers the answers for a short time (`BlobSizes`).

The mirror usually takes the size of a blob from a manifest. Anyone who can push to the upstream's repository can push a
manifest that states a wrong size. The mirror would then refuse the blob, because its size differs from the stated size.
So the mirror asks the upstream for the size in two cases:

- The manifests state different sizes for the blob.
- The upstream sends a blob of another size than expected.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from registry.mirror.freshness import NegativeCache
from registry.mirror.upstream_client import UnconfirmedBlobUnknown, UpstreamClient
from registry.single_flight import SingleFlight
from storage.errors import BlobUnknown, UpstreamTimeout
from storage.leases import Leases
from storage.names import Digest, RepositoryName

SIZE_REMEMBERED_SECONDS: Final = 60.0
"""How long the mirror uses a remembered size. The time is short, because the size may be wrong: an error page with
status 200 also has a size."""
MAX_REMEMBERED_SIZES: Final = 1_000
"""Largest number of sizes that a process remembers for one upstream. They need less than 1 MiB of memory."""


class BlobSizes:
    """The sizes that one upstream states for its blobs."""

    def __init__(
        self,
        upstream: UpstreamClient,
        leases: Leases,
        negative_cache: NegativeCache,
        to_upstream_name: Callable[[RepositoryName], RepositoryName],
        monotonic: Callable[[], float],
    ) -> None:
        """`leases`: locks that work across processes. `negative_cache`: says which blobs the upstream does not have.
        `to_upstream_name`: returns the name that a repository has at the upstream. `monotonic`: returns seconds of a
        monotonic clock."""
        self._upstream = upstream
        self._leases = leases
        self._negative_cache = negative_cache
        self._to_upstream_name = to_upstream_name
        self._monotonic = monotonic
        self._requests: SingleFlight[int] = SingleFlight()
        """The running requests. Calls for the same blob of the same repository share one request."""
        self._remembered: dict[tuple[RepositoryName, Digest], tuple[int, float]] = {}
        """The remembered sizes, by repository and blob. Each has the time when the upstream stated it. The oldest comes
        first."""

    async def ask(self, repo: RepositoryName, digest: Digest, deadline: float) -> int:
        """Asks the upstream for the size in bytes of a blob of `repo`. `deadline`: in seconds of the event loop's
        clock. Raises BlobUnknown, UpstreamTimeout (the deadline has passed), and the errors of the upstream client."""
        try:
            async with asyncio.timeout_at(deadline):
                return await self._requests.run((repo, digest), lambda: self._ask_under_lease(repo, digest))
        except TimeoutError:
            raise start_timeout_error(digest) from None

    async def ask_and_remember(self, repo: RepositoryName, digest: Digest, deadline: float) -> int:
        """Asks for the size as `ask` does, and remembers the size. Call this only in the two cases that the module's
        docstring names, because the mirror prefers a remembered size to the sizes in the manifests of `repo`."""
        size = await self.ask(repo, digest, deadline)
        self._remembered.pop((repo, digest), None)
        self._remembered[repo, digest] = size, self._monotonic()
        if len(self._remembered) > MAX_REMEMBERED_SIZES:
            del self._remembered[next(iter(self._remembered))]
        return size

    def remembered_size(self, repo: RepositoryName, digest: Digest) -> int | None:
        """Returns the size of a blob of `repo` if `ask_and_remember` has returned it in the last
        `SIZE_REMEMBERED_SECONDS`. Otherwise returns None."""
        size, asked_at = self._remembered.get((repo, digest), (None, 0.0))
        return size if self._monotonic() - asked_at < SIZE_REMEMBERED_SECONDS else None

    async def aclose(self) -> None:
        """Cancels the running requests to the upstream."""
        await self._requests.aclose()

    async def _ask_under_lease(self, repo: RepositoryName, digest: Digest) -> int:
        """Asks the upstream for the size. A lease lets only one process at a time ask about a blob. Raises:

        - BlobUnknown if the upstream does not have the blob. Adds the blob to the negative cache.
        - UnconfirmedBlobUnknown, a subclass, if a proxy or firewall possibly sent the answer, or if the login failed.
          Does not change the negative cache.
        - the other errors of the upstream client."""
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


def start_timeout_error(digest: Digest) -> UpstreamTimeout:
    """The *start timeout* is the longest time that a request may wait for the first byte of a blob. Returns the error
    for a client whose request has exceeded the start timeout."""
    return UpstreamTimeout(f"the upstream did not start to send {digest} in time; try again in a moment")
