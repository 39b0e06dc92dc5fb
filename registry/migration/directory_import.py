"""Imports the directory of a CNCF Distribution registry, the *old registry*. `DirectoryImport` is one import, and runs
in a job of the kind `import-registry`. This registry's server and the old registry may run at the same time.

The file of a blob becomes a blob of this registry by a hard link if a link is possible and safe, otherwise by a copy.
In both cases, the import reads the file and checks its digest. Manifests are small and go into the database.

The import reports a *problem* for content that it cannot import, and a *note* for a case in which no content is lost
(`ImportReport`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from registry.migration.distribution_directory import BrokenEntry, DistributionDirectory
from registry.migration.image_writer import ImageWriter
from registry.migration.import_report import ImportReport, RepositoryFilter
from registry.migration.workers import read_in_thread, run_workers
from registry.router import Router
from storage.blobs.blob_store import LinkRefused
from storage.content import Actor, Descriptor, Manifest
from storage.errors import BlobUnknown, DigestInvalid, RegistryError, StorageFailed, StorageFull
from storage.imports import ContentBroken, ImportInvalid
from storage.jobs import JSON, JobStopped
from storage.names import Digest, RepositoryName
from storage.running_digest import start_digest
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_runner import JobContext

KIND: Final = "import-registry"
"""The kind of the jobs that import a directory."""
READ_BYTES: Final = 4 * 1024 * 1024
"""Largest number of bytes of a file that are read in one call."""
REPOSITORIES_AT_A_TIME: Final = 3
"""Largest number of repositories that are imported at the same time."""
FATAL_ERRORS: Final = (StorageFull, StorageFailed, JobStopped)
"""Errors that end an import. After other errors, the import continues with the next image."""


class DirectoryContentSource:
    """The content of the old registry's directory. Implements `registry.migration.image_writer.ContentSource`."""

    def __init__(
        self, store: StoredRegistry, directory: DistributionDirectory, report: ImportReport, *, actor: str, copy: bool
    ) -> None:
        """`copy`: whether to copy all files, even those that could be linked."""
        self._store = store
        self._directory = directory
        self._report = report
        self._by = Actor(actor)
        self._may_link = not copy
        self._reported_refusals: set[str] = set()
        """The reasons of refused links. The report already has a note for each of these reasons."""

    async def get_manifest(self, repo: RepositoryName, digest: Digest) -> Manifest:
        return await asyncio.to_thread(self._directory.manifest, repo, digest)

    async def blob_size(self, repo: RepositoryName, digest: Digest) -> int:
        return await asyncio.to_thread(self._directory.blob_size, repo, digest)

    async def import_blob(self, repo: RepositoryName, blob: Descriptor) -> None:
        digest = blob.digest
        async with self._open_blob(repo, digest) as file_descriptor:
            size = os.fstat(file_descriptor).st_size
            if not await self._link(repo, digest, size, file_descriptor):
                await self._copy(repo, digest, file_descriptor)
                self._report.copied += 1
            self._report.bytes += size

    @asynccontextmanager
    async def _open_blob(self, repo: RepositoryName, digest: Digest) -> AsyncIterator[int]:
        """A context manager that opens the file of a blob, and closes it when the block ends. Raises ContentBroken if
        the old registry does not have the blob in `repo`, or if the file cannot be opened."""
        opening = asyncio.get_running_loop().run_in_executor(None, self._directory.open_blob, repo, digest)
        try:
            file_descriptor = await asyncio.shield(opening)  # a cancellation cannot stop the thread
        except asyncio.CancelledError:
            opening.add_done_callback(_close_opened)
            raise
        try:
            yield file_descriptor
        finally:
            os.close(file_descriptor)

    async def _link(self, repo: RepositoryName, digest: Digest, size: int, file_descriptor: int) -> bool:
        """Makes the open file a blob by a hard link. Returns False if the file has to be copied instead. Raises
        ContentBroken if the file cannot be read or has another digest."""
        if not self._may_link:
            return False
        passed_check = False
        try:
            # `prepare_link` only checks whether the file may be linked, before `_verify` reads the whole file.
            self._store.blobs.prepare_link(file_descriptor, digest, size)
            passed_check = True
            await self._verify(digest, file_descriptor)
            await self._store.link_blob(repo, digest, size, file_descriptor, self._by)
        except LinkRefused as refusal:
            if passed_check:
                # The operating system has refused the link, and would probably refuse all further links.
                self._may_link = False
            # Each reason gets one note, which names the first blob whose link was refused for this reason.
            reason = str(refusal)
            if reason not in self._reported_refusals:
                self._reported_refusals.add(reason)
                note = f"the files of this blob and of blobs with the same problem are copied, not linked: {reason}"
                self._report.record_note(repo, note, digest=digest)
            return False
        self._report.linked += 1
        return True

    async def _verify(self, digest: Digest, file_descriptor: int) -> None:
        """Reads the open file. Raises ContentBroken if its bytes have another digest."""
        running_digest = start_digest(digest.algorithm)

        def read(offset: int) -> int:
            data = _read(file_descriptor, offset, digest)
            running_digest.update(data)
            return len(data)

        offset = 0
        while count := await asyncio.to_thread(read, offset):
            offset += count
        if running_digest.digest() != digest:
            raise _wrong_digest(digest)

    async def _copy(self, repo: RepositoryName, digest: Digest, file_descriptor: int) -> None:
        """Stores a copy of the open file as a blob. Raises ContentBroken if its bytes have another digest."""
        writer = await self._store.start_upload(repo, digest.algorithm, by=self._by)
        try:
            while data := await asyncio.to_thread(_read, file_descriptor, writer.offset, digest):
                await writer.write(data)
            await writer.commit(digest)
        except DigestInvalid:
            raise _wrong_digest(digest) from None
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(writer.cancel()))
            raise
        finally:
            await writer.aclose()


class DirectoryImport:
    """One import of a directory. With `overwrite`, sets tags even if they were changed or deleted in this registry, and
    imports manifests even if retention has deleted them in this registry."""

    def __init__(
        self,
        store: StoredRegistry,
        router: Router,
        directory: DistributionDirectory,
        report: ImportReport,
        repositories: RepositoryFilter,
        *,
        actor: str,
        copy: bool,
        overwrite: bool,
    ) -> None:
        self._store = store
        self._router = router
        self._directory = directory
        self._report = report
        self._repositories = repositories
        self._overwrite = overwrite
        source = DirectoryContentSource(store, directory, report, actor=actor, copy=copy)
        self._image_writer = ImageWriter(store, source, report, actor=actor, overwrite=overwrite)

    async def run(self) -> None:
        """Imports the repositories. Raises `FATAL_ERRORS`. After such an error, this registry keeps the images that
        were already imported."""
        await run_workers(self._chosen_repositories(), self._import_repository, REPOSITORIES_AT_A_TIME)
        await self._report.show_progress("", save_now=True)
        for pattern in self._repositories.unmatched_patterns():
            self._report.record_note("", f"the pattern {pattern} matches no repository of the old registry")

    async def _chosen_repositories(self) -> AsyncIterator[RepositoryName]:
        """Yields the repositories to import."""
        async for entry in read_in_thread(self._directory.repositories()):
            if isinstance(entry, BrokenEntry):
                self._report.record_problem(entry.name, entry.reason)
            elif self._repositories.includes(entry):
                upstream = self._router.naming.upstream_of(entry)
                if upstream is None:
                    yield entry
                else:
                    problem = f"in this registry, the name belongs to the mirror of {upstream}"
                    self._report.record_problem(entry, problem)

    async def _import_repository(self, repo: RepositoryName) -> None:
        """Imports the tags and manifests of a repository. Raises only `FATAL_ERRORS`, and reports other errors as
        problems."""
        self._report.repositories += 1
        reported: set[Digest] = set()  # manifests for which a problem was reported
        async for tag in read_in_thread(self._directory.tags(repo)):
            await self._report.show_progress(repo)
            if isinstance(tag, BrokenEntry):
                self._report_broken(repo, tag, "tag")
                continue
            try:
                if await asyncio.to_thread(self._directory.manifest_time, repo, tag.digest) is None:
                    self._report.record_problem(repo, f"the tag points at {tag.digest}, which was deleted", tag=tag.tag)
                    continue
                await self._image_writer.import_tag(repo, tag.tag, tag.digest, set_at=tag.set_at)
            except FATAL_ERRORS:
                raise
            except RegistryError as error:
                reported.update((tag.digest, *_path_to_broken(error)))
                self._report.record_problem(repo, error.message, tag=tag.tag, digest=tag.digest)
        await self._import_untagged(repo, reported)
        await self._note_unused_content(repo)

    def _report_broken(self, repo: RepositoryName, entry: BrokenEntry, kind: str) -> None:
        """Reports an entry of the repository that cannot be imported. `kind` is `tag` or `digest`. If a directory
        cannot be listed, the entry has no name, and the problem names only the repository."""
        self._report.record_problem(repo, entry.reason, **({kind: entry.name} if entry.name else {}))

    async def _import_untagged(self, repo: RepositoryName, reported: set[Digest]) -> None:
        """Imports the untagged manifests of the repository. Without `overwrite`, leaves out manifests that retention
        has deleted in this registry. `reported`: manifests for which a problem was reported; gives no second problem
        for these.

        If an index lists a broken manifest, reports a problem for the index only. The import may try the broken
        manifest before the index. Therefore, it tries all manifests first, and then reports the problems."""
        failed: dict[Digest, str] = {}
        deleted_here = frozenset() if self._overwrite else await self._store.imports.deleted_by_retention(repo)
        left_out = 0
        async for revision in read_in_thread(self._directory.manifest_digests(repo)):
            await self._report.show_progress(repo)
            if isinstance(revision, BrokenEntry):
                self._report_broken(repo, revision, "digest")
                continue
            if revision in deleted_here and not await self._image_writer.has_manifest(repo, revision):
                left_out += 1
                continue
            try:
                await self._image_writer.import_untagged(repo, revision)
            except FATAL_ERRORS:
                raise
            except RegistryError as error:
                failed[revision] = error.message
                reported.update(_path_to_broken(error))
        if left_out:
            self._report.record_note(repo, f"manifests that retention has deleted here stay deleted: {left_out}")
        for digest, reason in failed.items():
            if digest not in reported:
                self._report.record_problem(repo, reason, digest=digest)

    async def _note_unused_content(self, repo: RepositoryName) -> None:
        """Records notes on content that is left out because no image needs it: unfinished pushes, and blobs to which no
        imported manifest refers."""
        try:
            if uploads := await asyncio.to_thread(self._directory.count_unfinished_uploads, repo):
                self._report.record_note(repo, f"unfinished pushes are left out: {uploads}")
        except ContentBroken as error:
            self._report.record_note(repo, error.message)
        unused = 0
        async for digest in read_in_thread(self._directory.blob_digests(repo)):
            if isinstance(digest, BrokenEntry):
                self._report_broken(repo, digest, "digest")
                continue
            try:
                await self._store.metadata.blob(repo, digest)
            except BlobUnknown:
                unused += 1
        if unused:
            self._report.record_note(repo, f"blobs to which no imported manifest refers are left out: {unused}")


async def import_directory(store: StoredRegistry, router: Router, context: JobContext) -> JSON:
    """Runs a job of the kind `import-registry`. Returns the counts of `ImportReport`. Raises ImportInvalid, and
    `FATAL_ERRORS`. The job's arguments:

    - `path`: the old registry's directory.
    - `include` and `exclude`: lists of patterns for the repositories (`RepositoryFilter`).
    - `copy`: see `DirectoryContentSource`.
    - `overwrite`: see `DirectoryImport`."""
    arguments = context.job.arguments
    path = Path(str(arguments["path"]))
    if not path.is_absolute():
        raise ImportInvalid(f"{path} is not an absolute path")
    directory = await asyncio.to_thread(DistributionDirectory.find, path)
    report = ImportReport(context)
    directory_import = DirectoryImport(
        store,
        router,
        directory,
        report,
        RepositoryFilter(arguments.get("include") or (), arguments.get("exclude") or ()),
        actor=context.job.actor,
        copy=bool(arguments.get("copy")),
        overwrite=bool(arguments.get("overwrite")),
    )
    await directory_import.run()
    return report.result()


def _read(file_descriptor: int, offset: int, digest: Digest) -> bytes:
    """Returns the next bytes of the open file of the blob `digest`. Returns no bytes at the end of the file. Raises
    ContentBroken if the file cannot be read."""
    try:
        return os.pread(file_descriptor, READ_BYTES, offset)
    except OSError as error:
        raise ContentBroken(f"the file of the blob {digest} cannot be read: {error.strerror}") from None


def _path_to_broken(error: RegistryError) -> tuple[Digest, ...]:
    """If an index could not be imported because a manifest below it is broken, returns the digests on the path from the
    index to this manifest, without the index. For example, if index A lists index B, and B lists the broken manifest C,
    returns B and C. Returns no digests for any other error."""
    return error.path_to_broken if isinstance(error, ContentBroken) else ()


def _wrong_digest(digest: Digest) -> ContentBroken:
    return ContentBroken(f"the bytes of the blob {digest} have another digest")


def _close_opened(opening: asyncio.Future[int]) -> None:
    """Closes the file that a thread (`opening`) has opened for a task that was cancelled."""
    if not opening.cancelled() and opening.exception() is None:
        os.close(opening.result())
