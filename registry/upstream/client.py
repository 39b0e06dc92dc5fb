"""`HttpUpstreamClient`: the HTTP client for one upstream registry, an implementation of `UpstreamClient`.

The client requests manifests, blobs and lists. An upstream has one or more endpoints (URLs that serve the same
content). `UpstreamRequester` tries the endpoints one after another. `BlobClient` downloads the bytes of blobs.
`ApiClient` sends all other requests.

UpstreamUnavailable, UpstreamTimeout, TooManyRequests, Denied and StorageFailed are the *errors of a failed upstream
request*. Each "not found" error, such as BlobUnknown, has an *unconfirmed* variant, such as UnconfirmedBlobUnknown. The
variant is raised if the content may exist, for example because a proxy or firewall possibly sent the "not found".

A *refusal* is a confirmed "not found" error, Denied or RangesUnsupported. After a refusal by an endpoint:

- Content with a digest is the same at all endpoints. Requests for such content have `continue_after_refusal`, so the
  next endpoint is tried.
- For tags and lists, a refusal by the endpoint that is first in the settings is raised at once. After a refusal by any
  other endpoint, the next endpoint is tried.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from registry.config import Upstream
from registry.memory_budget import MemoryBudget, ShareScope
from registry.mirror.observer import UNOBSERVED, MirrorObserver
from registry.mirror.upstream_client import (
    BlobSink,
    BlobSizeUnknown,
    EndpointHealth,
    UnconfirmedBlobUnknown,
    UnconfirmedManifestUnknown,
    UpstreamClient,
)
from registry.upstream.api_client import ApiClient
from registry.upstream.blob_client import BlobClient
from registry.upstream.catalog import CatalogPage, CatalogReader
from registry.upstream.destinations import AddressPolicy, NetworkClassifier, classify_address, loggable_origin
from registry.upstream.endpoints import EndpointAttempt, UpstreamEndpoint
from registry.upstream.rate_limits import RequestKind
from registry.upstream.request_limits import MIB, REQUEST_TIMEOUT_SECONDS, time_limit
from registry.upstream.requester import UpstreamRequester
from registry.upstream.transfer import BlobTransfer, SinkRaised, range_header
from registry.upstream.transport import OutboundProxies, TrustStore
from registry.upstream.upstream_lists import UpstreamLists
from registry.upstream.upstream_responses import ACCEPTED_MANIFESTS, DocumentParser, UpstreamResponse, parse_count
from storage.content import BLOB_TYPE, Descriptor, Manifest, Page, Span
from storage.errors import (
    BlobUnknown,
    ManifestUnknown,
    NameUnknown,
    RegistryError,
    UpstreamUnavailable,
)
from storage.leases import Leases
from storage.names import Digest, Reference, RepositoryName, Tag
from storage.upstream_records import UpstreamRecords

MAX_UPSTREAM_MANIFEST_BYTES = 8 * MIB
"""Largest manifest that is accepted from an upstream."""
RESPONSE_MEMORY_BYTES = 56 * MIB
"""Memory budget for the large responses of one upstream, until they are parsed and stored."""

_MANIFEST_HEAD_UNSUPPORTED = frozenset({400, 405, 501})
"""Statuses with which a registry may refuse a HEAD request for a manifest. A GET then follows."""
_BLOB_HEAD_UNSUPPORTED = frozenset({400, 403, 405, 501})
"""Statuses with which a registry or its storage may refuse a HEAD request for a blob. A GET then follows."""
_PLACEHOLDER_REPOSITORY = RepositoryName("ping")
"""Placeholder for the repository name in requests that are for no repository."""


class FetchEnded(Exception):
    """Wraps an error after which no other endpoint may be tried, because the sink (the object that receives the bytes)
    was already called. `try_endpoints` does not catch this class. `HttpUpstreamClient.fetch_blob` raises the wrapped
    error."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class HttpUpstreamClient:
    """Requests manifests, blobs and lists of one upstream. `registry.mirror.upstream_client.UpstreamClient` is the
    interface, and describes the methods in full."""

    def __init__(
        self,
        settings: Upstream,
        records: UpstreamRecords,
        leases: Leases,
        clock: Callable[[], float],
        classify: NetworkClassifier,
        trust: TrustStore | None = None,
        observer: MirrorObserver = UNOBSERVED,
        configured_name: str | None = None,
    ) -> None:
        """The parameters are those of `make_upstream_client`, and:

        - `trust`: decides which certificates of servers are accepted; None: the setting `ca_file` decides.
        - `configured_name`: the name of the upstream for which docker's `config.json` has the login, such as `ghcr.io`.
          It also decides which token services are trusted. None: `settings.name`. An import passes this name, because
          the `settings.name` of an import is made up."""
        self.name = settings.name
        self.endpoints: Sequence[str] = tuple(dict.fromkeys(settings.endpoints))
        self.connections = settings.connections
        proxies, policy = OutboundProxies(), AddressPolicy(settings.name, classify)
        trust = trust or TrustStore(settings.ca_file)
        memory, self._parser = MemoryBudget(RESPONSE_MEMORY_BYTES, f"answers of {settings.name}"), DocumentParser()
        self._api = ApiClient(settings, proxies, trust, policy, memory)
        self._blobs = BlobClient(settings, proxies, trust, policy)
        self._requester = UpstreamRequester(settings, self._api, records, leases, clock, observer, configured_name)
        self._observer = observer
        self._lists = UpstreamLists(settings.name, self._requester, self._parser, memory)
        self._catalog = CatalogReader(self._requester, self._parser)

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        """Returns the descriptor of a manifest. Sends a HEAD request. Then sends a GET if the response to HEAD does not
        show the type, the digest and the size. Raises ManifestUnknown, and the errors of a failed upstream request."""

        async def operation(endpoint: UpstreamEndpoint, attempt: EndpointAttempt) -> Descriptor:
            # A 404 to HEAD raises UnconfirmedManifestUnknown, because a response without a body does not show who sent
            # it. A GET then decides, because a wrong ManifestUnknown would make the mirror delete a cached tag.
            with suppress(UnconfirmedManifestUnknown):
                response = await self._request_manifest(endpoint, attempt, repo, "HEAD", reference)
                digest = reference if isinstance(reference, Digest) else response.digest
                if (
                    response.status not in _MANIFEST_HEAD_UNSUPPORTED
                    and digest
                    and response.length
                    and response.media_type
                ):
                    _check_same_digest(response, digest, "manifest")
                    return Descriptor(response.media_type, digest, response.length)
            with ShareScope() as memory:
                response = await self._request_manifest(endpoint, attempt, repo, "GET", reference, memory)
                return (await self._parser.parse_verified_manifest(response, reference)).descriptor

        return await self._requester.try_endpoints(
            operation, repo, RequestKind.HEAD, continue_after_refusal=isinstance(reference, Digest)
        )

    async def get_manifest(
        self, repo: RepositoryName, reference: Reference, memory: ShareScope | None = None
    ) -> Manifest:
        """Returns a manifest. If its digest is known, checks the bytes against the digest. Raises ManifestUnknown, and
        the errors of a failed upstream request. `memory`: a large body counts in the memory budget for large responses
        until the `with` block of this scope ends; None: until the body is received."""

        async def operation(endpoint: UpstreamEndpoint, attempt: EndpointAttempt) -> Manifest:
            response = await self._request_manifest(endpoint, attempt, repo, "GET", reference, memory)
            manifest = await self._parser.parse_verified_manifest(response, reference)
            self._observer.on_fetched("manifest", len(manifest.body))
            return manifest

        return await self._requester.try_endpoints(
            operation, repo, RequestKind.MANIFEST, continue_after_refusal=isinstance(reference, Digest)
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
        """Sends a HEAD or GET request for a manifest. The response to HEAD may have a status of
        _MANIFEST_HEAD_UNSUPPORTED."""
        return await self._requester.request(
            endpoint,
            attempt,
            repo,
            RequestKind.HEAD if method == "HEAD" else RequestKind.MANIFEST,
            method,
            f"manifests/{reference}",
            not_found_error=ManifestUnknown(),
            headers={"Accept": ACCEPTED_MANIFESTS},
            max_bytes=MAX_UPSTREAM_MANIFEST_BYTES,
            accepted_statuses=_MANIFEST_HEAD_UNSUPPORTED if method == "HEAD" else (),
            memory=memory,
        )

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        """Returns the descriptor of a blob. Raises BlobUnknown, and the errors of a failed upstream request."""

        async def operation(endpoint: UpstreamEndpoint, attempt: EndpointAttempt) -> Descriptor:
            return Descriptor(BLOB_TYPE, digest, await self._blob_size(endpoint, attempt, repo, digest))

        return await self._requester.try_endpoints(operation, repo, RequestKind.BLOB, continue_after_refusal=True)

    async def _blob_size(
        self, endpoint: UpstreamEndpoint, attempt: EndpointAttempt, repo: RepositoryName, digest: Digest
    ) -> int:
        """Returns the blob's size in bytes. Sends a HEAD request. If the response does not show the size, sends a GET
        for the first byte. Raises BlobSizeUnknown if the upstream has the blob, but does not state its size."""
        path = f"blobs/{digest}"
        # A 404 to HEAD raises UnconfirmedBlobUnknown, because a response without a body does not show who sent it.
        # A GET then decides, because the mirror would cache a wrong BlobUnknown.
        with suppress(UnconfirmedBlobUnknown):
            response = await self._requester.request(
                endpoint,
                attempt,
                repo,
                RequestKind.BLOB,
                "HEAD",
                path,
                not_found_error=BlobUnknown(),
                accepted_statuses=_BLOB_HEAD_UNSUPPORTED,
            )
            if response.status == 200 and response.length is not None:
                _check_same_digest(response, digest, "blob")
                return response.length
        # HEAD fails if it is redirected to a URL that is signed for GET only. Other responses to HEAD show no length.
        for headers in ({"Range": "bytes=0-0"}, {}):
            response = await self._requester.request(
                endpoint,
                attempt,
                repo,
                RequestKind.BLOB,
                "GET",
                path,
                not_found_error=BlobUnknown(),
                headers=headers,
                read_body=False,
                accepted_statuses=(416,),  # an empty blob has no first byte; `Content-Range` then states the size 0
            )
            _check_same_digest(response, digest, "blob")
            total = parse_count(response.headers.get("content-range", "").rpartition("/")[2])
            size = response.length if response.status == 200 else total
            if size is not None:
                return size
            if response.status != 416:  # after a 416, a request without a range may show the length
                break
        message = f"{loggable_origin(response.url)} does not say how long the blob is"
        if response.status in (200, 206) and response.digest == digest:
            raise BlobSizeUnknown(message)
        raise UpstreamUnavailable(message)

    async def fetch_blob(
        self,
        repo: RepositoryName,
        digest: Digest,
        span: Span,
        sink: BlobSink,
        avoid: Collection[str] = (),
        untrusted: Collection[str] = (),
        expected_size: int | None = None,
    ) -> None:
        """Passes the bytes of `span` (a byte range of the blob) to `sink`. Tries one endpoint after another until one
        has the blob. After the sink was called, tries no other endpoint.

        - `avoid`: URLs of endpoints that are tried after the others.
        - `untrusted`: URLs of endpoints whose bytes the sink does not accept. They are tried last, to find out
          whether the upstream has the blob. If one of them has the blob, the sink raises an error.
        - `expected_size`: the size of the whole blob in bytes, used if the response does not state the size. None: a
          response that does not state the size is refused.

        Raises BlobUnknown, RangesUnsupported (the upstream sends only whole blobs), BlobLengthWrong (the response does
        not state the size, and is not as long as `expected_size`), the errors of a failed upstream request, and the
        errors of the sink. After a cancellation the sink is not called again."""
        range_value = range_header(span)
        range_headers = {"Range": range_value} if range_value else {}
        loop = asyncio.get_running_loop()

        async def operation(endpoint: UpstreamEndpoint, attempt: EndpointAttempt) -> None:
            # `attempt` reports the endpoint as working as soon as the endpoint responds, even if the transfer fails
            # later.
            transfer = BlobTransfer(endpoint.url, span, sink, attempt, loop.call_soon_threadsafe, expected_size)
            url = f"{endpoint.url}/v2/{repo}/blobs/{digest}"

            async def send(authorization: Mapping[str, str]) -> UpstreamResponse:
                return await self._blobs.fetch(transfer, url, {**range_headers, **authorization})

            try:
                await self._requester.send_authorized(
                    endpoint, attempt, repo, RequestKind.BLOB, send, not_found_error=BlobUnknown()
                )
            except SinkRaised as raised:
                raise FetchEnded(raised.error) from None
            except RegistryError as error:
                if not transfer.sink_called:
                    raise
                raise FetchEnded(error) from None

        try:
            # There is no time limit for the whole blob, because `BlobClient` stops a transfer that makes no progress.
            await self._requester.try_endpoints(
                *(operation, repo, RequestKind.BLOB),
                continue_after_refusal=True,
                avoid=avoid,
                untrusted=untrusted,
                timeout_seconds=None,
            )
        except FetchEnded as ended:
            if isinstance(ended.error, UpstreamUnavailable):
                self._observer.on_error(ended.error)
            raise ended.error from None

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        """See `UpstreamLists.tags`."""
        return await self._lists.tags(repo, after, limit)

    async def referrers(
        self,
        repo: RepositoryName,
        subject: Digest,
        artifact_type: str | None,
        after: str | None,
        limit: int,
        *,
        use_fallback_tag: bool = True,
    ) -> Page[Descriptor]:
        """See `UpstreamLists.referrers`."""
        return await self._lists.referrers(
            repo, subject, artifact_type, after, limit, use_fallback_tag=use_fallback_tag
        )

    async def catalog_page(self, previous: CatalogPage | None = None) -> CatalogPage:
        """See `CatalogReader.page`."""
        return await self._catalog.page(previous)

    async def ping(self) -> UpstreamResponse:
        """Sends GET `/v2/` without a login to the first endpoint, and returns the response, whatever its status. Raises
        UpstreamUnavailable, UpstreamTimeout."""
        async with time_limit(REQUEST_TIMEOUT_SECONDS, loggable_origin(self.endpoints[0])):
            return await self._api.send("GET", f"{self.endpoints[0]}/v2/", {})

    async def check_login(self) -> None:
        """Checks the configured login with GET `/v2/`. If the upstream requires a token, requests one without a scope,
        as `docker login` does: some token services accept only scopes of repositories. Uses no cached token, because a
        cached token does not show whether the password still works.

        Raises Denied if the upstream or its token service refuses the login, NameUnknown if GET `/v2/` is not found,
        and the other errors of a failed upstream request."""

        async def operation(endpoint: UpstreamEndpoint, attempt: EndpointAttempt) -> None:
            await self._requester.delete_token(endpoint, "")
            await self._requester.request(
                *(endpoint, attempt, _PLACEHOLDER_REPOSITORY, RequestKind.LOGIN, "GET", f"{endpoint.url}/v2/"),
                not_found_error=NameUnknown("GET /v2/ is not found"),
                scope="",
            )

        await self._requester.try_endpoints(operation, _PLACEHOLDER_REPOSITORY, RequestKind.LOGIN)

    async def check_referrers_api(self, repo: RepositoryName, digest: Digest) -> bool | None:
        """See `UpstreamLists.check_referrers_api`."""
        return await self._lists.check_referrers_api(repo, digest)

    def is_near_rate_limit(self) -> bool:
        """Returns whether the upstream's rate limit is nearly used up: at most a tenth of the requests remains."""
        return self._requester.remaining_requests.is_near_rate_limit()

    def endpoint_health(self) -> list[EndpointHealth]:
        """Returns the health of each endpoint, as this process has observed it, in the order of the settings."""
        return self._requester.endpoint_health()

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
    observer: MirrorObserver = UNOBSERVED,
) -> UpstreamClient:
    """Returns the client for the upstream in `settings`. Reads the proxies from environment variables. Reads no file,
    and does not connect.

    - `records`: stores the tokens and the rate limits of the upstream for all worker processes.
    - `leases`: let only one process at a time request a token.
    - `clock`: returns seconds since 1970.
    - `classify`: returns the network class of an IP address, such as public or loopback.
    - `observer`: counts the requests."""
    return HttpUpstreamClient(settings, records, leases, clock, classify, observer=observer)


def _check_same_digest(response: UpstreamResponse, digest: Digest, content_kind: str) -> None:
    """Raises UpstreamUnavailable if the response names a digest that differs from `digest` but has the same algorithm.
    `content_kind`: "manifest" or "blob", for the message."""
    if response.digest and response.digest.algorithm == digest.algorithm and response.digest != digest:
        raise UpstreamUnavailable(
            f"{loggable_origin(response.url)} answers with another {content_kind} than the one asked for"
        )
