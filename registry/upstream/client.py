"""The far registry as a `UpstreamClient`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from registry.config import Upstream
from registry.memory_budget import MemoryBudget, ShareScope
from registry.mirror.upstream_client import BlobSink, UnconfirmedBlobUnknown, UnconfirmedManifestUnknown, UpstreamClient
from registry.upstream.api_client import MIB, ApiClient
from registry.upstream.blob_client import BlobClient
from registry.upstream.destinations import AddressPolicy, NetworkClassifier, classify_address, loggable_origin
from registry.upstream.endpoints import EndpointAttempt, UpstreamEndpoint
from registry.upstream.quota import RequestKind
from registry.upstream.requester import UpstreamRequester
from registry.upstream.transfer import BlobTransfer, SinkRaised, range_header
from registry.upstream.transport import OutboundProxies, TrustStore
from registry.upstream.upstream_lists import UpstreamLists
from registry.upstream.upstream_responses import ACCEPTED_MANIFESTS, DocumentParser, UpstreamResponse, parse_count
from storage.content import BLOB_TYPE, Descriptor, Manifest, Page, Span
from storage.errors import (
    BlobUnknown,
    ManifestUnknown,
    RegistryError,
    UpstreamUnavailable,
)
from storage.interface import Leases, UpstreamRecords
from storage.names import Digest, Reference, RepositoryName, Tag

MANIFEST_SIZE = 8 * MIB
"""Bytes of a manifest, the most."""
ANSWER_MEMORY = 56 * MIB
"""Bytes of an upstream's answers that are held at the same time, until they are read and stored."""

_NO_HEAD = frozenset({400, 405, 501})
_NO_SIZE = frozenset({400, 403, 405, 501})


class FetchEnded(Exception):
    """Carries an error past the endpoints that are left: the sink has had bytes, or raised it."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class HttpUpstreamClient:
    """As `registry.mirror.upstream_client.UpstreamClient` says."""

    def __init__(
        self,
        settings: Upstream,
        records: UpstreamRecords,
        turns: Leases,
        clock: Callable[[], float],
        network_of: NetworkClassifier,
    ) -> None:
        self.name = settings.name
        self.endpoints: Sequence[str] = tuple(dict.fromkeys(settings.endpoints))
        self.connections = settings.connections
        proxies, trust, gate = OutboundProxies(), TrustStore(settings.ca_file), AddressPolicy(settings.name, network_of)
        memory, self._parser = MemoryBudget(ANSWER_MEMORY, f"answers of {settings.name}"), DocumentParser()
        self._exchange = ApiClient(settings, proxies, trust, gate, memory)
        self._bodies = BlobClient(settings, proxies, trust, gate)
        self._asking = UpstreamRequester(settings, self._exchange, records, turns, clock)
        self._listing = UpstreamLists(settings.name, self._asking, self._parser, memory)

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        async def attempt(endpoint: UpstreamEndpoint, trial: EndpointAttempt) -> Descriptor:
            # An answer to HEAD has no body that shows whose it is, and what is here may hang on it.
            with suppress(UnconfirmedManifestUnknown):
                answer = await self._manifest(endpoint, trial, repo, "HEAD", reference)
                digest = reference if isinstance(reference, Digest) else answer.digest
                if answer.status not in _NO_HEAD and digest and answer.length and answer.media_type:
                    _check_same_digest(answer, digest, "manifest")
                    return Descriptor(answer.media_type, digest, answer.length)
            with ShareScope() as memory:
                answer = await self._manifest(endpoint, trial, repo, "GET", reference, memory)
                return (await self._parser.verified_manifest(answer, reference)).descriptor

        return await self._asking.first(attempt, repo, RequestKind.HEAD, anywhere=isinstance(reference, Digest))

    async def get_manifest(
        self, repo: RepositoryName, reference: Reference, memory: ShareScope | None = None
    ) -> Manifest:
        async def attempt(endpoint: UpstreamEndpoint, trial: EndpointAttempt) -> Manifest:
            answer = await self._manifest(endpoint, trial, repo, "GET", reference, memory)
            return await self._parser.verified_manifest(answer, reference)

        return await self._asking.first(attempt, repo, RequestKind.MANIFEST, anywhere=isinstance(reference, Digest))

    async def _manifest(
        self,
        endpoint: UpstreamEndpoint,
        trial: EndpointAttempt,
        repo: RepositoryName,
        method: str,
        reference: Reference,
        memory: ShareScope | None = None,
    ) -> UpstreamResponse:
        return await self._asking.ask(
            endpoint,
            trial,
            repo,
            RequestKind.HEAD if method == "HEAD" else RequestKind.MANIFEST,
            method,
            f"manifests/{reference}",
            ManifestUnknown(),
            headers={"Accept": ACCEPTED_MANIFESTS},
            most=MANIFEST_SIZE,
            accepted=_NO_HEAD if method == "HEAD" else (),
            memory=memory,
        )

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        async def attempt(endpoint: UpstreamEndpoint, trial: EndpointAttempt) -> Descriptor:
            return Descriptor(BLOB_TYPE, digest, await self._size(endpoint, trial, repo, digest))

        return await self._asking.first(attempt, repo, RequestKind.BLOB, anywhere=True)

    async def _size(
        self, endpoint: UpstreamEndpoint, trial: EndpointAttempt, repo: RepositoryName, digest: Digest
    ) -> int:
        path, unknown = f"blobs/{digest}", BlobUnknown()
        # An answer to HEAD has no body that shows whose it is, and "unknown" is remembered.
        with suppress(UnconfirmedBlobUnknown):
            answer = await self._asking.ask(
                endpoint, trial, repo, RequestKind.BLOB, "HEAD", path, unknown, accepted=_NO_SIZE
            )
            if answer.status == 200 and answer.length is not None:
                _check_same_digest(answer, digest, "blob")
                return answer.length
        # Addresses that redirects lead to may be signed for GET alone; and not all answer HEAD with a length.
        answer = await self._asking.ask(
            endpoint,
            trial,
            repo,
            RequestKind.BLOB,
            "GET",
            path,
            unknown,
            headers={"Range": "bytes=0-0"},
            content=False,
            accepted=(416,),
        )
        _check_same_digest(answer, digest, "blob")
        told = parse_count(answer.headers.get("content-range", "").rpartition("/")[2])
        size = answer.length if answer.status == 200 else told
        if size is None:
            raise UpstreamUnavailable(f"{loggable_origin(answer.url)} does not say how long the blob is")
        return size

    async def fetch_blob(
        self, repo: RepositoryName, digest: Digest, span: Span, sink: BlobSink, avoid: Collection[str] = ()
    ) -> None:
        wanted = range_header(span)
        asked = {"Range": wanted} if wanted else {}
        loop = asyncio.get_running_loop()

        async def attempt(endpoint: UpstreamEndpoint, trial: EndpointAttempt) -> None:
            # The endpoint lives once it answers; that this ends, long afterwards, is no news of it.
            transfer = BlobTransfer(endpoint.url, span, sink, trial, loop.call_soon_threadsafe)
            url = f"{endpoint.url}/v2/{repo}/blobs/{digest}"

            async def send(authorization: Mapping[str, str]) -> UpstreamResponse:
                return await self._bodies.fetch(transfer, url, {**asked, **authorization})

            try:
                await self._asking.send_authorized(endpoint, trial, repo, RequestKind.BLOB, send, BlobUnknown())
            except SinkRaised as raised:
                raise FetchEnded(raised.error) from None
            except RegistryError as error:
                if not transfer.begun:
                    raise
                raise FetchEnded(error) from None

        try:
            await self._asking.first(attempt, repo, RequestKind.BLOB, anywhere=True, avoid=avoid, seconds=None)
        except FetchEnded as ended:
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


def make_upstream_client(
    settings: Upstream,
    records: UpstreamRecords,
    turns: Leases,
    clock: Callable[[], float] = time.time,
    network_of: NetworkClassifier = classify_address,
) -> UpstreamClient:
    """The far registry that `settings` name. Contacts nobody and reads no file; of the environment it reads the
    proxies. `clock`: seconds since 1970. `network_of` tells in which network an address is."""
    return HttpUpstreamClient(settings, records, turns, clock, network_of)


def _check_same_digest(answer: UpstreamResponse, digest: Digest, what: str) -> None:
    if answer.digest and answer.digest.algorithm == digest.algorithm and answer.digest != digest:
        raise UpstreamUnavailable(f"{loggable_origin(answer.url)} answers with another {what} than the one asked for")
