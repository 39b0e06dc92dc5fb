"""Runs imports into a store as an `entrepot` command would, and collects the steps that they report (`ImportRun`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from registry.naming import NamingRules
from registry.router import Router
from storage.jobs import JSON
from storage.names import Digest, RepositoryName
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_runner import JobContext, run_in_command
from tests.fakes.upstream_content import ImageTree

ImportWork = Callable[[StoredRegistry, Router, JobContext], Awaitable[JSON]]


class ImportRun:
    """A call runs one import. `arguments`: the arguments that every import gets. `steps`: the problems and notes that
    the last import has reported."""

    def __init__(self, store: StoredRegistry, kind: str, work: ImportWork, **arguments: JSON) -> None:
        self.store = store
        self.kind = kind
        self.work = work
        self.arguments = arguments
        self.steps: list[Mapping[str, JSON]] = []

    async def __call__(self, *, upstreams: tuple[str, ...] = (), **arguments: JSON) -> Any:
        """Runs an import and returns its counts. `upstreams`: the names of the mirrored upstreams."""
        router = Router(self.store, {}, self.store.is_known_repository, NamingRules(upstreams))

        async def work(context: JobContext) -> JSON:
            return await self.work(self.store, router, context)

        self.steps = []
        all_arguments = {**self.arguments, **arguments}
        return await run_in_command(
            self.store.jobs,
            self.store.leases,
            self.kind,
            all_arguments,
            work,
            actor="cli:ann",
            on_step=self.steps.append,
        )

    def reports(self, event: str = "problem") -> list[tuple[str, str]]:
        """Returns the problems that the last import has reported, or its reports of another kind (`event`). Each is a
        pair of an image or repository and a reason."""
        return [
            (f"{step['repository']}:{step.get('tag') or step.get('digest') or ''}", str(step["reason"]))
            for step in self.steps
            if step["event"] == event
        ]


async def assert_complete(store: StoredRegistry, repo: str, image: ImageTree) -> None:
    """Checks that the repository has all manifests and blobs of the image, with their exact bytes."""
    name = RepositoryName(repo)
    for digest, (body, media_type) in image.manifests.items():
        manifest = await store.get_manifest(name, Digest(digest))
        assert (manifest.body, manifest.media_type) == (body, media_type)
    for digest, blob in image.blobs.items():
        reader = await store.open_blob(name, Digest(digest))
        try:
            assert b"".join([piece async for piece in reader]) == blob.read()
        finally:
            await reader.aclose()
