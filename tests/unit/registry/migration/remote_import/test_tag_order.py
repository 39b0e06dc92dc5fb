"""The order of imported tags. A registry does not say over the network when its tags were set. So the import takes the
time at which an image was built, or the order of the tags' names."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any

import pytest

from registry.migration.tag_times import build_time
from storage.content import MAX_IMAGE_CONFIG_BYTES, Manifest
from storage.names import Tag
from storage.retention import TagFacts
from storage.store.stored_registry import StoredRegistry
from tests.fakes.client_images import OCI_CONFIG
from tests.fakes.hub.hub import Hub
from tests.fakes.import_run import ImportRun
from tests.fakes.registry_content import push_blob
from tests.fakes.upkeep_store import DAY
from tests.fakes.upstream_content import (
    ImageTree,
    UpstreamBlob,
    UpstreamContent,
    index_of,
    manifest_of,
)
from tests.unit.registry.migration.remote_import.conftest import APP


def built(created: object, **options: Any) -> ImageTree:
    """Returns an image whose config has this value in `created`."""
    config = UpstreamBlob(json.dumps({"os": "linux", "created": created}).encode(), OCI_CONFIG)
    return manifest_of(config, **options)


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


async def tags_of(store: StoredRegistry) -> dict[str, TagFacts]:
    return {tag.name: tag for tag in await store.retention.tag_facts(APP, None)}


async def newest(store: StoredRegistry, count: int) -> list[str]:
    """Returns the `count` newest tags, the newest one first."""
    tags = await tags_of(store)
    return sorted(tags, key=lambda name: tags[name].pushed, reverse=True)[:count]


async def test_tags_have_the_time_at_which_their_image_was_built(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """A tag gets the time in the config of its image, an index the newest time of its images, and an artifact without
    such a config the time in its annotation. Each tag counts as pulled at the time of the import."""
    content.add(APP, built("2024-05-01T12:00:00.5Z"), "a")
    content.add(
        APP, index_of((built("2024-03-01T00:00:00Z"), "amd64"), (built("2024-03-02T00:00:00Z"), "arm64")), "multi"
    )
    chart = UpstreamBlob(b"{}", "application/vnd.cncf.helm.config.v1+json")
    annotations = {"org.opencontainers.image.created": "2024-02-01T00:00:00+01:00"}
    content.add(APP, manifest_of(chart, annotations=annotations), "chart")
    old_registry.put(content)
    started = time.time()

    await run_import()

    tags = await tags_of(store)
    assert {name: tag.pushed for name, tag in tags.items()} == {
        "a": at("2024-05-01T12:00:00.5"),
        "multi": pytest.approx(at("2024-03-02"), abs=1e-5),
        "chart": pytest.approx(at("2024-01-31T23:00:00"), abs=1e-5),
    }
    assert all(tag.pulled is None and (tag.unrecorded_until or 0) >= started for tag in tags.values())


@pytest.mark.parametrize("created", [None, "2024-05-01T00:00:00Z"])
@pytest.mark.slow
async def test_tags_of_the_same_age_are_in_the_natural_order_of_their_names(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent, created: object
) -> None:
    """If the images do not say when they were built, or all say the same time, `build-10` counts as newer than
    `build-9`."""
    for number in range(1, 26):
        content.add(APP, built(created, annotations={"number": str(number)}), f"build-{number}")
    old_registry.put(content)
    started = time.time()
    await run_import(jobs=4)
    assert await newest(store, 25) == [f"build-{number}" for number in range(25, 0, -1)]
    expected = started if created is None else at("2024-05-01")
    assert all(-1 < tag.pushed - expected < 60 for tag in (await tags_of(store)).values())


@pytest.mark.parametrize("created", ["1970-01-01T00:00:00Z", "0001-01-01T00:00:00Z", "2999-01-01T00:00:00Z", "x", 7])
@pytest.mark.slow
async def test_a_time_that_cannot_be_right_does_not_count(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent, created: object
) -> None:
    """A time in the future, or from before there were container images, is not that of the build. The tag gets the time
    of the import."""
    content.add(APP, built(created), "a")
    old_registry.put(content)
    started = time.time()
    await run_import()
    assert started - 1 <= (await tags_of(store))["a"].pushed <= time.time()


@pytest.mark.slow
async def test_a_tag_that_has_moved_is_newer_than_before(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """If a tag has moved at the old registry to an image that was built earlier, it moved after the last import. So it
    does not become older than its change here."""
    content.add(APP, built("2024-05-01T00:00:00Z"), "latest")
    old_registry.put(content)
    first_import = time.time()
    await run_import()
    assert (await tags_of(store))["latest"].pushed == at("2024-05-01")
    content.add(APP, built("2024-04-01T00:00:00Z"), "latest")
    old_registry.put(content)
    await run_import()
    moved = (await tags_of(store))["latest"].pushed
    assert first_import <= moved <= time.time()
    history = (await store.tag_history.changes(APP, Tag("latest"), None, 10)).items
    assert [change.at for change in history] == sorted((change.at for change in history), reverse=True)
    assert moved < first_import + DAY


async def test_a_large_config_is_not_read(store: StoredRegistry) -> None:
    """A config that is larger than `MAX_IMAGE_CONFIG_BYTES` is not read into memory, even if the manifest states a
    smaller size. The digest may be that of a layer of many GB."""
    data = json.dumps({"created": "2024-05-01T00:00:00Z", "pad": "x" * MAX_IMAGE_CONFIG_BYTES}).encode()
    await push_blob(store, APP, data)
    document = json.loads(manifest_of(UpstreamBlob(data, OCI_CONFIG)).body)
    document["config"]["size"] = 100
    manifest = Manifest.parse(json.dumps(document).encode(), document["mediaType"])
    assert await build_time(store, APP, manifest, time.time()) is None
