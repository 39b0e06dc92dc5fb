"""Cooldowns of an upstream over HTTP, with a clock that the test sets: what clients get at each moment."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from registry.backend import Backend, open_backend
from registry.config import Settings
from registry.request import RequestContext, enter_request
from storage.composition import prepare_data_dir
from storage.interface import Registry
from storage.names import Digest, RepositoryName, Tag
from tests.fakes.hub.hub import Hub, hub
from tests.fakes.upstream_content import ImageTree, UpstreamContent, noise_image
from tests.fakes.upstream_source import UpstreamClock

DAY = 86400.0
REPO, TAG = RepositoryName("library/app"), Tag("1")
IMAGES = [noise_image(f"image {number}", 1000 + number) for number in range(4)]


class CooldownSite:
    """A data directory, its upstream, and the clock."""

    def __init__(self, folder: Path, upstream: Hub) -> None:
        self.upstream = upstream
        self.clock = UpstreamClock()
        self.started = self.clock.now
        mirror = {"name": "docker.io", "default": True, "endpoints": [upstream.url], "tag_ttl": "1h", "cooldown": "3d"}
        self.settings = Settings.model_validate({"data": folder / "data", "upstream": [mirror]})
        prepare_data_dir(self.settings.data)

    @asynccontextmanager
    async def process(self) -> AsyncIterator[Backend]:
        """Opens the data directory as one process does."""
        async with open_backend(self.settings, clock=self.clock) as backend:
            yield backend

    def set_day(self, day: float) -> None:
        self.clock.now = self.started + day * DAY

    def move(self, image: ImageTree) -> None:
        """Moves the tag at the upstream."""
        content = UpstreamContent()
        content.add(REPO, image, TAG)
        self.upstream.put(content)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[CooldownSite]:
    with hub(tmp_path, auth="bearer") as upstream:
        yield CooldownSite(tmp_path, upstream)


async def pull(registry: Registry) -> str:
    """Pulls the image of the tag with all its blobs, and returns its digest."""
    manifest = await registry.get_manifest(REPO, TAG)
    assert (await registry.resolve_manifest(REPO, TAG)).digest == manifest.digest
    for blob in manifest.blobs:
        async with aclosing(await registry.open_blob(REPO, blob.digest)) as reader:
            offset, stop = reader.span
            while offset < stop:
                offset = await reader.readable_until(offset)
    return manifest.digest


async def test_a_tag_that_moves_three_times(site: CooldownSite) -> None:
    """At each moment, two processes serve complete images with the right digest: the newest that has held the tag for
    the cooldown. This does not change after a restart, or while the upstream is down."""
    moves = {0.0: 0, 10.0: 1, 11.0: 2, 20.0: 3}
    before_third = [(0.0, 0), (9.0, 0), (10.0, 0)]
    after_third = [(11.0, 0), (12.9, 0), (13.1, 0), (13.9, 0), (14.0, 2)]  # the second was replaced after a day
    after_fourth = [(20.0, 2), (22.9, 2), (23.0, 3), (90.0, 3)]
    for day, number in before_third + after_third + after_fourth:
        site.set_day(day)
        if day in moves:
            site.move(IMAGES[moves[day]])
        async with site.process() as one, site.process() as two:
            for each in (one, two, one):
                assert await pull(each.router) == IMAGES[number].digest, day
            site.upstream.refuse()
            site.set_day(day + 0.09)  # past the time to live, so that the upstream would be asked
            for each in (one, two):
                assert await pull(each.router) == IMAGES[number].digest, day
        async with site.process() as restarted:
            assert await pull(restarted.router) == IMAGES[number].digest, day
        site.upstream.listen()


async def test_the_cooldown_ends_while_the_upstream_is_down(site: CooldownSite) -> None:
    """If its manifest is cached, the digest that was held back is served on time although the upstream is down. Its
    blobs are fetched when the upstream is back."""
    enter_request(request := RequestContext())
    site.move(IMAGES[0])
    async with site.process() as backend:
        await pull(backend.router)
        site.set_day(10)
        site.move(IMAGES[1])
        assert await pull(backend.router) == IMAGES[0].digest
        assert f"points at {IMAGES[1].digest} at docker.io" in str(request.notice)
        site.upstream.refuse()
        site.set_day(13)
        assert (await backend.router.resolve_manifest(REPO, TAG)).digest == IMAGES[1].digest
        site.upstream.listen()
        site.set_day(14)
        assert await pull(backend.router) == IMAGES[1].digest


async def test_a_digest_is_pulled_at_once(site: CooldownSite) -> None:
    """An image that is held back can be pulled completely by its digest."""
    site.move(IMAGES[0])
    async with site.process() as backend:
        await pull(backend.router)
        site.set_day(10)
        site.move(IMAGES[1])
        assert await pull(backend.router) == IMAGES[0].digest
        manifest = await backend.router.get_manifest(REPO, Digest(IMAGES[1].digest))
        for blob in manifest.blobs:
            assert (await backend.router.resolve_blob(REPO, blob.digest)).digest == blob.digest
