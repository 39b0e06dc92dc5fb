"""Which blobs, manifests, tags and upload sessions there are (`Metadata`). Each method is one transaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from storage.content import Actor, Condition, Descriptor, Manifest, Page
from storage.names import Digest, Reference, RepositoryName, Tag, UploadID
from storage.patterns import NameSet

NOBODY = ""
"""Owner of an upload session that everybody may continue."""


@dataclass(frozen=True, slots=True)
class BlobRow:
    """A blob of a repository. `place`: key in the blob store, opaque here. `is_unreferenced`: no manifest of the
    repository refers to it, so the collector may remove it. `needed`: when a client last relied on it (seconds since
    1970)."""

    digest: Digest
    size: int
    place: str
    is_unreferenced: bool
    needed: float


@dataclass(frozen=True, slots=True)
class UploadRow:
    """An upload session. `offset`, `state`, `boot`: its last checkpoint (`storage.blobs.blob_store.Checkpoint`).
    `owner`: the actor that may continue it."""

    id: UploadID
    repository: RepositoryName
    algorithm: str
    offset: int
    state: bytes | None
    boot: str
    owner: str


@dataclass(frozen=True, slots=True)
class DroppedLink:
    """A blob that may have lost its last reference in a repository (given by its number)."""

    repository: int
    digest: Digest


class Metadata(Protocol):
    """Changes return when they are durable, unless noted otherwise. All raise StorageFull, StorageFailed, and the
    errors named."""

    @property
    def version(self) -> Callable[[], object]:
        """Function that returns the version of all stored data, accounts included. Two equal versions mean that no
        process has changed anything in between. A lookup after a version was taken sees at least its data."""
        ...

    async def blob(self, repo: RepositoryName, digest: Digest) -> BlobRow:
        """Returns a blob of the repository. Raises BlobUnknown."""
        ...

    async def need_blob(self, repo: RepositoryName, digest: Digest) -> None:
        """Stores that a client was told of the blob (not durable). Raises BlobUnknown."""
        ...

    async def add_blob(self, repo: RepositoryName, digest: Digest, size: int, place: str, upload: UploadID) -> None:
        """Adds a published blob to the repository, and ends its upload session. Raises BlobUploadUnknown."""
        ...

    async def adopt_blob(self, repo: RepositoryName, digest: Digest, size: int, place: str) -> None:
        """Adds a published blob without an upload session to the repository."""
        ...

    async def mount_blob(
        self, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor
    ) -> int:
        """Adds a blob of `source` to the repository, and returns its size. Raises BlobUnknown."""
        ...

    async def delete_blob(self, repo: RepositoryName, digest: Digest, by: Actor, even_if_referenced: bool) -> None: ...

    async def start_upload(self, upload: UploadID, repo: RepositoryName, algorithm: str, boot: str, owner: str) -> None:
        """Stores a new session. Not durable, like all progress of uploads: a power cut may lose it."""
        ...

    async def upload(self, repo: RepositoryName, upload: UploadID) -> UploadRow:
        """Returns the session. Raises BlobUploadUnknown."""
        ...

    async def save_upload(self, upload: UploadID, offset: int, state: bytes | None, boot: str) -> None:
        """Stores a checkpoint, unless a later one is stored. Not durable. Raises BlobUploadUnknown."""
        ...

    async def end_upload(self, upload: UploadID) -> None:
        """Deletes the session. Not durable. Raises BlobUploadUnknown."""
        ...

    async def manifest_descriptor(self, repo: RepositoryName, reference: Reference) -> Descriptor: ...

    async def manifest(self, repo: RepositoryName, reference: Reference) -> Manifest: ...

    async def put_manifest(
        self,
        repo: RepositoryName,
        manifest: Manifest,
        tags: Sequence[Tag],
        by: Actor,
        sparse: bool,
        condition: Condition | None,
    ) -> None: ...

    async def delete_manifest(self, repo: RepositoryName, digest: Digest, by: Actor) -> None: ...

    async def delete_tag(self, repo: RepositoryName, tag: Tag, by: Actor) -> None: ...

    async def is_known_repository(self, repo: RepositoryName) -> bool:
        """Returns whether the repository ever had content, even if all of it was deleted."""
        ...

    async def repositories(self, after: str | None, limit: int, within: NameSet) -> Page[RepositoryName]: ...

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]: ...

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]: ...

    # For the collector

    async def dropped_links(self, before: float, limit: int) -> list[DroppedLink]:
        """Returns blobs whose last reference in a repository was dropped before `before`, oldest first."""
        ...

    async def dropped_blobs(self, limit: int) -> list[Digest]:
        """Returns blobs that no repository has any more."""
        ...

    async def drop_link(self, entry: DroppedLink, before: float) -> bool:
        """Removes a blob from a repository if nothing there refers to it and no client relied on it since `before`.
        Returns whether it did; updates the queue in either case."""
        ...

    async def drop_blob(self, digest: Digest) -> str | None:
        """Deletes the row of a blob and returns its place; does nothing and returns None if a repository has the blob
        again. Call it with the digest's lock held, and remove the bytes afterwards."""
        ...

    async def known_blobs(self, digests: Sequence[Digest]) -> set[Digest]:
        """Returns those of `digests` that have a row."""
        ...

    async def stale_uploads(self, before: float, limit: int) -> list[UploadID]: ...

    async def drop_upload(self, upload: UploadID, before: float) -> bool:
        """Deletes a session without progress since `before`. Returns False if it made progress or is gone. Not
        durable."""
        ...

    async def known_uploads(self, uploads: Sequence[UploadID]) -> set[UploadID]: ...
