"""Copies the content of another registry, the *old registry*, over the network into this registry (`RemoteImport`).
Jobs of the kind `import-remote` do this work. The old registry must implement the OCI distribution spec. The server of
this registry may run during the import.

The import requests the digest of each tag with a HEAD request, so that a second import fetches only changed images.
With each image, the import copies the referrers that the referrers API lists, such as signatures. In a registry without
this API, referrers have tags (spec: "Referrers Tag Schema"), which the import copies like other tags. The import cannot
find a manifest without a tag, except if an index lists the manifest or the manifest is a referrer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Final

from registry.config import Upstream
from registry.migration.directory_import import FATAL_ERRORS
from registry.migration.image_writer import ImageWriter
from registry.migration.import_report import ImportReport, RepositoryFilter
from registry.migration.remote_options import RemoteOptions
from registry.migration.remote_registry import RemoteRegistry
from registry.migration.request_retries import PauseFunction
from registry.migration.tag_times import OldRegistryTag
from registry.migration.workers import run_workers
from registry.router import Router
from storage.errors import ManifestUnknown, NameInvalid, RegistryError
from storage.imports import ImportInvalid, OldRegistryDown
from storage.jobs import JSON
from storage.names import Digest, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_runner import JobContext

KIND: Final = "import-remote"
"""The kind of the jobs that run an import over the network."""
MAX_PARALLEL_IMAGES: Final = 32
"""Largest number of images that are imported at the same time."""
MAX_SORTED_TAGS: Final = 10_000
"""Largest number of tags in a batch. The tags of a repository are imported in batches, in the order in which the old
registry lists the tags. Each batch is sorted separately."""
_ENDING_ERRORS: Final = (*FATAL_ERRORS, OldRegistryDown, ImportInvalid)
"""Errors that end the import. After any other error, the import continues with the next image or referrer."""


@dataclass(slots=True)
class _ReferrersApiCheck:
    """The check whether the old registry has the referrers API for one repository. `result`: whether it has the API;
    None before the check is complete. `lock`: held during the check, so that the images of the repository share one
    check."""

    result: bool | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class RemoteImport:
    """One import over the network."""

    def __init__(
        self,
        store: StoredRegistry,
        router: Router,
        source: RemoteRegistry,
        report: ImportReport,
        repositories: RepositoryFilter,
        *,
        actor: str,
        overwrite: bool,
        parallel_images: int,
        clock: Callable[[], float],
    ) -> None:
        """`overwrite`: see `import_remote`. `parallel_images`: how many images are imported at the same time.
        `clock` returns the time in seconds since 1970."""
        self._store = store
        self._clock = clock
        self._router = router
        self._source = source
        self._report = report
        self._repositories = repositories
        self._parallel_images = parallel_images
        self._writer = ImageWriter(store, source, report, actor=actor, overwrite=overwrite)
        self._referrers_api_checks: dict[RepositoryName, _ReferrersApiCheck] = {}
        """The checks of the latest repositories. Some registries have the referrers API for only some of their
        repositories."""
        self._has_named_repositories = False
        """True once the old registry or the caller of `run` has named at least one repository, even if the import
        leaves the repository out."""

    async def run(self, names: list[str] | None) -> None:
        """Imports the repositories `names`; if `names` is None, all repositories that the old registry lists. Leaves
        out the repositories that the patterns of the import exclude. Raises ImportInvalid, OldRegistryDown,
        StorageFull, StorageFailed, JobStopped. After an error, this registry keeps the images that were already
        imported."""
        async with aclosing(self._tags_to_import(names)) as tags:
            await run_workers(tags, self._import_image, self._parallel_images)
        await self._report.show_progress("", save_now=True)
        if not self._has_named_repositories:
            self._report.record_note("", f"{self._source.host} lists no repositories: it may need another login")
        for pattern in self._repositories.unmatched_patterns():
            self._report.record_note("", f"the pattern {pattern} matches no repository of the old registry")

    async def _tags_to_import(self, names: list[str] | None) -> AsyncGenerator[OldRegistryTag]:
        """Yields the tags to import, one repository after the other. Sorts each batch of tags in the natural order of
        their names (`build-9` before `build-10`)."""
        async for repo in self._chosen_repositories(names):
            self._report.repositories += 1
            async for tags in self._tag_batches(repo):
                for old_tag in OldRegistryTag.in_order(repo, tags, self._clock()):
                    yield old_tag

    async def _tag_batches(self, repo: RepositoryName) -> AsyncGenerator[list[Tag]]:
        """Yields the tags of a repository in batches of at most `MAX_SORTED_TAGS`. If the list of tags breaks off with
        an error, yields the tags before the error, and reports the error as a problem. Raises only errors that end the
        import."""
        tags: list[Tag] = []
        try:
            async for tag in self._source.tags(repo):
                tags.append(tag)
                if len(tags) == MAX_SORTED_TAGS:
                    yield tags
                    tags = []
                await self._report.show_progress(repo)
        except _ENDING_ERRORS:
            raise
        except RegistryError as error:
            self._report.record_problem(repo, error.message)
        if tags:
            yield tags

    async def _chosen_repositories(self, names: list[str] | None) -> AsyncIterator[RepositoryName]:
        """Yields the repositories to import. Reports a name as a problem if it is invalid, or if it belongs to a mirror
        of this registry."""
        async for name in self._source.repositories() if names is None else _iterate(names):
            self._has_named_repositories = True
            try:
                repo = RepositoryName(name)
            except NameInvalid as error:
                self._report.record_problem(name, error.message)
                continue
            if not self._repositories.includes(repo):
                continue
            if (upstream := self._router.naming.upstream_of(repo)) is not None:
                self._report.record_problem(repo, f"in this registry, the name belongs to the mirror of {upstream}")
                continue
            yield repo

    async def _import_image(self, old_tag: OldRegistryTag) -> None:
        """Imports the image of one tag with its referrers. Raises only errors that end the import. Reports any other
        error as a problem."""
        repo, tag = old_tag.repository, old_tag.tag
        await self._report.show_progress(repo)
        try:
            digest = await self._source.resolve(repo, tag)
            await self._writer.import_tag(repo, tag, digest, set_at=partial(old_tag.estimate_time, self._store))
            # `import_tag` stores no manifest if it keeps a tag that was changed in this registry.
            if await self._writer.has_manifest(repo, digest):
                await self._import_all_referrers(repo, digest)
        except _ENDING_ERRORS:
            raise
        except RegistryError as error:
            self._report.record_problem(repo, error.message, tag=tag)

    async def _import_all_referrers(self, repo: RepositoryName, digest: Digest) -> None:
        """Imports the referrers of a manifest and of its children, then the referrers of these referrers, and so on.
        Does nothing if the old registry has no referrers API for this repository."""
        if not await self._has_referrers_api(repo, digest):
            return
        done_subjects: set[Digest] = set()
        pending_subjects = [digest]
        while pending_subjects:
            subject = pending_subjects.pop()
            if subject in done_subjects:
                continue
            done_subjects.add(subject)
            try:
                async for referrer in self._source.referrers(repo, subject):
                    if await self._import_one_referrer(repo, referrer):
                        pending_subjects.append(referrer)
            except _ENDING_ERRORS:
                raise
            except RegistryError as error:
                self._report.record_problem(repo, error.message, digest=subject)
            try:
                stored = await self._store.get_manifest(repo, subject)
            except ManifestUnknown:  # in this registry, the manifest is damaged or was deleted
                continue
            # `blob_children` are the entries of an index that may be blobs. Only manifests have referrers.
            pending_subjects += [child.digest for child in stored.manifests if child.digest not in stored.blob_children]

    async def _has_referrers_api(self, repo: RepositoryName, digest: Digest) -> bool:
        """Returns whether the old registry has the referrers API for a repository. Sends the requests of the check once
        for each repository. `digest`: a manifest of the repository."""
        check = self._referrers_api_checks.setdefault(repo, _ReferrersApiCheck())
        # Removes the checks of repositories that are already imported: at most MAX_PARALLEL_IMAGES are in progress.
        while len(self._referrers_api_checks) > 2 * MAX_PARALLEL_IMAGES:
            del self._referrers_api_checks[next(iter(self._referrers_api_checks))]
        async with check.lock:
            if check.result is None:
                check.result = await self._source.has_referrers_api(repo, digest)
        return check.result

    async def _import_one_referrer(self, repo: RepositoryName, referrer: Digest) -> bool:
        """Imports one referrer, and returns True. If the referrer cannot be imported, reports a problem and returns
        False. Raises only errors that end the import."""
        try:
            await self._writer.import_untagged(repo, referrer)
        except _ENDING_ERRORS:
            raise
        except RegistryError as error:
            self._report.record_problem(repo, error.message, digest=referrer)
            return False
        return True


async def import_remote(
    store: StoredRegistry,
    router: Router,
    context: JobContext,
    configured: Sequence[Upstream] = (),
    pause: PauseFunction = asyncio.sleep,
    clock: Callable[[], float] = time.time,
) -> JSON:
    """Runs a job of the kind `import-remote`. Returns the counts of `ImportReport`. Raises ImportInvalid,
    OldRegistryDown, StorageFull, StorageFailed, JobStopped.

    The arguments of the job are the fields of `RemoteOptions`, and:

    - `include`, `exclude`: lists of patterns for the names of repositories.
    - `repositories`: a list of names; None: all repositories.
    - `overwrite`: whether to replace a tag that somebody has changed in this registry since the last import.

    `configured`: the upstreams in the settings. If the old registry is one of them, the import uses its login and other
    settings. `pause` waits for a number of seconds before a retry. `clock` returns the time in seconds since 1970."""
    arguments = context.job.arguments
    options = _options(arguments)
    report = ImportReport(context)
    repositories = RepositoryFilter(arguments.get("include") or (), arguments.get("exclude") or ())
    async with aclosing(RemoteRegistry(store, options, report, configured, pause=pause)) as source:
        remote_import = RemoteImport(
            store,
            router,
            source,
            report,
            repositories,
            actor=context.job.actor,
            overwrite=bool(arguments.get("overwrite")),
            parallel_images=min(max(options.jobs, 1), MAX_PARALLEL_IMAGES),
            clock=clock,
        )
        await remote_import.run(arguments.get("repositories"))
    return report.result()


def _options(arguments: Mapping[str, Any]) -> RemoteOptions:
    """Returns the options among a job's arguments. Raises ImportInvalid."""
    option_names = {field.name for field in fields(RemoteOptions)}
    option_values = {name: value for name, value in arguments.items() if name in option_names and value is not None}
    if "url" not in option_values:
        raise ImportInvalid("the import has no URL")
    return RemoteOptions(**option_values)


async def _iterate(names: list[str]) -> AsyncIterator[str]:
    for name in names:
        yield name
