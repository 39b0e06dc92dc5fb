"""An import over the network into a repository with a quota: blobs that do not fit are not downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.names import Tag
from storage.store.stored_registry import StoredRegistry
from storage.usage import ScopeDefinition
from tests.fakes.client_images import MIB
from tests.fakes.hub.hub import Hub
from tests.fakes.import_run import ImportRun, assert_complete
from tests.fakes.upstream_content import (
    ImageTree,
    UpstreamBlob,
    UpstreamContent,
    manifest_of,
    noise_blob,
    noise_image,
)
from tests.unit.registry.migration.remote_import.conftest import APP

FOREIGN_TYPE = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"


async def limit_bytes(store: StoredRegistry, max_bytes: int) -> None:
    """Gives the repositories below `team/` a quota."""
    await store.usage.configure([ScopeDefinition("quota team/", ("team/",), max_bytes=max_bytes)])
    while await store.usage.count_batch():
        pass


async def test_a_blob_that_does_not_fit_into_a_quota_is_not_downloaded(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent, tmp_path: Path
) -> None:
    """An image whose layer does not fit into the quota is a problem. Neither the layer nor the config is requested,
    and no file of them stays. Images that fit are imported."""
    large = content.add(APP, noise_image("large", 2 * MIB), "large")
    small = content.add(APP, noise_image("small", 1000), "small")
    old_registry.put(content)
    await limit_bytes(store, MIB)

    await run_import(jobs=1)

    [(name, reason)] = run_import.reports()
    assert name == "team/app:large"
    assert reason.startswith("team/ may hold 1 MiB and holds ")
    assert old_registry.count("blob", "GET", digest=large.layers[0].digest) == 0
    assert old_registry.count("blob", "GET", digest=large.config.digest) == 0
    assert list((tmp_path / "data/partials").iterdir()) == []
    await assert_complete(store, APP, small)


async def test_a_missing_foreign_layer_needs_no_room(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """The quota has no room for a foreign layer. But the old registry does not have this layer, and the import stores
    the image without it."""
    config = UpstreamBlob(b"{}", "application/vnd.oci.image.config.v1+json")
    foreign_layer = noise_blob("elsewhere", 2 * MIB, FOREIGN_TYPE)
    image = content.add(APP, manifest_of(config, foreign_layer), "windows")
    old_registry.put(content)
    old_registry.remove(APP, foreign_layer.digest)
    await limit_bytes(store, MIB)
    await run_import()
    assert run_import.reports() == []
    assert (await store.get_manifest(APP, Tag("windows"))).body == image.body


@pytest.mark.slow
async def test_a_blob_fits_by_its_real_size(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """The manifest states a size of its layer that does not fit into the quota, but the old registry has a small blob.
    The reason of the problem is the wrong size, not the quota."""
    image = noise_image("wrong", 1234)
    body = image.body.replace(b"1234", b"12345678")
    content.add(APP, ImageTree(body, image.media_type, image.blobs), "1")
    old_registry.put(content)
    await limit_bytes(store, MIB)
    await run_import()
    [(_, reason)] = run_import.reports()
    assert "has a blob of 1234 bytes; 12345678 bytes were expected" in reason
