"""An import over the network from Debian's docker-registry, which has no referrers API."""

from __future__ import annotations

from pathlib import Path

from registry.migration.remote_import import KIND, import_remote
from registry.router import Router
from storage.jobs import JSON
from storage.names import Digest, RepositoryName
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_runner import JobContext
from tests.fakes.import_run import ImportRun
from tests.fakes.real_upstreams import docker_registry
from tests.fakes.upstream_content import UpstreamContent, fallback_index, fallback_tag, noise_image
from tests.fakes.upstream_source import opened_registry


async def test_signatures_of_docker_registry(tmp_path: Path) -> None:
    """docker-registry responds to a request for referrers with a 404 page without an error code, which could be
    the page of a proxy. The signatures are imported with their fallback tags. No request is repeated."""
    content = UpstreamContent()
    signatures = {}
    for name in ("a", "team/b"):
        image = content.add(name, noise_image(name, 10), "1")
        signature = content.add(name, noise_image(f"signature of {name}", 10, subject=image))
        content.add(name, fallback_index(signature), fallback_tag(image.digest))
        signatures[name] = (image.digest, signature.digest)
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    async def work(store: StoredRegistry, router: Router, context: JobContext) -> JSON:
        return await import_remote(store, router, context, pause=pause)

    with docker_registry(tmp_path, content) as old:
        async with opened_registry(tmp_path / "data") as store:
            run_import = ImportRun(store, KIND, work, url=old.url)
            result = await run_import()
            assert (result["repositories"], result["tags"], run_import.reports(), pauses) == (2, 4, [], [])
            for name, (subject, signature_digest) in signatures.items():
                page = await store.referrers(RepositoryName(name), Digest(subject), None, None, 10)
                assert [each.digest for each in page.items] == [signature_digest]
        # Two requests for each repository are enough to find out that docker-registry has no referrers API.
        assert old.log.read_text().count("/referrers/") <= 4
