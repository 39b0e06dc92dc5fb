"""The far registry as a `Source`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from registry.config import Upstream
from registry.memory import MemoryBudget, holding
from registry.mirror.source import BlobDoubtful, ManifestDoubtful, Sink, Source
from registry.upstream.addresses import place
from registry.upstream.answers import ACCEPT, Answer, as_count
from registry.upstream.asking import Asking
from registry.upstream.bodies import Bodies
from registry.upstream.endpoints import Endpoint, Trial
from registry.upstream.exchange import MIB, Exchange
from registry.upstream.holds import Kind
from registry.upstream.listing import Listing
from registry.upstream.networks import Gate, NetworkOf, network_of
from registry.upstream.parsing import Parser
from registry.upstream.proxies import Proxies
from registry.upstream.ranges import range_of
from registry.upstream.transfer import SinkRaised, Transfer
from registry.upstream.trust import Trust
from storage.content import BLOB_TYPE, Descriptor, Manifest, Page, Span
from storage.errors import (
    BlobUnknown,
    ManifestUnknown,
    RegistryError,
    UpstreamUnavailable,
)
from storage.interface import Records, Turns
from storage.names import Digest, Reference, RepositoryName, Tag

MANIFEST_SIZE = 8 * MIB
"""Bytes of a manifest, the most."""
MEMORY = 56 * MIB
"""Bytes of an upstream's answers that are held at the same time, until they are read and stored."""

_NO_HEAD = frozenset({400, 405, 501})
_NO_SIZE = frozenset({400, 403, 405, 501})


class Ended(Exception):
    """Carries an error past the endpoints that are left: the sink has had bytes, or raised it."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class FarRegistry:
    """As `registry.mirror.source.Source` says."""

    def __init__(
        self, settings: Upstream, records: Records, turns: Turns, clock: Callable[[], float], network_of: NetworkOf
    ) -> None:
        self.name = settings.name
        self.endpoints: Sequence[str] = tuple(dict.fromkeys(settings.endpoints))
        self.connections = settings.connections
        proxies, trust, gate = Proxies(), Trust(settings.ca_file), Gate(settings.name, network_of)
        memory, self._parser = MemoryBudget(MEMORY, f"answers of {settings.name}"), Parser()
        self._exchange = Exchange(settings, proxies, trust, gate, memory)
        self._bodies = Bodies(settings, proxies, trust, gate)
        self._asking = Asking(settings, self._exchange, records, turns, clock)
        self._listing = Listing(settings.name, self._asking, self._parser, memory)

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        async def attempt(endpoint: Endpoint, trial: Trial) -> Descriptor:
            # An answer to HEAD has no body that shows whose it is, and what is here may hang on it.
            with suppress(ManifestDoubtful):
                answer = await self._manifest(endpoint, trial, repo, "HEAD", reference)
                digest = reference if isinstance(reference, Digest) else answer.digest
                if answer.status not in _NO_HEAD and digest and answer.length and answer.media_type:
                    _compare(answer, digest, "manifest")
                    return Descriptor(answer.media_type, digest, answer.length)
            async with holding():
                answer = await self._manifest(endpoint, trial, repo, "GET", reference)
                return (await self._parser.checked(answer, reference)).descriptor

        return await self._asking.first(attempt, repo, Kind.HEAD, anywhere=isinstance(reference, Digest))

    async def get_manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        async def attempt(endpoint: Endpoint, trial: Trial) -> Manifest:
            answer = await self._manifest(endpoint, trial, repo, "GET", reference)
            return await self._parser.checked(answer, reference)

        return await self._asking.first(attempt, repo, Kind.MANIFEST, anywhere=isinstance(reference, Digest))

    async def _manifest(
        self, endpoint: Endpoint, trial: Trial, repo: RepositoryName, method: str, reference: Reference
    ) -> Answer:
        return await self._asking.ask(
            endpoint,
            trial,
            repo,
            Kind.HEAD if method == "HEAD" else Kind.MANIFEST,
            method,
            f"manifests/{reference}",
            ManifestUnknown(),
            headers={"Accept": ACCEPT},
            most=MANIFEST_SIZE,
            accepted=_NO_HEAD if method == "HEAD" else (),
        )

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        async def attempt(endpoint: Endpoint, trial: Trial) -> Descriptor:
            return Descriptor(BLOB_TYPE, digest, await self._size(endpoint, trial, repo, digest))

        return await self._asking.first(attempt, repo, Kind.BLOB, anywhere=True)

    async def _size(self, endpoint: Endpoint, trial: Trial, repo: RepositoryName, digest: Digest) -> int:
        path, unknown = f"blobs/{digest}", BlobUnknown()
        # An answer to HEAD has no body that shows whose it is, and "unknown" is remembered.
        with suppress(BlobDoubtful):
            answer = await self._asking.ask(endpoint, trial, repo, Kind.BLOB, "HEAD", path, unknown, accepted=_NO_SIZE)
            if answer.status == 200 and answer.length is not None:
                _compare(answer, digest, "blob")
                return answer.length
        # Addresses that redirects lead to may be signed for GET alone; and not all answer HEAD with a length.
        answer = await self._asking.ask(
            endpoint,
            trial,
            repo,
            Kind.BLOB,
            "GET",
            path,
            unknown,
            headers={"Range": "bytes=0-0"},
            content=False,
            accepted=(416,),
        )
        _compare(answer, digest, "blob")
        told = as_count(answer.headers.get("content-range", "").rpartition("/")[2])
        size = answer.length if answer.status == 200 else told
        if size is None:
            raise UpstreamUnavailable(f"{place(answer.url)} does not say how long the blob is")
        return size

    async def fetch_blob(
        self, repo: RepositoryName, digest: Digest, span: Span, sink: Sink, avoid: Collection[str] = ()
    ) -> None:
        wanted = range_of(span)
        asked = {"Range": wanted} if wanted else {}
        loop = asyncio.get_running_loop()

        async def attempt(endpoint: Endpoint, trial: Trial) -> None:
            # The endpoint lives once it answers; that this ends, long afterwards, is no news of it.
            transfer = Transfer(endpoint.url, span, sink, trial, loop.call_soon_threadsafe)
            url = f"{endpoint.url}/v2/{repo}/blobs/{digest}"

            async def send(authorization: Mapping[str, str]) -> Answer:
                return await self._bodies.fetch(transfer, url, {**asked, **authorization})

            try:
                await self._asking.admitted(endpoint, trial, repo, Kind.BLOB, send, BlobUnknown())
            except SinkRaised as raised:
                raise Ended(raised.error) from None
            except RegistryError as error:
                if not transfer.begun:
                    raise
                raise Ended(error) from None

        try:
            await self._asking.first(attempt, repo, Kind.BLOB, anywhere=True, avoid=avoid, seconds=None)
        except Ended as ended:
            raise ended.error from None

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        return await self._listing.tags(repo, after, limit)

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        return await self._listing.referrers(repo, subject, artifact_type, after, limit)

    def exhausted(self) -> bool:
        return self._asking.allowances.exhausted()

    async def aclose(self) -> None:
        """Ends what is under way. Idempotent."""
        self._bodies.close()
        await self._listing.aclose()
        await self._asking.aclose()
        await self._exchange.aclose()


def make_source(
    settings: Upstream,
    records: Records,
    turns: Turns,
    clock: Callable[[], float] = time.time,
    network_of: NetworkOf = network_of,
) -> Source:
    """The far registry that `settings` name. Contacts nobody and reads no file; of the environment it reads the
    proxies. `clock`: seconds since 1970. `network_of` tells in which network an address is."""
    return FarRegistry(settings, records, turns, clock, network_of)


def _compare(answer: Answer, digest: Digest, what: str) -> None:
    if answer.digest and answer.digest.algorithm == digest.algorithm and answer.digest != digest:
        raise UpstreamUnavailable(f"{place(answer.url)} answers with another {what} than the one asked for")
