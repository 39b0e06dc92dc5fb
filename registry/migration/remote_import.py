"""Copies the content of another registry, the *old registry*, over the network (`RemoteImport`), in jobs of the kind
`import-remote`. The old registry must implement the OCI distribution spec. This registry's server may run at the same
time.

For each tag, the digest is requested with a HEAD request, so that a second run fetches only changed images. Referrers,
such as signatures, are imported with their subject: they are found through the referrers API, or through the tags that
replace it (spec: "Referrers Tag Schema"). A manifest without a tag can be found over the network only if an index lists
it or if it is a referrer.
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
from registry.migration.request_retries import Pause
from registry.migration.tag_times import OldRegistryTag
from registry.migration.workers import run_workers
from registry.router import Router
from storage.errors import ManifestUnknown, NameInvalid, RegistryError
from storage.imports import ImportInvalid, SourceDown
from storage.jobs import JSON
from storage.names import Digest, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_runner import JobContext

KIND: Final = "import-remote"
"""The kind of the jobs that run such an import."""
MAX_PARALLEL_IMAGES: Final = 32
"""Largest number of images that are imported at the same time."""
MAX_SORTED_TAGS: Final = 10_000
"""Largest number of tags of a repository that are sorted at once. If a repository has more, they are sorted in portions
of this size, in the order in which the old registry lists them."""
_ENDING: Final = (*FATAL_ERRORS, SourceDown, ImportInvalid)
"""Errors that end the import. After other errors, it continues with the next image or referrer."""


@dataclass(slots=True)
class _ReferrersApi:
    """The referrers API of the old registry, for one repository. `is_there`: whether the old registry has this API;
    None: not known yet. `lock`: held during the request that finds this out, so that it is sent only once for all
    images of the repository."""

    is_there: bool | None = None
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
        """`overwrite`: as for `import_remote`. `parallel_images`: how many images are imported at the same time.
        `clock` returns the time in seconds since 1970."""
        self._store = store
        self._clock = clock
        self._router = router
        self._source = source
        self._report = report
        self._repositories = repositories
        self._parallel_images = parallel_images
        self._writer = ImageWriter(store, source, report, actor=actor, overwrite=overwrite)
        self._referrers_apis: dict[RepositoryName, _ReferrersApi] = {}
        """For each repository, whether the old registry has a referrers API: some registries have this API for only
        some of their repositories. Only the latest repositories are kept."""
        self._is_any_listed = False
        """True if the old registry has listed a repository, or if `run` was called with a name."""

    async def run(self, names: list[str] | None) -> None:
        """Imports the repositories with these names; None: all that the old registry lists. Raises ImportInvalid,
        SourceDown, StorageFull, StorageFailed, JobStopped. After an error, the images that were already imported are
        kept."""
        async with aclosing(self._images(names)) as images:
            await run_workers(images, self._import_image, self._parallel_images)
        await self._report.show_progress("", save_now=True)
        if not self._is_any_listed:
            self._report.note("", f"{self._source.host} lists no repositories: it may need another login")
        for pattern in self._repositories.unmatched():
            self._report.note("", f"the pattern {pattern} matches no repository of the old registry")

    async def _images(self, names: list[str] | None) -> AsyncGenerator[OldRegistryTag]:
        """Yields the tags to import, those of a repository in the natural order of their names (`build-9` before
        `build-10`). Reads the tags of a repository only after all tags of the previous repository were yielded."""
        async for repo in self._chosen(names):
            self._report.repositories += 1
            async for tags in self._tags(repo):
                for listed in OldRegistryTag.in_order(repo, tags, self._clock()):
                    yield listed

    async def _tags(self, repo: RepositoryName) -> AsyncGenerator[list[Tag]]:
        """Yields the tags of a repository, usually all at once. After an error, yields the tags before it, and reports
        the error as a problem. Raises only errors that end the import."""
        tags: list[Tag] = []
        try:
            async for tag in self._source.tags(repo):
                tags.append(tag)
                if len(tags) == MAX_SORTED_TAGS:
                    yield tags
                    tags = []
                await self._report.show_progress(repo)
        except _ENDING:
            raise
        except RegistryError as error:
            self._report.problem(repo, error.message)
        if tags:
            yield tags

    async def _chosen(self, names: list[str] | None) -> AsyncIterator[RepositoryName]:
        """Yields the repositories to import."""
        async for name in self._source.repositories() if names is None else _iterate(names):
            self._is_any_listed = True
            try:
                repo = RepositoryName(name)
            except NameInvalid as error:
                self._report.problem(name, error.message)
                continue
            if not self._repositories.includes(repo):
                continue
            if (upstream := self._router.naming.upstream_of(repo)) is not None:
                self._report.problem(repo, f"its name belongs to the mirror of {upstream} here")
                continue
            yield repo

    async def _import_image(self, listed: OldRegistryTag) -> None:
        """Imports one tag and its referrers. Reports an error as a problem, and raises only errors that end the
        import."""
        repo, tag = listed.repository, listed.tag
        await self._report.show_progress(repo)
        try:
            digest = await self._source.resolve(repo, tag)
            await self._writer.import_tag(repo, tag, digest, set_at=partial(listed.estimate_time, self._store))
            if await self._writer.has_manifest(repo, digest):  # may be False if the tag was changed here
                await self._import_referrers(repo, digest, set())
        except _ENDING:
            raise
        except RegistryError as error:
            self._report.problem(repo, error.message, tag=tag)

    async def _import_referrers(self, repo: RepositoryName, digest: Digest, done_subjects: set[Digest]) -> None:
        """Imports the referrers of a manifest and of its children, then the referrers of these referrers, and so on.
        Does nothing if the old registry has no referrers API for this repository: then the referrers have tags, and are
        imported with these tags. `done_subjects`: the manifests whose referrers were imported already."""
        if not await self._has_referrers_api(repo, digest):
            return
        waiting = [digest]
        while waiting:
            subject = waiting.pop()
            if subject in done_subjects:
                continue
            done_subjects.add(subject)
            try:
                async for referrer in self._source.referrers(repo, subject):
                    if await self._import_referrer(repo, referrer):
                        waiting.append(referrer)
            except _ENDING:
                raise
            except RegistryError as error:
                self._report.problem(repo, error.message, digest=subject)
            try:
                stored = await self._store.get_manifest(repo, subject)
            except ManifestUnknown:  # it is damaged or was deleted in this registry
                continue
            waiting.extend(child.digest for child in stored.manifests if child.digest not in stored.blob_children)

    async def _has_referrers_api(self, repo: RepositoryName, digest: Digest) -> bool:
        """Returns whether the old registry has the referrers API for this repository. Asks once for each repository.
        `digest`: a manifest of the repository."""
        api = self._referrers_apis.setdefault(repo, _ReferrersApi())
        # At most MAX_PARALLEL_IMAGES repositories are imported at the same time. The answers for earlier ones are not
        # needed.
        while len(self._referrers_apis) > 2 * MAX_PARALLEL_IMAGES:
            del self._referrers_apis[next(iter(self._referrers_apis))]
        async with api.lock:
            if api.is_there is None:
                api.is_there = await self._source.has_referrers_api(repo, digest)
        return api.is_there

    async def _import_referrer(self, repo: RepositoryName, referrer: Digest) -> bool:
        """Imports one referrer. Returns False, and reports a problem, if it cannot be imported. Raises only errors that
        end the import."""
        try:
            await self._writer.import_untagged(repo, referrer)
        except _ENDING:
            raise
        except RegistryError as error:
            self._report.problem(repo, error.message, digest=referrer)
            return False
        return True


async def import_remote(
    store: StoredRegistry,
    router: Router,
    context: JobContext,
    configured: Sequence[Upstream] = (),
    pause: Pause = asyncio.sleep,
    clock: Callable[[], float] = time.time,
) -> JSON:
    """Runs a job of the kind `import-remote`. The job's arguments: the fields of `RemoteOptions`; `include` and
    `exclude`, lists of patterns; `repositories`, a list of names (None: all); and `overwrite`: whether to set also tags
    that somebody has changed in this registry. `configured`: the upstreams in the settings; if the old registry is one
    of them, its login and other settings are used. `pause` waits for a number of seconds before a retry. `clock`
    returns the time in seconds since 1970. Returns the counts of `ImportReport`. Raises ImportInvalid, SourceDown,
    StorageFull, StorageFailed, JobStopped."""
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
