"""A registry in plain dicts (`MemoryRegistry`): the reference model of `storage.interface.Registry`.

The model defines the correct behaviour of a registry. Contract and model tests compare other registries with the model.
Tests that need no disk use the model instead of another registry. No method yields to the event loop, so each call is
one transaction. The content is lost when the process ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from storage.content import BLOB_TYPE, Actor, Condition, Descriptor, Manifest, Page, Span, digest_of
from storage.errors import (
    BlobUnknown,
    BlobUploadInvalid,
    BlobUploadUnknown,
    DigestInvalid,
    ManifestBlobUnknown,
    ManifestUnknown,
    NameUnknown,
    PreconditionFailed,
    RangeInvalid,
    blob_in_use_error,
)
from storage.memory_blob_reader import MemoryBlobReader
from storage.names import Digest, Reference, RepositoryName, Tag, UploadID, as_algorithm
from storage.patterns import ALL_NAMES, NameSet
from storage.tag_rules import (
    NO_IMMUTABLE_TAGS,
    ImmutableTags,
    immutable_delete_denied,
    immutable_tag_denied,
    immutable_type_denied,
)

S = TypeVar("S", bound=str)


def _page(items: Iterable[S], after: str | None, limit: int) -> Page[S]:
    """Returns a page of the `items` that sort after `after`; None: the first page. The interface demands the order of
    the UTF-8 bytes. This is also the order in which Python sorts strings."""
    items_after = [item for item in sorted(items) if after is None or item > after]
    return Page(items_after[:limit], len(items_after) > limit)


def _blob_descriptor(digest: Digest, data: bytes) -> Descriptor:
    return Descriptor(BLOB_TYPE, digest, len(data))


def _blobs_referred_to(manifest: Manifest) -> set[Digest]:
    """Returns the digests of the blobs that the manifest refers to. For an index, these include `blob_children`: the
    entries that have neither the media type of a manifest nor that of an index, and so may be blobs. Garbage collection
    keeps the blobs with these digests."""
    return {part.digest for part in manifest.blobs} | manifest.blob_children


@dataclass
class _Repository:
    """A repository that has or had content. `last_used`: for each blob, the time in seconds when a client last added
    the blob, resolved the blob, or deleted a manifest that referred to the blob."""

    blobs: dict[Digest, bytes] = field(default_factory=dict)
    last_used: dict[Digest, float] = field(default_factory=dict)
    manifests: dict[Digest, Manifest] = field(default_factory=dict)
    tags: dict[Tag, Digest] = field(default_factory=dict)

    def blobs_referred_to(self) -> set[Digest]:
        """Returns the digests of the blobs that the manifests of this repository refer to."""
        return {digest for manifest in self.manifests.values() for digest in _blobs_referred_to(manifest)}

    def manifests_needing(self, digest: Digest) -> set[Digest]:
        """Returns `digest` itself, and the digests of all indexes that list `digest` directly or through other
        indexes."""
        needing: set[Digest] = set()
        added = {digest}
        while added:
            needing |= added
            parents = (
                index for index in self.manifests.values() if added & {child.digest for child in index.manifests}
            )
            added = {parent.digest for parent in parents} - needing
        return needing

    def missing_content(self, manifest: Manifest) -> set[Digest]:
        """Returns the digests of the content that the manifest refers to and that this repository does not have."""
        # Clients download foreign layers from other servers, so foreign layers are never missing.
        blobs = {part.digest for part in manifest.blobs} - manifest.foreign
        # An index entry that may be a blob is not missing if the repository has a blob with the digest of the entry.
        children = {part.digest for part in manifest.manifests} - (manifest.blob_children & self.blobs.keys())
        return (blobs - self.blobs.keys()) | (children - self.manifests.keys())


@dataclass
class _Session:
    """An upload session. `actor`: the name of the actor that started the session, who alone may resume it; None: any
    actor may resume the session. `generation`: how often the session was resumed. Only the newest writer may use the
    session."""

    repo: RepositoryName
    actor: str | None
    data: bytearray = field(default_factory=bytearray)
    generation: int = 0

    def is_open_to(self, by: Actor | None) -> bool:
        """Returns whether `by` is allowed to resume the session. If `by` is None, the actor is not checked."""
        return by is None or self.actor in (None, by.name)


class MemoryBlobWriter:
    """A `BlobWriter` for an upload session of a `MemoryRegistry`."""

    def __init__(self, registry: MemoryRegistry, upload: UploadID, session: _Session) -> None:
        self.id = upload
        self._registry = registry
        self._session = session
        self._generation = session.generation
        self._offset = len(session.data)
        self._closed = False

    @property
    def offset(self) -> int:
        return self._offset

    def _checked_session(self) -> _Session:
        """Returns the session. Raises BlobUploadInvalid if the session has ended, this writer was closed, or a newer
        request has resumed the session."""
        if self._closed or not self._registry.is_live(self.id, self._session):
            raise BlobUploadInvalid("this upload session has ended, or its writer was closed")
        if self._session.generation != self._generation:
            raise BlobUploadInvalid("a newer request has taken this upload session over")
        return self._session

    async def write(self, data: bytes | memoryview) -> None:
        session = self._checked_session()
        session.data += data
        self._offset = len(session.data)

    async def read_at(self, offset: int, length: int) -> bytes:
        return bytes(self._checked_session().data[offset : offset + length])

    async def commit(self, digest: Digest) -> Descriptor:
        session = self._checked_session()
        self._registry.end_upload(self.id)
        data = bytes(session.data)
        actual = digest_of(data, digest.algorithm)
        if actual != digest:
            raise DigestInvalid("the content has another digest", {"expected": digest, "actual": actual})
        return self._registry.add_blob(session.repo, digest, data)

    async def cancel(self) -> None:
        self._checked_session()
        self._registry.end_upload(self.id)

    async def aclose(self) -> None:
        self._closed = True


class MemoryRegistry:
    """A `Registry` in memory. `clock`: returns the time in seconds; only `collect` depends on the time.
    `immutable_tags`: the rules that say which tags cannot be changed."""

    def __init__(
        self, clock: Callable[[], float] = time.time, immutable_tags: ImmutableTags = NO_IMMUTABLE_TAGS
    ) -> None:
        self._clock = clock
        self._immutable_tags = immutable_tags
        self._repositories: dict[RepositoryName, _Repository] = {}
        self._uploads: dict[UploadID, _Session] = {}

    # Lookups

    def _known_repository(self, repo: RepositoryName) -> _Repository:
        """Returns the repository. Raises NameUnknown if the repository never had content."""
        if repo not in self._repositories:
            raise NameUnknown(detail={"name": repo})
        return self._repositories[repo]

    def _repository(self, repo: RepositoryName) -> _Repository:
        """Returns the repository for reading. If the repository never had content, returns an empty repository, which
        is not stored."""
        return self._repositories.get(repo, _Repository())

    def _repository_with_blob(self, repo: RepositoryName, digest: Digest) -> _Repository:
        """Returns the repository. Raises BlobUnknown if the repository does not have the blob."""
        repository = self._repository(repo)
        if digest not in repository.blobs:
            raise BlobUnknown(detail={"digest": digest})
        return repository

    def _immutable_tags_needing(self, repo: RepositoryName, repository: _Repository, digest: Digest) -> list[Tag]:
        """Returns the immutable tags that point at the manifest, or at an index that lists the manifest directly or
        through other indexes."""
        needing = repository.manifests_needing(digest)
        return [
            tag
            for tag, target in sorted(repository.tags.items())
            if target in needing and self._immutable_tags.is_immutable(repo, tag)
        ]

    def _session(self, repo: RepositoryName, upload: UploadID, by: Actor | None) -> _Session:
        """Returns the session `upload`. Raises BlobUploadUnknown if the session does not exist or is not open to
        `by`."""
        session = self._uploads.get(upload)
        if session is None or session.repo != repo or not session.is_open_to(by):
            raise BlobUploadUnknown(detail={"upload": upload})
        return session

    # Called by `MemoryBlobWriter`

    def is_live(self, upload: UploadID, session: _Session) -> bool:
        """Returns whether `session` is in progress: neither committed nor cancelled. `upload`: the session's id."""
        return self._uploads.get(upload) is session

    def end_upload(self, upload: UploadID) -> None:
        """Deletes the session `upload` and its bytes."""
        del self._uploads[upload]

    def add_blob(self, repo: RepositoryName, digest: Digest, data: bytes) -> Descriptor:
        """Stores `data` as a blob of `repo` and returns the descriptor of the blob. Does not check the digest."""
        repository = self._repositories.setdefault(repo, _Repository())
        repository.blobs[digest] = data
        repository.last_used[digest] = self._clock()
        return _blob_descriptor(digest, data)

    # Reader

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        repository = self._repository_with_blob(repo, digest)
        repository.last_used[digest] = self._clock()
        return _blob_descriptor(digest, repository.blobs[digest])

    async def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None = None) -> MemoryBlobReader:
        data = self._repository_with_blob(repo, digest).blobs[digest]
        offsets = (0, len(data)) if span is None else span.to_offsets(len(data))
        return MemoryBlobReader(_blob_descriptor(digest, data), data, offsets)

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        return (await self.get_manifest(repo, reference)).descriptor

    async def get_manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        repository = self._repository(repo)
        digest = reference if isinstance(reference, Digest) else repository.tags.get(reference)
        if digest is None or digest not in repository.manifests:
            raise ManifestUnknown(detail={"reference": reference})
        return repository.manifests[digest]

    # Writer

    async def start_upload(
        self, repo: RepositoryName, algorithm: str = "sha256", *, by: Actor | None = None
    ) -> MemoryBlobWriter:
        as_algorithm(algorithm)
        upload = UploadID.random()
        session = self._uploads[upload] = _Session(repo, by.name if by else None)
        return MemoryBlobWriter(self, upload, session)

    async def resume_upload(
        self, repo: RepositoryName, upload: UploadID, offset: int | None = None, *, by: Actor | None = None
    ) -> MemoryBlobWriter:
        session = self._session(repo, upload, by)
        size = len(session.data)
        if offset is not None and offset != size:
            raise RangeInvalid(f"the upload has {size} bytes, so a chunk cannot start at {offset}", offset=size)
        session.generation += 1
        return MemoryBlobWriter(self, upload, session)

    async def upload_offset(self, repo: RepositoryName, upload: UploadID, *, by: Actor | None = None) -> int:
        return len(self._session(repo, upload, by).data)

    async def mount_blob(
        self, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor
    ) -> Descriptor:
        candidates = (
            [name for name in self._repositories if name in source] if isinstance(source, NameSet) else [source]
        )
        for name in candidates:
            if (data := self._repository(name).blobs.get(digest)) is not None:
                return self.add_blob(repo, digest, data)
        raise BlobUnknown(detail={"digest": digest})

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
        repository = self._repository(repo)
        if condition and tags and not condition.holds(repository.tags.get(tags[0])):
            raise PreconditionFailed(detail={"tag": tags[0]})
        for tag in tags:
            current = repository.tags.get(tag)
            if current is not None and current != manifest.digest and self._immutable_tags.is_immutable(repo, tag):
                raise immutable_tag_denied(repo, tag, current)
        if not sparse and (missing := repository.missing_content(manifest)):
            raise ManifestBlobUnknown(detail=[{"digest": digest} for digest in sorted(missing)])
        stored = repository.manifests.get(manifest.digest)
        if stored is not None and stored.media_type != manifest.media_type:
            # A push must not change the media type of a manifest that an immutable tag needs.
            for tag in self._immutable_tags_needing(repo, repository, manifest.digest):
                raise immutable_type_denied(repo, manifest.digest, stored.media_type, tag)
        repository = self._repositories.setdefault(repo, repository)
        repository.manifests[manifest.digest] = manifest
        repository.tags.update(dict.fromkeys(tags, manifest.digest))
        return manifest.descriptor

    # Deleter

    async def delete_blob(
        self, repo: RepositoryName, digest: Digest, *, by: Actor, even_if_referenced: bool = False
    ) -> None:
        repository = self._repository_with_blob(repo, digest)
        referring = sorted(
            manifest.digest for manifest in repository.manifests.values() if digest in _blobs_referred_to(manifest)
        )
        if referring and not even_if_referenced:
            raise blob_in_use_error(repo, digest, referring[0])
        del repository.blobs[digest], repository.last_used[digest]

    async def delete_manifest(
        self, repo: RepositoryName, digest: Digest, *, by: Actor, restorable: bool = True
    ) -> None:
        """Deletes the manifest. This registry never restores a manifest, so `restorable` has no effect."""
        repository = self._known_repository(repo)
        if digest not in repository.manifests:
            raise ManifestUnknown(detail={"reference": digest})
        for tag in self._immutable_tags_needing(repo, repository, digest):
            raise immutable_delete_denied(repo, tag, digest)
        manifest = repository.manifests.pop(digest)
        repository.tags = {tag: target for tag, target in repository.tags.items() if target != digest}
        repository.last_used.update(
            dict.fromkeys(_blobs_referred_to(manifest) & repository.blobs.keys(), self._clock())
        )

    async def delete_tag(
        self, repo: RepositoryName, tag: Tag, *, by: Actor, condition: Condition | None = None
    ) -> None:
        repository = self._known_repository(repo)
        if tag not in repository.tags:
            raise ManifestUnknown(detail={"reference": tag})
        if condition and not condition.holds(repository.tags[tag]):
            raise PreconditionFailed(detail={"tag": tag})
        if self._immutable_tags.is_immutable(repo, tag):
            raise immutable_delete_denied(repo, tag)
        del repository.tags[tag]

    # Lister

    async def repositories(self, after: str | None, limit: int, within: NameSet = ALL_NAMES) -> Page[RepositoryName]:
        listed = (name for name, repository in self._repositories.items() if repository.manifests and name in within)
        return _page(listed, after, limit)

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        return _page(self._known_repository(repo).tags, after, limit)

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        manifests = self._repository(repo).manifests
        listed = _page(
            (
                digest
                for digest, manifest in manifests.items()
                if manifest.subject == subject and artifact_type in (None, manifest.artifact_type)
            ),
            after,
            limit,
        )
        return Page([manifests[digest].descriptor for digest in listed.items], listed.more)

    # Upkeep

    def collect(self, grace: float) -> None:
        """Removes each blob of a repository that no manifest of the repository refers to, and whose last use
        (`_Repository.last_used`) was at least `grace` seconds ago."""
        unused_since = self._clock() - grace
        for repository in self._repositories.values():
            referred = repository.blobs_referred_to()
            for digest, last_used in list(repository.last_used.items()):
                if last_used <= unused_since and digest not in referred:
                    del repository.blobs[digest], repository.last_used[digest]
