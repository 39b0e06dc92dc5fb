"""Where wrappers start: a registry that refuses, one that only reads, one that hands everything on.

A wrapper that restricts starts at `RefusingRegistry` or `ReadOnlyRegistry`: a method nobody thought of is then refused,
not let through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from storage.content import Actor, Condition, Descriptor, Manifest, Page, Span
from storage.errors import Unsupported
from storage.interface import BlobReader, BlobWriter, Registry
from storage.names import Digest, Reference, RepositoryName, Tag, UploadID
from storage.patterns import ALL_NAMES, NameSet


class RefusingRegistry(Registry):
    """Refuses every call with `self.refuse()`: Unsupported, unless a subclass raises something else there."""

    def refuse(self) -> NoReturn:
        raise Unsupported

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        self.refuse()

    async def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None = None) -> BlobReader:
        self.refuse()

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        self.refuse()

    async def get_manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        self.refuse()

    async def start_upload(
        self, repo: RepositoryName, algorithm: str = "sha256", *, by: Actor | None = None
    ) -> BlobWriter:
        self.refuse()

    async def resume_upload(
        self, repo: RepositoryName, upload: UploadID, offset: int | None = None, *, by: Actor | None = None
    ) -> BlobWriter:
        self.refuse()

    async def upload_offset(self, repo: RepositoryName, upload: UploadID, *, by: Actor | None = None) -> int:
        self.refuse()

    async def mount_blob(
        self, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor
    ) -> Descriptor:
        self.refuse()

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
        self.refuse()

    async def delete_blob(
        self, repo: RepositoryName, digest: Digest, *, by: Actor, even_if_referenced: bool = False
    ) -> None:
        self.refuse()

    async def delete_manifest(self, repo: RepositoryName, digest: Digest, *, by: Actor) -> None:
        self.refuse()

    async def delete_tag(self, repo: RepositoryName, tag: Tag, *, by: Actor) -> None:
        self.refuse()

    async def repositories(self, after: str | None, limit: int, within: NameSet = ALL_NAMES) -> Page[RepositoryName]:
        self.refuse()

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        self.refuse()

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        self.refuse()


class ReadOnlyRegistry(RefusingRegistry):
    """Hands `Reader` and `Lister` calls on to `inner` and refuses the rest."""

    def __init__(self, inner: Registry) -> None:
        self.inner = inner

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        return await self.inner.resolve_blob(repo, digest)

    async def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None = None) -> BlobReader:
        return await self.inner.open_blob(repo, digest, span)

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        return await self.inner.resolve_manifest(repo, reference)

    async def get_manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        return await self.inner.get_manifest(repo, reference)

    async def repositories(self, after: str | None, limit: int, within: NameSet = ALL_NAMES) -> Page[RepositoryName]:
        return await self.inner.repositories(after, limit, within)

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        return await self.inner.tags(repo, after, limit)

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        return await self.inner.referrers(repo, subject, artifact_type, after, limit)
