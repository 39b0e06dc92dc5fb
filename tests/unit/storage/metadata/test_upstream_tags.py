"""The records of mirrored tags. A *sighting* is the first time that the mirror saw a tag point at a digest. A *move* is
a change of a tag's digest."""

from __future__ import annotations

from pathlib import Path

from storage.composition import open_registry
from storage.content import Actor, digest_of
from storage.names import RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from storage.upstream_tags import Sighting, UpstreamTagMove
from tests.fakes.registry_content import descriptor_of, image_of

APP, TOOL = RepositoryName("docker.io/library/app"), RepositoryName("ghcr.io/org/tool")
TAG_1, TAG_2 = Tag("1"), Tag("2")
A, B, C = (digest_of(name.encode()) for name in "ABC")


async def test_each_tag_has_its_own_sightings(registry: StoredRegistry, data: Path) -> None:
    """Each tag has its own sightings, in the order of their times. Saved sightings replace the tag's previous
    sightings, and other processes see them."""
    tags = registry.upstream_tags
    assert list(await tags.sightings(APP, TAG_1)) == []
    first = [Sighting(100.25, A), Sighting(200.0, B)]
    await tags.save_sightings(APP, TAG_1, first)
    await tags.save_sightings(APP, TAG_2, [Sighting(5.0, C)])
    await tags.save_sightings(TOOL, TAG_1, [Sighting(6.0, C)])
    async with open_registry(data) as other:
        assert list(await other.upstream_tags.sightings(APP, TAG_1)) == first
        second = [Sighting(200.0, B), Sighting(300.0, A)]
        await other.upstream_tags.save_sightings(APP, TAG_1, second)
    assert list(await tags.sightings(APP, TAG_1)) == second
    assert list(await tags.sightings(APP, TAG_2)) == [Sighting(5.0, C)]


async def test_sightings_of_unused_tags_are_deleted(registry: StoredRegistry) -> None:
    """The sightings of a tag are deleted only if the tag is not cached and has not moved since the given time."""
    tags = registry.upstream_tags
    manifest = image_of(descriptor_of(b"{}"), [])
    await registry.put_manifest(APP, manifest, [TAG_1], by=Actor(name="mirror"), sparse=True)
    old = [Sighting(100.0, A), Sighting(200.0, B)]
    for repo, tag in ((APP, TAG_1), (APP, TAG_2), (TOOL, TAG_1)):
        await tags.save_sightings(repo, tag, old)
    await tags.save_sightings(TOOL, TAG_2, [*old, Sighting(1000.0, C)])
    assert await tags.forget_unused(200.0) == 0
    assert await tags.forget_unused(500.0) == 2
    assert list(await tags.sightings(APP, TAG_1)) == old  # this tag is cached
    assert len(await tags.sightings(TOOL, TAG_2)) == 3  # this tag has moved since the given time
    for repo, tag in ((APP, TAG_2), (TOOL, TAG_1)):
        assert list(await tags.sightings(repo, tag)) == []
    assert await tags.forget_unused(500.0) == 0


async def test_moves_are_listed_in_pages(registry: StoredRegistry) -> None:
    """The moves of all tags since a given time are listed in pages. They are in order, and each move is listed once,
    also if several moves have the same time."""
    tags = registry.upstream_tags
    expected = []
    for number in range(50):
        for repo in (APP, TOOL):
            tag = Tag(f"t{number:02}")
            at = 1000.0 + number // 10
            await tags.save_sightings(repo, tag, [Sighting(at, A), Sighting(at + 1000, B)])
            expected += [UpstreamTagMove(at, repo, tag), UpstreamTagMove(at + 1000, repo, tag)]
    expected = [move for move in sorted(expected) if move.since >= 1002.0]
    listed_moves: list[UpstreamTagMove] = []
    while page := await tags.moves(1002.0, listed_moves[-1] if listed_moves else None, 7):
        listed_moves += page
    assert listed_moves == expected
    assert list(await tags.moves(5000.0, None, 7)) == []
