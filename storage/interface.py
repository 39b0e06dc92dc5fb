"""The one interface between what registry content is and how it is served: `Registry`.

Everything is a `Registry`, wraps one, or is handed one. Errors are those of `storage.errors`. Opening is awaited and
raises before anything is sent, so a fallback is a plain `try … except BlobUnknown`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol, runtime_checkable

from storage.content import (
    Actor,
    Allowance,
    BadSender,
    Condition,
    Descriptor,
    Manifest,
    OpenFile,
    Page,
    PartialFailures,
    Span,
    UpstreamCheck,
)
from storage.names import Digest, Reference, RepositoryName, Tag, UploadID
from storage.patterns import ALL_NAMES, NameSet


class BlobReader(Protocol):
    """An opened blob. Iterating yields the bytes of `span`; `aclose` may be called at any time, more than once."""

    descriptor: Descriptor
    """Of the whole blob."""
    span: tuple[int, int]
    """First byte and the one after the last: what iterating yields."""
    data: bytes | None
    """All of `span`, where opening it has read that already, as it does with little."""
    file: OpenFile | None
    """The open file and the offset of byte 0, where the bytes lie in one file: a server can send it without copying."""
    location: str | None
    """A self-authorising address of the bytes, where the store offers one."""
    is_incomplete: bool
    """The blob is still on its way in: its bytes may have to be waited for."""

    async def ready(self, at: int) -> int:
        """Waits until the byte at `at` (inside `span`) is in `file`; how far the bytes reach from there without a gap,
        inside `span`. A blob that is still on its way in grows; its last byte is there only once its digest is checked.
        Raises what iterating raises. A cancellation leaves nothing."""
        ...

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def aclose(self) -> None: ...


class BlobWriter(Protocol):
    """An upload session. This caller owns it until a newer request resumes it; then every call raises
    BlobUploadInvalid."""

    id: UploadID

    @property
    def offset(self) -> int:
        """Bytes taken so far. After `aclose`, all of them survive this process."""
        ...

    async def write(self, data: bytes | memoryview) -> None:
        """Appends. The memory of a view is the writer's from now on: it is read later, so nobody may change it. Raises
        StorageFull, StorageFailed, BlobUploadInvalid (taken over). Cancelled: the session keeps what was written
        before."""
        ...

    async def read_at(self, offset: int, length: int) -> bytes:
        """Bytes already written."""
        ...

    async def commit(self, digest: Digest) -> Descriptor:
        """Makes the content a blob of the repository, durably, and ends the session. Raises DigestInvalid (the content
        has another digest; the session ends and keeps nothing), StorageFull, StorageFailed. Cancelled: it is either
        done or not, never half."""
        ...

    async def cancel(self) -> None:
        """Ends the session and drops its bytes."""
        ...

    async def aclose(self) -> None:
        """Lets go of the session, which stays for `resume_upload`. After `commit` or `cancel`, and the second time, it
        does nothing. Raises BlobUploadInvalid, StorageFull, StorageFailed when bytes that were taken could not be
        kept: they must not be acknowledged."""
        ...


class Reader(Protocol):
    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        """Raises BlobUnknown. A client that was told a blob is here may rely on it for the collector's grace time."""
        ...

    async def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None = None) -> BlobReader:
        """Raises BlobUnknown, RangeInvalid (with the size)."""
        ...

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        """Raises ManifestUnknown."""
        ...

    async def get_manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        """The manifest as it was pushed, byte for byte. Raises ManifestUnknown."""
        ...


class Writer(Protocol):
    async def start_upload(
        self, repo: RepositoryName, algorithm: str = "sha256", *, by: Actor | None = None
    ) -> BlobWriter:
        """A new session, hashed with `algorithm` while it is written. It is `by`'s (None: nobody's): others do not find
        it. Raises DigestInvalid for an unknown algorithm."""
        ...

    async def resume_upload(
        self, repo: RepositoryName, upload: UploadID, offset: int | None = None, *, by: Actor | None = None
    ) -> BlobWriter:
        """Takes a session over, at once, from whichever request has it. Raises BlobUploadUnknown, also for a session of
        somebody else than `by` (None: who asks may take any); RangeInvalid (with the offset) when the session does not
        stand at `offset`; no request loses it then."""
        ...

    async def upload_offset(self, repo: RepositoryName, upload: UploadID, *, by: Actor | None = None) -> int:
        """Bytes the session has, without taking it over. Raises BlobUploadUnknown, as `resume_upload` does."""
        ...

    async def mount_blob(
        self, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor
    ) -> Descriptor:
        """Gives `repo` a blob that `source` has; of a set, any repository in it. Raises BlobUnknown."""
        ...

    async def put_manifest(
        self,
        repo: RepositoryName,
        manifest: Manifest,
        tags: Sequence[Tag] = (),
        *,
        by: Actor,
        sparse: bool = False,
        condition: Condition | None = None,
    ) -> Descriptor:
        """Stores a manifest and points `tags` at it, in one transaction. Raises ManifestBlobUnknown (children or blobs
        missing, unless `sparse`), PreconditionFailed (`condition` does not hold for the first tag)."""
        ...


class Deleter(Protocol):
    async def delete_blob(
        self, repo: RepositoryName, digest: Digest, *, by: Actor, even_if_referenced: bool = False
    ) -> None:
        """Takes the blob out of the repository. Raises BlobUnknown; Unsupported: a manifest of the repository refers to
        it, unless `even_if_referenced`: of a mirror's content, which can be had again."""
        ...

    async def delete_manifest(self, repo: RepositoryName, digest: Digest, *, by: Actor) -> None:
        """Takes the manifest and every tag at it out of the repository. Raises ManifestUnknown, NameUnknown."""
        ...

    async def delete_tag(self, repo: RepositoryName, tag: Tag, *, by: Actor) -> None:
        """Takes just the tag away. Raises ManifestUnknown, NameUnknown."""
        ...


class Lister(Protocol):
    """Lists are in byte order, strictly after `after` (which need not exist, nor be a valid name), at most `limit`."""

    async def repositories(self, after: str | None, limit: int, within: NameSet = ALL_NAMES) -> Page[RepositoryName]:
        """The repositories that hold a manifest, those outside `within` left out: pages are as full as there are."""
        ...

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        """Raises NameUnknown. A repository that once had content and has no tag gives an empty page."""
        ...

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        """Manifests whose subject is `subject`, by digest; none for an unknown repository. A page may end before
        `limit` when it grows large; `more` says so."""
        ...


@runtime_checkable
class Registry(Reader, Writer, Deleter, Lister, Protocol):
    """All of it."""


class Partial(Protocol):
    """A blob on its way in from an upstream: bytes in a file, and which of them are there. All processes see the same.

    One process at a time owns it: only the owner writes, and when it dies, the next to ask becomes the owner and goes
    on with what is there. `write_at` blocks; it is called in threads, all else on the event loop.
    """

    digest: Digest
    size: int
    file: OpenFile
    """Open for reading, also after `commit` has put it in its place, until `close`."""

    @property
    def owned(self) -> bool:
        """This object is the owner's."""
        ...

    def own(self) -> bool:
        """Becomes the owner, if nobody is; whether it is now. Never waits."""
        ...

    def missing(self) -> list[tuple[int, int]]:
        """What is not there yet: starts and stops, in order."""
        ...

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """The owner's: puts bytes in their place; readers see them at once. Blocking; may be called in several threads.
        Raises StorageFull, StorageFailed, PartialLost (it is not ours any more, or was given up)."""
        ...

    async def wait(self, at: int) -> int:
        """Waits until the byte at `at` is there; how far the bytes reach from there without a gap (at most `size`).
        `at` equal to `size` waits for the digest check: returns `size` once the blob is content. Raises PartialLost
        when nobody owns it any more and bytes are wanting (the caller may `own` it and go on), DigestInvalid when the
        bytes proved to be wrong. A cancellation leaves nothing."""
        ...

    def want(self) -> None:
        """Somebody waits for it: its owner, in whatever process, finds it `wanted`, until this is closed. Raises
        StorageFailed."""
        ...

    @property
    def wanted(self) -> bool:
        """Somebody else than the holder of this object waits for it, in any process. A call to the system; raises
        StorageFailed."""
        ...

    def begin(self) -> None:
        """The owner's: from now on it asks its source for bytes. Raises StorageFailed."""
        ...

    @property
    def begun(self) -> bool:
        """Its owner, in whatever process, asks for bytes; else it has not come to its turn. Raises StorageFailed."""
        ...

    async def report_failure(self, reason: str) -> None:
        """The owner's, before `close`: tells all who follow why it goes. What has come stays. Raises nothing: where it
        cannot be told, they learn only that there is no owner any more."""
        ...

    @property
    def owner_failures(self) -> PartialFailures:
        """Who follows compares what it was before. A call to the system; raises StorageFailed."""
        ...

    async def commit(self, repo: RepositoryName, blame: Callable[[], Awaitable[None]] | None = None) -> Descriptor:
        """The owner's, with nothing missing: checks the digest (most of it was hashed while it came), makes the bytes a
        blob of `repo`, durably, and tells all who wait. Raises DigestInvalid (nothing is kept; those who wait get it
        too), StorageFull, StorageFailed. `blame` is called for wrong bytes, before anybody learns of them. Cancelled:
        done or not, never half."""
        ...

    def close(self) -> None:
        """Lets go of it: the owner's place is free, what has come stays for the next. Idempotent."""
        ...


class Partials(Protocol):
    """Blobs on their way in, shared by all processes of a data directory."""

    async def claim(self, digest: Digest, size: int, source: str = "") -> Partial:
        """The partial blob, made where there is none; owned, if nobody else owns it. `source` is whose bytes they are:
        one that comes from there is shared with nobody who asks elsewhere. Nor is one of another `size`. Raises
        StorageFull, StorageFailed, SizeInvalid (below 0)."""
        ...

    async def expire(self, before: float) -> int:
        """Drops those nobody owns that were not written since `before` (seconds since 1970); how many."""
        ...


class UpstreamRecords(Protocol):
    """What the mirror remembers of its upstreams, shared by all processes and kept over restarts. Only
    `confirm` is durable: a power cut may forget the rest, and it is asked for again."""

    async def check(self, repo: RepositoryName, reference: Reference, *, blob: bool = False) -> UpstreamCheck | None:
        """When an upstream was last asked about that reference, and what it said: about the manifest, or the `blob` of
        that digest. Clients choose references; none of a manifest is ever taken for a blob's."""
        ...

    async def note_check(
        self, repo: RepositoryName, reference: Reference, known: bool, *, blob: bool = False
    ) -> None: ...

    async def forget_checks(
        self, repo: RepositoryName, reference: Reference | None = None, *, blob: bool = False
    ) -> None:
        """What was said of `reference`, or of all in `repo`, counts no more."""
        ...

    async def referring_manifests(self, repo: RepositoryName, digest: Digest) -> list[Manifest]:
        """The manifests of `repo` that name the blob `digest` as config or layer, newest first, at most 8."""
        ...

    async def find_holder(self, prefix: str, digest: Digest) -> RepositoryName | None:
        """A repository that has the blob, of those whose names begin with `prefix`, which ends with a '/'."""
        ...

    async def confirmed(self, repo: RepositoryName, digest: Digest) -> bool:
        """Whether the repository has the blob by its upstream's own word: its bytes came for this repository, or
        `confirm` was called. False as well when the repository does not have the blob."""
        ...

    async def confirm(self, repo: RepositoryName, digest: Digest) -> None:
        """The upstream says that the repository has the blob. Kept with the blob's link to the repository, and only
        where there is one."""
        ...

    async def bad_senders(self, upstream: str, digest: Digest, seconds: float) -> Mapping[str, BadSender]:
        """The endpoints that sent wrong bytes for the blob, the last time at most so many seconds ago."""
        ...

    async def note_bad_senders(self, upstream: str, digest: Digest, endpoints: Collection[str], seconds: float) -> None:
        """They did once more. What is older than so many seconds is forgotten."""
        ...

    async def forget_bad_senders(self, upstream: str, digests: Collection[Digest]) -> int:
        """Nobody is known to have sent wrong bytes for these blobs any more; for how many of them somebody was."""
        ...

    async def token(self, key: str) -> tuple[str, float] | None:
        """A token and when it expires (seconds since 1970); None: none is kept, or it has expired."""
        ...

    async def keep_token(self, key: str, token: str, expires: float) -> None: ...

    async def drop_token(self, key: str, token: str) -> None:
        """The upstream refused it. Another one kept meanwhile stays."""
        ...

    async def allowance(self, upstream: str) -> Allowance | None:
        """`upstream` may also name requests of one kind at one of its endpoints: those have limits of their own."""
        ...

    async def note_allowance(self, upstream: str, allowance: Allowance) -> None:
        """What is left is as the newest says, and `until` the latest of all: who tells what is left forgets no wish."""
        ...


class DigestLocks(Protocol):
    """Locks by digest, across all processes. A process that dies loses its locks.

    Held from before the bytes of a blob are published until its row is committed, and from before a row is removed
    until its bytes are: so a push and a collection of one digest cannot cross."""

    def hold(self, digest: Digest) -> AbstractAsyncContextManager[None]:
        """Waits for the lock of `digest` and holds it inside the block. Raises StorageFull, StorageFailed."""
        ...


class Leases(Protocol):
    """Whose turn it is, over all processes. What a process holds falls when it dies."""

    def take(self, key: str) -> AbstractAsyncContextManager[None]:
        """Waits for the turn at `key`, and has it inside the block."""
        ...

    def slot(self, name: str, count: int, leave: int = 0) -> AbstractAsyncContextManager[None]:
        """Waits until one of `count` slots of `name` is free, and has it inside the block. `leave`: at least that many
        others must be free as well, so that they stay for more urgent ones."""
        ...

    def try_slot(self, name: str, count: int, leave: int = 0) -> AbstractAsyncContextManager[bool]:
        """The same without waiting; whether it has one."""
        ...
