"""Reads the *old registry* over the network, to import its content into this registry (`RemoteRegistry`). Sends the
requests with the HTTP client that mirrors use. `RequestRetries` repeats failed requests, and ends the import if the old
registry is down or refuses the login.

If the body of a response "not found" has the error code of a registry, the old registry itself lacks the content.
Without this code, the response may come from a proxy or firewall in front of the old registry, and the client raises an
`Unconfirmed` error. The client also raises an `Unconfirmed` error if a request was refused because it had no login.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import closing, suppress
from typing import Final
from urllib.parse import urlsplit

from registry.config import Upstream
from registry.migration.import_report import ImportReport
from registry.migration.remote_options import RemoteOptions
from registry.migration.request_retries import PauseFunction, RequestRetries
from registry.mirror.fill.demand import Demand
from registry.mirror.fill.download import Download
from registry.mirror.fill.retry import AvoidedEndpoints
from registry.mirror.fill.slots import ConnectionSlots
from registry.mirror.upstream_client import BlobLengthWrong, Unconfirmed, UnconfirmedNameUnknown, UpstreamContentInvalid
from registry.upstream.catalog import CatalogPage
from registry.upstream.client import HttpUpstreamClient
from registry.upstream.destinations import classify_address
from registry.upstream.transport import UncheckedTrust
from storage.content import Descriptor, Manifest, Page
from storage.errors import (
    BlobUnknown,
    Denied,
    DigestInvalid,
    ManifestUnknown,
    NameUnknown,
    PartialBlobLost,
    RegistryError,
    SizeInvalid,
    TooManyRequests,
    UpstreamUnavailable,
)
from storage.imports import ContentBroken, ImportInvalid, OldRegistryDown
from storage.names import Digest, Reference, RepositoryName, Tag
from storage.partials import discard_if_nearly_empty
from storage.store.stored_registry import StoredRegistry

MAX_CATALOG_PAGES: Final = 20_000
"""Largest number of pages that the list of repositories may have. The limit is necessary because a faulty registry may
send pages without an end. With 100 names in each page, the limit allows two million repositories."""
PAGE_SIZE: Final = 1000
"""Largest number of tags or referrers that are requested in one page."""
_NAMES_HINT: Final = "write their names into a file, one per line, and pass it with --repositories FILE"
log = logging.getLogger("registry.migration")


class RemoteRegistry:
    """The old registry. Implements `registry.migration.image_writer.ContentSource`. The methods raise:

    - ContentBroken, if the old registry does not have the content or sends other bytes.
    - Denied, if the old registry refuses the request.
    - TooManyRequests and UpstreamUnavailable, if all attempts of a request have failed.
    - OldRegistryDown, if the old registry is down (`RequestRetries`).
    - ImportInvalid, if the old registry refuses the login."""

    def __init__(
        self,
        store: StoredRegistry,
        options: RemoteOptions,
        report: ImportReport,
        configured: Iterable[Upstream] = (),
        *,
        clock: Callable[[], float] = time.time,
        pause: PauseFunction = asyncio.sleep,
    ) -> None:
        """`configured`: the upstreams in the settings; the old registry may be one of them
        (`RemoteOptions.to_upstream`). `clock` returns the time in seconds since 1970. `pause` waits for a number of
        seconds."""
        self._store = store
        self._report = report
        trust = UncheckedTrust() if options.insecure else None
        configured = list(configured)
        upstream = options.to_upstream(configured)
        self.host = urlsplit(upstream.endpoints[0]).netloc
        self._client = HttpUpstreamClient(
            upstream,
            store.records,
            store.leases,
            clock,
            classify_address,
            trust,
            configured_name=options.configured_name(configured),
        )
        self._slots = ConnectionSlots(store.leases, self._client)
        self._retries = RequestRetries(self._client, self.host, pause)

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def repositories(self) -> AsyncIterator[str]:
        """Yields the names of all repositories, as the old registry lists them. Raises:

        - ImportInvalid, if the old registry does not give out the list, if the list has too many pages, or if a page
          links back to an earlier page.
        - OldRegistryDown, if all attempts to read a page after the first page fail, or if the error of such a page is
          `Unconfirmed`."""
        page: CatalogPage | None = None
        # The digests of the URLs of the pages. The URLs themselves would use more memory: a URL may have many KiB.
        url_digests: set[bytes] = set()
        while page is None or page.next_url is not None:
            if len(url_digests) >= MAX_CATALOG_PAGES:
                raise ImportInvalid(
                    f"the list of repositories of {self.host} has more than {MAX_CATALOG_PAGES} pages; {_NAMES_HINT}"
                )
            previous = page
            try:
                page = await self._retries.run(None, lambda: self._client.catalog_page(previous))  # noqa: B023
            except (NameUnknown, Denied) as error:
                if previous is not None and isinstance(error, Unconfirmed):
                    raise OldRegistryDown(f"{OldRegistryDown.default} ({error.message})") from None
                raise ImportInvalid(
                    f"{self.host} does not give out the list of its repositories ({error.message}); {_NAMES_HINT}"
                ) from None
            except (UpstreamUnavailable, TooManyRequests) as error:
                if previous is None:
                    raise
                raise OldRegistryDown(f"{OldRegistryDown.default} ({error.message})") from None
            for name in page.names:
                yield name
            url_digest = hashlib.sha256((page.next_url or "").encode()).digest()
            if url_digest in url_digests:
                raise ImportInvalid(f"the list of repositories of {self.host} leads in a circle; {_NAMES_HINT}")
            url_digests.add(url_digest)

    async def tags(self, repo: RepositoryName) -> AsyncIterator[Tag]:
        """Yields the tags of a repository. Raises ContentBroken if there is no such repository."""
        after: str | None = None
        while True:
            try:
                page = await self._retries.run(repo, lambda: self._client.tags(repo, after, PAGE_SIZE))  # noqa: B023
            except NameUnknown as error:
                raise ContentBroken(f"{self.host} does not show its tags: {error.message}") from None
            for tag in page.items:
                yield tag
            if not page.more:
                return
            after = page.items[-1]

    async def resolve(self, repo: RepositoryName, reference: Reference) -> Digest:
        """Returns the digest of a manifest, by a HEAD request."""
        try:
            return (await self._retries.run(repo, lambda: self._client.resolve_manifest(repo, reference))).digest
        except ManifestUnknown as error:
            raise ContentBroken(error.message) from None

    async def get_manifest(self, repo: RepositoryName, digest: Digest) -> Manifest:
        try:
            return await self._retries.run(repo, lambda: self._client.get_manifest(repo, digest))
        except (ManifestUnknown, UpstreamContentInvalid) as error:
            raise ContentBroken(error.message) from None

    async def has_referrers_api(self, repo: RepositoryName, digest: Digest) -> bool:
        """Returns whether the old registry has the referrers API for this repository. `digest`: the digest of any
        manifest of the repository. Raises ContentBroken if the responses of the old registry do not show whether it has
        the API."""
        try:
            return await self._retries.run(repo, lambda: self._ask_for_referrers_api(repo, digest))
        except NameUnknown as error:
            raise self._hidden_referrers_error(error) from None

    async def _ask_for_referrers_api(self, repo: RepositoryName, digest: Digest) -> bool:
        """Makes one attempt of `has_referrers_api`. Raises UnconfirmedNameUnknown if another attempt may get another
        response."""
        with suppress(UnconfirmedNameUnknown):
            has_api = await self._client.check_referrers_api(repo, digest)
            if has_api is not None:
                return has_api
        # The client returns None for a response such as a 404 without the error code of a registry. Such a response
        # comes from a registry without the API, such as registry:2, or from a proxy in front of a registry that
        # restarts. If the registry restarts, the following request for the manifest fails.
        try:
            await self._client.resolve_manifest(repo, digest)
        except ManifestUnknown as error:
            if isinstance(error, Unconfirmed):
                raise UnconfirmedNameUnknown from None
            # Any other ManifestUnknown comes from the registry itself, so the registry is up.
        try:
            return bool(await self._client.check_referrers_api(repo, digest))
        except UnconfirmedNameUnknown as error:
            # The registry is up, because it has just answered the request for the manifest. So a retry does not help.
            # Possibly a firewall refuses the list of referrers.
            raise self._hidden_referrers_error(error) from None

    async def referrers(self, repo: RepositoryName, subject: Digest) -> AsyncIterator[Digest]:
        """Yields the digests of the manifests that the referrers API lists for `subject`. Raises ContentBroken if the
        old registry, or a proxy or firewall in front of it, does not give out the list."""
        after: str | None = None
        while True:
            try:
                page = await self._retries.run(repo, lambda: self._referrers_page(repo, subject, after))  # noqa: B023
            except NameUnknown as error:
                # The error is always an UnconfirmedNameUnknown. If the response "not found" has the error code of a
                # registry, the client returns an empty page.
                raise self._hidden_referrers_error(error) from None
            for descriptor in page.items:
                yield descriptor.digest
            if not page.more:
                return
            after = page.items[-1].digest

    async def _referrers_page(self, repo: RepositoryName, subject: Digest, after: str | None) -> Page[Descriptor]:
        """Returns the page of referrers after the digest `after`; the first page if `after` is None. Makes one attempt.
        Does not read the tag that replaces the referrers API (spec: "Referrers Tag Schema"), because the import copies
        this tag with the other tags."""
        try:
            return await self._client.referrers(repo, subject, None, after, PAGE_SIZE, use_fallback_tag=False)
        except UnconfirmedNameUnknown:
            # Some registries have the referrers API for only some of their repositories. For a repository without the
            # API, this method returns an empty page.
            if await self._ask_for_referrers_api(repo, subject):
                raise
            return Page([])

    async def blob_size(self, repo: RepositoryName, digest: Digest) -> int:
        """Returns the size in bytes that the old registry states for a blob of this repository."""
        try:
            return (await self._retries.run(repo, lambda: self._client.resolve_blob(repo, digest))).size
        except BlobUnknown as error:
            raise self._missing_blob_error(digest, error) from None

    async def import_blob(self, repo: RepositoryName, blob: Descriptor) -> None:
        """Downloads a blob and stores it in `repo`. If the download is interrupted, the next download continues after
        the bytes that have arrived, unless they are very few (`discard_if_nearly_empty`)."""
        try:
            await self._retries.run(repo, lambda: self._download(repo, blob))
        except BlobUnknown as error:
            raise self._missing_blob_error(blob.digest, error) from None
        except DigestInvalid:
            raise ContentBroken(f"{self.host} sends other bytes for the blob {blob.digest}") from None
        except SizeInvalid as error:
            raise ContentBroken(
                f"the blob {blob.digest} does not have the size that the manifest states: {error}"
            ) from None
        self._report.fetched += 1
        self._report.bytes += blob.size

    async def _download(self, repo: RepositoryName, blob: Descriptor) -> None:
        """Makes one attempt to download the missing bytes of a blob. Then verifies the digest, and stores the blob in
        the repository. A *partial* keeps the bytes that have arrived. Only one process, its owner, adds bytes to it.
        Raises PartialBlobLost if another process is the owner."""
        with closing(await self._store.partials.claim(blob.digest, blob.size, self._client.name)) as partial:
            if not partial.is_owner:
                raise PartialBlobLost("another process downloads this blob from the old registry")
            if not partial.missing():
                # An earlier import got all bytes, possibly for another repository. The old registry has to confirm that
                # this repository has the blob; otherwise, `resolve_blob` raises BlobUnknown. A proxy may answer
                # every request with a login page and status 200. `resolve_blob` then returns the size of this page,
                # which usually differs from the size of the blob.
                stated_size = (await self._client.resolve_blob(repo, blob.digest)).size
                if stated_size != blob.size:
                    raise SizeInvalid(f"{self.host} states {stated_size} bytes")
            demand = Demand()  # the download stops when nobody needs the blob
            demand.add_client()  # the import counts as a client
            download = Download(
                self._client, self._slots, repo, partial, demand, AvoidedEndpoints(), on_response=lambda: None
            )
            try:
                await download.run()
            except BlobLengthWrong:
                await partial.discard()  # the bytes are possibly those of an error page
                raise
            except (RegistryError, asyncio.CancelledError):  # a failure of another blob cancels this download
                await discard_if_nearly_empty(partial)
                raise
            await partial.commit(repo)

    def _missing_blob_error(self, digest: Digest, error: BlobUnknown) -> ContentBroken:
        verb = "give out" if isinstance(error, Unconfirmed) else "have"
        return ContentBroken(f"{self.host} does not {verb} the blob {digest}")

    def _hidden_referrers_error(self, error: NameUnknown) -> ContentBroken:
        """Returns the error for a list of referrers that the old registry, or a proxy or firewall in front of it, does
        not give out."""
        return ContentBroken(f"{self.host} does not show its referrers, such as signatures: {error.message}")
