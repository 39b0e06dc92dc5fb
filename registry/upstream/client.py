"""The HTTP client for one upstream registry (`HttpUpstreamClient`), which implements `UpstreamClient`.

It reads manifests, blobs and lists. Small requests go through `UpstreamRequester`, the bytes of blobs through
`BlobClient`.
"""

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
from registry.upstream.rate_limits import RequestKind
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

MAX_MANIFEST_BYTES = 8 * MIB
"""Largest manifest."""
RESPONSE_MEMORY_BYTES = 56 * MIB
"""Memory for all responses of one upstream that are not yet parsed and stored."""

_HEAD_UNSUPPORTED = frozenset({400, 405, 501})
"""Statuses with which a registry may refuse HEAD of a manifest. A GET follows."""
_BLOB_HEAD_UNSUPPORTED = frozenset({400, 403, 405, 501})
"""Statuses with which a registry, or the storage it redirects to, may refuse HEAD of a blob. A GET follows."""


class FetchEnded(Exception):
    """Carries an error out of `try_endpoints` without trying the remaining endpoints, because the sink (the receiver of
    the bytes) raised the error, or has already received bytes."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class HttpUpstreamClient:
    """Requests manifests, blobs and lists of one upstream. `registry.mirror.upstream_client.UpstreamClient` describes
    the methods."""

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
        memory, self._parser = MemoryBudget(RESPONSE_MEMORY_BYTES, f"answers of {settings.name}"), DocumentParser()
        self._api = ApiClient(settings, proxies, trust, policy, memory)
        self._blobs = BlobClient(settings, proxies, trust, policy)
        self._requester = UpstreamRequester(settings, self._api, records, leases, clock)
        self._lists = UpstreamLists(settings.name, self._requester, self._parser, memory)

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        """Returns the descriptor of a manifest by a HEAD request, or by a GET if HEAD does not show it. Raises
        ManifestUnknown, and the errors of a failed upstream request."""

        async def operation(endpoint: UpstreamEndpoint, attempt: EndpointAttempt) -> Descriptor:
            # A 404 to HEAD has no body that shows whether the registry itself sent it, and the mirror deletes a cached
            # tag because of a 404. Therefore a GET follows an unconfirmed "not found".
            with suppress(UnconfirmedManifestUnknown):
                response = await self._request_manifest(endpoint, attempt, repo, "HEAD", reference)
                digest = reference if isinstance(reference, Digest) else response.digest
                if response.status not in _HEAD_UNSUPPORTED and digest and response.length and response.media_type:
                    _check_same_digest(response, digest, "manifest")
                    return Descriptor(response.media_type, digest, response.length)
            with ShareScope() as memory:
                response = await self._request_manifest(endpoint, attempt, repo, "GET", reference, memory)
                return (await self._parser.verified_manifest(response, reference)).descriptor

        return await self._requester.try_endpoints(
            operation, repo, RequestKind.HEAD, any_endpoint=isinstance(reference, Digest)
        )

    async def get_manifest(
        self, repo: RepositoryName, reference: Reference, memory: ShareScope | None = None
    ) -> Manifest:
        """Returns a manifest whose bytes match its digest. A large body counts against the memory budget until the
        block of `memory` ends. Raises ManifestUnknown, and the errors of a failed upstream request."""

        async def operation(endpoint: UpstreamEndpoint, attempt: EndpointAttempt) -> Manifest:
            response = await self._request_manifest(endpoint, attempt, repo, "GET", reference, memory)
            return await self._parser.verified_manifest(response, reference)

        return await self._requester.try_endpoints(
            operation, repo, RequestKind.MANIFEST, any_endpoint=isinstance(reference, Digest)
        )

    async def _request_manifest(
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
            max_bytes=MAX_MANIFEST_BYTES,
            accepted_statuses=_HEAD_UNSUPPORTED if method == "HEAD" else (),
            memory=memory,
        )

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        """Returns the descriptor of a blob. Raises BlobUnknown, and the errors of a failed upstream request."""

        async def operation(endpoint: UpstreamEndpoint, attempt: EndpointAttempt) -> Descriptor:
            return Descriptor(BLOB_TYPE, digest, await self._blob_size(endpoint, attempt, repo, digest))

        return await self._requester.try_endpoints(operation, repo, RequestKind.BLOB, any_endpoint=True)

    async def _blob_size(
        self, endpoint: UpstreamEndpoint, attempt: EndpointAttempt, repo: RepositoryName, digest: Digest
    ) -> int:
        """Returns the blob's size in bytes, by a HEAD request or, if that does not show it, by a GET of one byte."""
        path, not_found_error = f"blobs/{digest}", BlobUnknown()
        # A 404 to HEAD has no body that shows whether the registry itself sent it, and "unknown" is cached. Therefore a
        # GET follows an unconfirmed "not found".
        with suppress(UnconfirmedBlobUnknown):
            response = await self._requester.request(
                endpoint,
                attempt,
                repo,
                RequestKind.BLOB,
                "HEAD",
                path,
                not_found_error,
                accepted_statuses=_BLOB_HEAD_UNSUPPORTED,
            )
            if response.status == 200 and response.length is not None:
                _check_same_digest(response, digest, "blob")
                return response.length
        # A redirect's URL may be signed for GET only, and not every server sends a length with HEAD.
        response = await self._requester.request(
            endpoint,
            attempt,
            repo,
            RequestKind.BLOB,
            "GET",
            path,
            not_found_error,
            headers={"Range": "bytes=0-0"},
            read_body=False,
            accepted_statuses=(416,),
        )
        _check_same_digest(response, digest, "blob")
        total = parse_count(response.headers.get("content-range", "").rpartition("/")[2])
        size = response.length if response.status == 200 else total
        if size is None:
            raise UpstreamUnavailable(f"{loggable_origin(response.url)} does not say how long the blob is")
        return size

    async def fetch_blob(
        self, repo: RepositoryName, digest: Digest, span: Span, sink: BlobSink, avoid: Collection[str] = ()
    ) -> None:
        """Passes the bytes of `span` (a byte range of the blob) to `sink`. Endpoints in `avoid` (URLs) are tried last.
        Raises BlobUnknown, RangesUnsupported, the errors of a failed upstream request, and what the sink raises. After
        the sink has received bytes, no other endpoint is tried."""
        range_value = range_header(span)
        range_headers = {"Range": range_value} if range_value else {}
        loop = asyncio.get_running_loop()

        async def operation(endpoint: UpstreamEndpoint, attempt: EndpointAttempt) -> None:
            # The endpoint counts as working once it responds. An error late in a long transfer does not change that.
            transfer = BlobTransfer(endpoint.url, span, sink, attempt, loop.call_soon_threadsafe)
            url = f"{endpoint.url}/v2/{repo}/blobs/{digest}"

            async def send(authorization: Mapping[str, str]) -> UpstreamResponse:
                return await self._blobs.fetch(transfer, url, {**range_headers, **authorization})

            try:
                await self._requester.send_authorized(endpoint, attempt, repo, RequestKind.BLOB, send, BlobUnknown())
            except SinkRaised as raised:
                raise FetchEnded(raised.error) from None
            except RegistryError as error:
                if not transfer.sink_called:
                    raise
                raise FetchEnded(error) from None

        try:
            await self._requester.try_endpoints(
                operation, repo, RequestKind.BLOB, any_endpoint=True, avoid=avoid, timeout_seconds=None
            )
        except FetchEnded as ended:
            raise ended.error from None

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        """See `UpstreamLists.tags`."""
        return await self._lists.tags(repo, after, limit)

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        """See `UpstreamLists.referrers`."""
        return await self._lists.referrers(repo, subject, artifact_type, after, limit)

    def is_exhausted(self) -> bool:
        """Returns whether the upstream has said that few requests are left before it answers with 429."""
        return self._requester.remaining_requests.is_exhausted()

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
    """Returns the client for the upstream in `settings`. Reads the proxies from the environment; connects to no server
    and reads no file. `clock` returns seconds since 1970. `classify` returns the network class of an IP address."""
    return HttpUpstreamClient(settings, records, leases, clock, classify)


def _check_same_digest(response: UpstreamResponse, digest: Digest, content_kind: str) -> None:
    """Raises UpstreamUnavailable if the response names another digest of the same algorithm than `digest`.
    `content_kind` is "manifest" or "blob", for the message."""
    if response.digest and response.digest.algorithm == digest.algorithm and response.digest != digest:
        raise UpstreamUnavailable(
            f"{loggable_origin(response.url)} answers with another {content_kind} than the one asked for"
        )
