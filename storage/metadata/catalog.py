"""What exists and who points at what (`Metadata`): one method, one transaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from storage.content import Actor, Condition, Descriptor, Manifest, Page
from storage.names import Digest, Reference, RepositoryName, Tag, UploadID
from storage.patterns import NameSet

NOBODY = ""
"""The owner of an upload session that everybody may go on with."""


@dataclass(frozen=True, slots=True)
class BlobRow:
    """A blob as a repository has it. `is_unreferenced`: nothing in the repository refers to it; the collector may take
    it."""

    digest: Digest
    size: int
    place: str
    is_unreferenced: bool
    needed: float


@dataclass(frozen=True, slots=True)
class UploadRow:
    """An upload session: what its digest covers so far, under which run of the machine its bytes were written, and
    whose it is."""

    id: UploadID
    repository: RepositoryName
    algorithm: str
    offset: int
    state: bytes | None
    boot: str
    owner: str


@dataclass(frozen=True, slots=True)
class DroppedLink:
    """A blob that may have lost its last reference in a repository (by its number)."""

    repository: int
    digest: Digest


class Metadata(Protocol):
    """Changes return when they are durable, unless said otherwise. Errors: StorageFull, StorageFailed, those named."""

    @property
    def version(self) -> Callable[[], object]:
        """Gives a mark of all that is kept there, accounts included. Equal ones mean that nothing has changed in
        between, by any process; what is looked up after a mark was taken is at least as new as it."""
        ...

    async def blob(self, repo: RepositoryName, digest: Digest) -> BlobRow:
        """Raises BlobUnknown."""
        ...

    async def need_blob(self, repo: RepositoryName, digest: Digest) -> None:
        """Says that a client was told the blob is there (not durable). Raises BlobUnknown."""
        ...

    async def add_blob(self, repo: RepositoryName, digest: Digest, size: int, place: str, upload: UploadID) -> None:
        """A published blob becomes the repository's; its upload session ends. Raises BlobUploadUnknown."""
        ...

    async def adopt_blob(self, repo: RepositoryName, digest: Digest, size: int, place: str) -> None:
        """A published blob that came without an upload session becomes the repository's."""
        ...

    async def mount_blob(
        self, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor
    ) -> int:
        """Returns the blob's size. Raises BlobUnknown."""
        ...

    async def delete_blob(self, repo: RepositoryName, digest: Digest, by: Actor, even_if_referenced: bool) -> None: ...

    async def start_upload(self, upload: UploadID, repo: RepositoryName, algorithm: str, boot: str, owner: str) -> None:
        """Not durable, as with all of an upload's progress: a power cut may forget it."""
        ...

    async def upload(self, repo: RepositoryName, upload: UploadID) -> UploadRow:
        """Raises BlobUploadUnknown."""
        ...

    async def save_upload(self, upload: UploadID, offset: int, state: bytes | None, boot: str) -> None:
        """Not durable. Raises BlobUploadUnknown."""
        ...

    async def end_upload(self, upload: UploadID) -> None:
        """Not durable. Raises BlobUploadUnknown."""
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
        """Whether anything was ever put there; also when all of it is deleted."""
        ...

    async def repositories(self, after: str | None, limit: int, within: NameSet) -> Page[RepositoryName]: ...

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]: ...

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]: ...

    # What the collector asks for.

    async def dropped_links(self, before: float, limit: int) -> list[DroppedLink]:
        """Blobs whose last reference in a repository was dropped before `before`, oldest first."""
        ...

    async def dropped_blobs(self, limit: int) -> list[Digest]:
        """Blobs that the last repository let go."""
        ...

    async def drop_link(self, entry: DroppedLink, before: float) -> bool:
        """Takes a blob out of a repository in which nothing refers to it and nobody needed it since `before`. Returns
        whether it did; in any case the queue is brought up to date."""
        ...

    async def drop_blob(self, digest: Digest) -> str | None:
        """Removes the row of a blob no repository has; returns its place, or None where one has it (again). Call it
        with the digest's lock held, and take the file away after."""
        ...

    async def known_blobs(self, digests: Sequence[Digest]) -> set[Digest]:
        """Those of `digests` that have a row."""
        ...

    async def stale_uploads(self, before: float, limit: int) -> list[UploadID]: ...

    async def drop_upload(self, upload: UploadID, before: float) -> bool:
        """Ends a session without progress since `before`. False: it made some, or is gone. Not durable."""
        ...

    async def known_uploads(self, uploads: Sequence[UploadID]) -> set[UploadID]: ...
