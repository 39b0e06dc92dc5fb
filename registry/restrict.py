"""`Restricted`: a registry whose writes or deletes are switched off (`read_only`, `delete`)."""

from __future__ import annotations

from collections.abc import Sequence

from storage.content import Actor, Condition, Descriptor, Manifest
from storage.errors import Unsupported
from storage.interface import BlobWriter, Registry
from storage.names import Digest, RepositoryName, Tag, UploadID
from storage.patterns import NameSet
from storage.wrappers import ReadOnlyRegistry


class Restricted(ReadOnlyRegistry):
    """`inner` without what is switched off: that raises Unsupported. With `read_only` deletes are off as well."""

    def __init__(self, inner: Registry, *, read_only: bool = False, delete: bool = True) -> None:
        super().__init__(inner)
        self._read_only = read_only
        self._delete = delete

    def _check_write(self) -> None:
        if self._read_only:
            raise Unsupported("this registry is read-only")

    def _check_delete(self) -> None:
        self._check_write()
        if not self._delete:
            raise Unsupported("this registry deletes nothing at a client's request")

    async def start_upload(
        self, repo: RepositoryName, algorithm: str = "sha256", *, by: Actor | None = None
    ) -> BlobWriter:
        self._check_write()
        return await self.inner.start_upload(repo, algorithm, by=by)

    async def resume_upload(
        self, repo: RepositoryName, upload: UploadID, offset: int | None = None, *, by: Actor | None = None
    ) -> BlobWriter:
        self._check_write()
        return await self.inner.resume_upload(repo, upload, offset, by=by)

    async def upload_offset(self, repo: RepositoryName, upload: UploadID, *, by: Actor | None = None) -> int:
        self._check_write()
        return await self.inner.upload_offset(repo, upload, by=by)

    async def mount_blob(
        self, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor
    ) -> Descriptor:
        self._check_write()
        return await self.inner.mount_blob(repo, digest, source, by)

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
        self._check_write()
        return await self.inner.put_manifest(repo, manifest, tags, by=by, sparse=sparse, condition=condition)

    async def delete_blob(
        self, repo: RepositoryName, digest: Digest, *, by: Actor, even_if_referenced: bool = False
    ) -> None:
        self._check_delete()
        await self.inner.delete_blob(repo, digest, by=by, even_if_referenced=even_if_referenced)

    async def delete_manifest(self, repo: RepositoryName, digest: Digest, *, by: Actor) -> None:
        self._check_delete()
        await self.inner.delete_manifest(repo, digest, by=by)

    async def delete_tag(self, repo: RepositoryName, tag: Tag, *, by: Actor) -> None:
        self._check_delete()
        await self.inner.delete_tag(repo, tag, by=by)
