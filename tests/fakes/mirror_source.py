"""A fake of a mirror's upstream client, with content in memory and with faults. The fake checks the mirror's calls."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from registry.memory_budget import ShareScope
from registry.mirror.upstream_client import BlobSink, EndpointHealth, RangesUnsupported
from storage.content import BLOB_TYPE, Descriptor, Manifest, Page, Span, digest_of
from storage.errors import BlobUnknown, ManifestUnknown, NameUnknown, RegistryError, UpstreamUnavailable
from storage.names import Digest, Reference, RepositoryName, Tag
from tests.fakes.registry_content import descriptor_of, image_of

CHUNK = 64 * 1024  # bytes


@dataclass
class SourceFaults:
    """The faults of the upstream. `down`: the error that every call raises. `ranges`: whether the upstream supports
    ranges. `drops`: for each of the next responses, the number of bytes after which it breaks off. `corrupt`: endpoints
    that send wrong bytes. `gates`: offsets at which a response waits until the event is set.
    `is_near_rate_limit`: whether the upstream's rate limit is almost used up."""

    down: RegistryError | None = None
    ranges: bool = True
    refuses_ranges: bool = False
    """Whether a request for a range gets an error."""
    drops: list[int] = field(default_factory=list)
    corrupt: set[str] = field(default_factory=set)
    unreachable: set[str] = field(default_factory=set)
    """Endpoints that cannot be reached."""
    gates: dict[int, threading.Event] = field(default_factory=dict)
    hold: asyncio.Event | None = None
    """All requests except downloads of blobs wait for this event."""
    stall: asyncio.Event | None = None
    """Downloads of blobs wait for this event before they begin."""
    stalled_repos: set[str] | None = None
    """The repositories whose downloads wait for `stall`; None: all."""
    errors: dict[str, RegistryError] = field(default_factory=dict)
    """For each of these repositories, the error of downloads of its blobs."""
    manifest_errors: dict[str, RegistryError] = field(default_factory=dict)
    """For each of these repositories, the error of requests for its manifests."""
    is_near_rate_limit: bool = False


class FakeSource:
    """An `UpstreamClient`. `calls` counts the requests by kind. `requested_spans` and `requested_repos` have the spans
    and the repositories of the requests for each blob, `sent` has the sent spans. `at_once` is the number of running
    downloads, `most_at_once` its highest value."""

    name = "docker.io"

    def __init__(self, connections: int = 4, endpoints: Sequence[str] = ("https://one",)) -> None:
        self.connections = connections
        self.endpoints: Sequence[str] = endpoints
        self.faults = SourceFaults()
        self.blobs: dict[tuple[str, Digest], bytes] = {}
        self.manifests: dict[tuple[str, Reference], Manifest] = {}
        self.calls: Counter[str] = Counter()
        self.sent: dict[Digest, list[tuple[int, int]]] = {}
        self.requested_spans: dict[Digest, list[Span]] = {}
        self.requested_repos: dict[Digest, list[str]] = {}
        self.most_at_once = 0
        self.at_once = 0
        self.on_fetch: Callable[[Digest], None] = lambda digest: None
        self.closed = False
        self._sending: set[_Sending] = set()

    def cut(self) -> None:
        """Interrupts the responses that are being sent."""
        for sending in list(self._sending):
            sending.cancelled.set()

    # Content

    def add_blob(self, repo: str, data: bytes) -> Descriptor:
        found = descriptor_of(data)
        self.blobs[repo, found.digest] = data
        return found

    def add_manifest(self, repo: str, manifest: Manifest, *tags: str) -> Manifest:
        references: list[Reference] = [manifest.digest, *map(Tag, tags)]
        for reference in references:
            self.manifests[repo, reference] = manifest
        return manifest

    def add_image(self, repo: str, *layers: bytes, config: bytes = b"{}", tags: tuple[str, ...] = ("1",)) -> Manifest:
        manifest = image_of(self.add_blob(repo, config), [self.add_blob(repo, layer) for layer in layers])
        return self.add_manifest(repo, manifest, *tags)

    def bytes_sent(self, digest: Digest) -> int:
        return sum(stop - start for start, stop in self.sent.get(digest, ()))

    # Methods of UpstreamClient

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        await self._called("head manifest", repo)
        return self._manifest(repo, reference).descriptor

    async def get_manifest(
        self, repo: RepositoryName, reference: Reference, memory: ShareScope | None = None
    ) -> Manifest:
        await self._called("get manifest", repo)
        return self._manifest(repo, reference)

    def _manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        try:
            return self.manifests[repo, reference]
        except KeyError:
            raise ManifestUnknown from None

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        await self._called("head blob")
        try:
            return Descriptor(BLOB_TYPE, digest, len(self.blobs[repo, digest]))
        except KeyError:
            raise BlobUnknown from None

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        await self._called("tags")
        found = sorted(ref for name, ref in self.manifests if name == repo and isinstance(ref, Tag))
        if not found:
            raise NameUnknown
        following = [tag for tag in found if after is None or tag > after]
        return Page(following[:limit], len(following) > limit)

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        await self._called("referrers")
        found = {
            manifest.digest: manifest.descriptor
            for (name, _), manifest in self.manifests.items()
            if name == repo and manifest.subject == subject and artifact_type in (None, manifest.artifact_type)
        }
        following = [found[digest] for digest in sorted(found) if after is None or digest > after]
        return Page(following[:limit], len(following) > limit)

    def is_near_rate_limit(self) -> bool:
        return self.faults.is_near_rate_limit

    def endpoint_health(self) -> list[EndpointHealth]:
        return []

    async def aclose(self) -> None:
        assert self.at_once == 0, "closed while something is fetched"
        self.closed = True

    async def _called(self, kind: str, repo: str = "") -> None:
        """Counts a call. Then waits, and raises the error, as `faults` says."""
        assert not self.closed
        self.calls[kind] += 1
        if self.faults.hold is not None:
            await self.faults.hold.wait()
        if self.faults.down is not None:
            raise self.faults.down
        if repo in self.faults.manifest_errors:
            raise self.faults.manifest_errors[repo]

    async def fetch_blob(
        self,
        repo: RepositoryName,
        digest: Digest,
        span: Span,
        sink: BlobSink,
        avoid: Collection[str] = (),
        refused: Collection[str] = (),
        expected_size: int | None = None,
    ) -> None:
        assert not self.closed
        self.calls["get blob"] += 1
        self.requested_spans.setdefault(digest, []).append(span)
        self.requested_repos.setdefault(digest, []).append(repo)
        self.on_fetch(digest)
        stalled_repos = self.faults.stalled_repos
        if self.faults.stall is not None and (stalled_repos is None or repo in stalled_repos):
            await self.faults.stall.wait()
        if self.faults.down is not None:
            raise self.faults.down
        if repo in self.faults.errors:
            raise self.faults.errors[repo]
        data = self.blobs.get((repo, digest))
        if data is None:
            raise BlobUnknown
        start, stop = span.to_offsets(len(data)) if data else (0, 0)
        if self.faults.refuses_ranges and span != Span(0):
            raise UpstreamUnavailable("the upstream registry answers 416")
        if not self.faults.ranges and (start, stop) != (0, len(data)):
            raise RangesUnsupported
        reachable = [e for e in self.endpoints if e not in self.faults.unreachable]
        endpoint = min(reachable, key=lambda e: (e in refused, e in avoid))
        sending = _Sending(self, digest, endpoint, data, start, stop, sink)
        self.at_once += 1
        self._sending.add(sending)
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await sending.run()
        finally:
            self.at_once -= 1
            self._sending.remove(sending)


class _Sending:
    """Sends one response in a thread of its own. After a cancellation, it ends before the next chunk."""

    def __init__(
        self, source: FakeSource, digest: Digest, endpoint: str, data: bytes, start: int, stop: int, sink: BlobSink
    ) -> None:
        self._source = source
        self._digest = digest
        self._endpoint = endpoint
        self._data = data
        self._start, self._stop = start, stop
        self._sink = sink
        self._drop = source.faults.drops.pop(0) if source.faults.drops else None  # bytes before the connection breaks
        self.cancelled = threading.Event()

    async def run(self) -> None:
        thread = asyncio.ensure_future(asyncio.to_thread(self._send))
        try:
            await asyncio.shield(thread)
        except asyncio.CancelledError:
            self.cancelled.set()
            await asyncio.gather(thread, return_exceptions=True)
            raise

    def _send(self) -> None:
        wrong = self._endpoint in self._source.faults.corrupt
        self._sink.begin(self._endpoint, self._start, self._stop, len(self._data))
        position = self._start
        sent = self._source.sent.setdefault(self._digest, [])
        while position < self._stop:
            stop = min(self._stop, position + CHUNK - position % CHUNK)
            if self._drop is not None and position + self._drop - self._start < stop:
                stop = self._start + self._drop
            if stop > position:
                self._wait(position, stop)
                chunk = bytearray(self._data[position:stop])
                if wrong:
                    chunk[0] ^= 1
                sent.append((position, stop))
                self._sink.take(position, memoryview(chunk))
            position = stop
            if self._drop is not None and position - self._start >= self._drop:
                raise UpstreamUnavailable("the connection broke")

    def _wait(self, position: int, stop: int) -> None:
        for offset, gate in list(self._source.faults.gates.items()):
            while position <= offset < stop and not gate.wait(0.01):
                if self.cancelled.is_set():
                    raise UpstreamUnavailable("cancelled")
        if self.cancelled.is_set():
            raise UpstreamUnavailable("cancelled")


def missing_digest() -> Digest:
    return digest_of(b"nobody has this")
