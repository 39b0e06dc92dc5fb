"""`HttpUpstreamClient`: an upstream registry over HTTP, as an `UpstreamClient`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from registry.config import Upstream
from registry.memory_budget import MemoryBudget, ShareScope
from registry.mirror.upstream_client import BlobSink, UnconfirmedBlobUnknown, UnconfirmedManifestUnknown, UpstreamClient
from registry.upstream.api_client import ApiClient
from registry.upstream.blob_client import BlobClient
from registry.upstream.destinations import AddressPolicy, NetworkClassifier, classify_address, loggable_origin
from registry.upstream.endpoints import EndpointAttempt, UpstreamEndpoint
from registry.upstream.quota import RequestKind
from registry.upstream.request_limits import MIB
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
from storage.leases import Leases
from storage.names import Digest, Reference, RepositoryName, Tag
from storage.upstream_records import UpstreamRecords

MANIFEST_SIZE = 8 * MIB
"""Largest manifest, in bytes."""
ANSWER_MEMORY = 56 * MIB
"""Bytes of one upstream's responses that are in memory at a time, until they are parsed and stored."""

_NO_HEAD = frozenset({400, 405, 501})
_NO_SIZE = frozenset({400, 403, 405, 501})


class FetchEnded(Exception):
    """Carries an error past the remaining endpoints: the sink raised it, or has received bytes."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class HttpUpstreamClient:
    """See `registry.mirror.upstream_client.UpstreamClient`."""

    def __init__(
        self,
        settings: Upstream,
        records: UpstreamRecords,
        leases: Leases,
        clock: Callable[[], float],
        classify: NetworkClassifier,
    ) -> None:
        self.name = settings.name
        self.endpoints: Sequence[str] = tuple(dict.fromkeys(settings.endpoints))
        self.connections = settings.connections
        proxies, trust, policy = OutboundProxies(), TrustStore(settings.ca_file), AddressPolicy(settings.name, classify)
        memory, self._parser = MemoryBudget(ANSWER_MEMORY, f"answers of {settings.name}"), DocumentParser()
        self._api = ApiClient(settings, proxies, trust, policy, memory)
        self._blobs = BlobClient(settings, proxies, trust, policy)
        self._requester = UpstreamRequester(settings, self._api, records, leases, clock)
        self._lists = UpstreamLists(settings.name, self._requester, self._parser, memory)

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        async def operation(endpoint: UpstreamEndpoint, attempt: EndpointAttempt) -> Descriptor:
            # A response to HEAD has no body that shows who sent it, and a cached tag may be dropped because of it.
            with suppress(UnconfirmedManifestUnknown):
                answer = await self._manifest(endpoint, attempt, repo, "HEAD", reference)
                digest = reference if isinstance(reference, Digest) else answer.digest
                if answer.status not in _NO_HEAD and digest and answer.length and answer.media_type:
                    _check_same_digest(answer, digest, "manifest")
                    return Descriptor(answer.media_type, digest, answer.length)
            with ShareScope() as memory:
                answer = await self._manifest(endpoint, attempt, repo, "GET", reference, memory)
                return (await self._parser.verified_manifest(answer, reference)).descriptor

        return await self._requester.try_endpoints(
            operation, repo, RequestKind.HEAD, any_endpoint=isinstance(reference, Digest)
        )

    async def get_manifest(
        self, repo: RepositoryName, reference: Reference, memory: ShareScope | None = None
    ) -> Manifest:
        async def operation(endpoint: UpstreamEndpoint, attempt: EndpointAttempt) -> Manifest:
            answer = await self._manifest(endpoint, attempt, repo, "GET", reference, memory)
            return await self._parser.verified_manifest(answer, reference)

        return await self._requester.try_endpoints(
            operation, repo, RequestKind.MANIFEST, any_endpoint=isinstance(reference, Digest)
        )

    async def _manifest(
        self,
        endpoint: UpstreamEndpoint,
        attempt: EndpointAttempt,
        repo: RepositoryName,
        method: str,
        reference: Reference,
        memory: ShareScope | None = None,
    ) -> UpstreamResponse:
        return await self._requester.request(
            endpoint,
            attempt,
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
        async def operation(endpoint: UpstreamEndpoint, attempt: EndpointAttempt) -> Descriptor:
            return Descriptor(BLOB_TYPE, digest, await self._size(endpoint, attempt, repo, digest))

        return await self._requester.try_endpoints(operation, repo, RequestKind.BLOB, any_endpoint=True)

    async def _size(
        self, endpoint: UpstreamEndpoint, attempt: EndpointAttempt, repo: RepositoryName, digest: Digest
    ) -> int:
        path, unknown = f"blobs/{digest}", BlobUnknown()
        # A response to HEAD has no body that shows who sent it, and "unknown" is cached.
        with suppress(UnconfirmedBlobUnknown):
            answer = await self._requester.request(
                endpoint, attempt, repo, RequestKind.BLOB, "HEAD", path, unknown, accepted=_NO_SIZE
            )
            if answer.status == 200 and answer.length is not None:
                _check_same_digest(answer, digest, "blob")
                return answer.length
        # A redirect's URL may be signed for GET only, and not every server sends a length with HEAD.
        answer = await self._requester.request(
            endpoint,
            attempt,
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
        total = parse_count(answer.headers.get("content-range", "").rpartition("/")[2])
        size = answer.length if answer.status == 200 else total
        if size is None:
            raise UpstreamUnavailable(f"{loggable_origin(answer.url)} does not say how long the blob is")
        return size

    async def fetch_blob(
        self, repo: RepositoryName, digest: Digest, span: Span, sink: BlobSink, avoid: Collection[str] = ()
    ) -> None:
        wanted = range_header(span)
        asked = {"Range": wanted} if wanted else {}
        loop = asyncio.get_running_loop()

        async def operation(endpoint: UpstreamEndpoint, attempt: EndpointAttempt) -> None:
            # The endpoint counts as alive once it responds. The end of a long transfer says nothing about it.
            transfer = BlobTransfer(endpoint.url, span, sink, attempt, loop.call_soon_threadsafe)
            url = f"{endpoint.url}/v2/{repo}/blobs/{digest}"

            async def send(authorization: Mapping[str, str]) -> UpstreamResponse:
                return await self._blobs.fetch(transfer, url, {**asked, **authorization})

            try:
                await self._requester.send_authorized(endpoint, attempt, repo, RequestKind.BLOB, send, BlobUnknown())
            except SinkRaised as raised:
                raise FetchEnded(raised.error) from None
            except RegistryError as error:
                if not transfer.begun:
                    raise
                raise FetchEnded(error) from None

        try:
            await self._requester.try_endpoints(
                operation, repo, RequestKind.BLOB, any_endpoint=True, avoid=avoid, seconds=None
            )
        except FetchEnded as ended:
            raise ended.error from None

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        return await self._lists.tags(repo, after, limit)

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        return await self._lists.referrers(repo, subject, artifact_type, after, limit)

    def is_exhausted(self) -> bool:
        return self._requester.allowances.is_exhausted()

    async def aclose(self) -> None:
        """Cancels running requests and closes the connections. Idempotent."""
        self._blobs.close()
        await self._lists.aclose()
        await self._requester.aclose()
        await self._api.aclose()


def make_upstream_client(
    settings: Upstream,
    records: UpstreamRecords,
    leases: Leases,
    clock: Callable[[], float] = time.time,
    classify: NetworkClassifier = classify_address,
) -> UpstreamClient:
    """Returns the client for the upstream in `settings`. Contacts nobody and reads no file; reads the proxies from the
    environment. `clock`: seconds since 1970. `classify` returns the network of an address."""
    return HttpUpstreamClient(settings, records, leases, clock, classify)


def _check_same_digest(answer: UpstreamResponse, digest: Digest, what: str) -> None:
    if answer.digest and answer.digest.algorithm == digest.algorithm and answer.digest != digest:
        raise UpstreamUnavailable(f"{loggable_origin(answer.url)} answers with another {what} than the one asked for")
