"""The records of mirrored tags: the digests that they pointed at, and their moves in order."""

from __future__ import annotations

from pathlib import Path

from storage.composition import open_registry
from storage.content import Actor, digest_of
from storage.names import RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from storage.upstream_tags import Sighting, TagMove
from tests.fakes.registry_content import descriptor_of, image_of

APP, TOOL = RepositoryName("docker.io/library/app"), RepositoryName("ghcr.io/org/tool")
ONE, TWO = Tag("1"), Tag("2")
A, B, C = (digest_of(name.encode()) for name in "ABC")


async def test_sightings(registry: StoredRegistry, data: Path) -> None:
    """Each tag has its own sightings, in the order of their times. New ones replace the old ones. Other processes see
    them, and they survive a restart."""
    tags = registry.upstream_tags
    assert list(await tags.sightings(APP, ONE)) == []
    first = [Sighting(100.25, A), Sighting(200.0, B)]
    await tags.save_sightings(APP, ONE, first)
    await tags.save_sightings(APP, TWO, [Sighting(5.0, C)])
    await tags.save_sightings(TOOL, ONE, [Sighting(6.0, C)])
    async with open_registry(data) as other:
        assert list(await other.upstream_tags.sightings(APP, ONE)) == first
        second = [Sighting(200.0, B), Sighting(300.0, A)]
        await other.upstream_tags.save_sightings(APP, ONE, second)
    assert list(await tags.sightings(APP, ONE)) == second
    assert list(await tags.sightings(APP, TWO)) == [Sighting(5.0, C)]


async def test_unused_tags_are_forgotten(registry: StoredRegistry) -> None:
    """Only tags that are not cached and have not moved for long are forgotten."""
    tags = registry.upstream_tags
    manifest = image_of(descriptor_of(b"{}"), [])
    await registry.put_manifest(APP, manifest, [ONE], by=Actor(name="mirror"), sparse=True)
    old = [Sighting(100.0, A), Sighting(200.0, B)]
    for repo, tag in ((APP, ONE), (APP, TWO), (TOOL, ONE)):
        await tags.save_sightings(repo, tag, old)
    await tags.save_sightings(TOOL, TWO, [*old, Sighting(1000.0, C)])
    assert await tags.forget_unused(200.0) == 0
    assert await tags.forget_unused(500.0) == 2
    assert list(await tags.sightings(APP, ONE)) == old  # it is cached
    assert len(await tags.sightings(TOOL, TWO)) == 3  # it has moved since
    for repo, tag in ((APP, TWO), (TOOL, ONE)):
        assert list(await tags.sightings(repo, tag)) == []
    assert await tags.forget_unused(500.0) == 0


async def test_moves_in_pages(registry: StoredRegistry) -> None:
    """The moves of all tags since a time are listed in order, each once, also if several have the same time."""
    tags = registry.upstream_tags
    expected = []
    for number in range(50):
        for repo in (APP, TOOL):
            tag = Tag(f"t{number:02}")
            at = 1000.0 + number // 10
            await tags.save_sightings(repo, tag, [Sighting(at, A), Sighting(at + 1000, B)])
            expected += [TagMove(at, repo, tag), TagMove(at + 1000, repo, tag)]
    expected = [move for move in sorted(expected) if move.since >= 1002.0]
    found: list[TagMove] = []
    while page := await tags.moves(1002.0, found[-1] if found else None, 7):
        found += page
    assert found == expected
    assert list(await tags.moves(5000.0, None, 7)) == []
