"""Tests of the cooldown of an upstream: a mirror serves the new image of a tag only after the tag has pointed at it for
some days. The tests set the clock, and use a fake Docker Hub."""

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
    """The data directory of a mirror with a cooldown of three days, its upstream, and the clock that the test sets."""

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
        """Sets the clock to this number of days after the start of the test."""
        self.clock.now = self.started + day * DAY

    def move(self, image: ImageTree) -> None:
        """Makes the tag at the upstream point at this image."""
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


async def test_newest_image_older_than_the_cooldown_is_served(site: CooldownSite) -> None:
    """The tag moves three times. On each day, two processes serve the newest image that the tag has pointed at for at
    least the cooldown, with all its blobs. They serve the same image after a restart and while the upstream is down."""
    # Days of the moves, and (day, expected image) for each pull. The images are numbers in IMAGES.
    image_of_move = {0.0: 0, 10.0: 1, 11.0: 2, 20.0: 3}
    before_second_move = [(0.0, 0), (9.0, 0), (10.0, 0)]
    # Image 1 was replaced after one day, so it is never served.
    after_second_move = [(11.0, 0), (12.9, 0), (13.1, 0), (13.9, 0), (14.0, 2)]
    after_third_move = [(20.0, 2), (22.9, 2), (23.0, 3), (90.0, 3)]
    for day, expected in before_second_move + after_second_move + after_third_move:
        site.set_day(day)
        if day in image_of_move:
            site.move(IMAGES[image_of_move[day]])
        async with site.process() as first, site.process() as second:
            for process in (first, second, first):
                assert await pull(process.router) == IMAGES[expected].digest, day
            site.upstream.refuse()
            site.set_day(day + 0.09)  # after the cached tag has expired, so that the mirror would ask the upstream
            for process in (first, second):
                assert await pull(process.router) == IMAGES[expected].digest, day
        async with site.process() as restarted:
            assert await pull(restarted.router) == IMAGES[expected].digest, day
        site.upstream.listen()


async def test_cooldown_can_end_while_the_upstream_is_down(site: CooldownSite) -> None:
    """The cooldown ends while the upstream is down. The mirror has cached the manifest of the new image, so the tag
    then resolves to the new image. Its blobs can be pulled when the upstream is back."""
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


async def test_cooldown_does_not_apply_to_digests(site: CooldownSite) -> None:
    """While the cooldown holds back an image from its tag, the image and its blobs can be pulled by digest."""
    site.move(IMAGES[0])
    async with site.process() as backend:
        await pull(backend.router)
        site.set_day(10)
        site.move(IMAGES[1])
        assert await pull(backend.router) == IMAGES[0].digest
        manifest = await backend.router.get_manifest(REPO, Digest(IMAGES[1].digest))
        for blob in manifest.blobs:
            assert (await backend.router.resolve_blob(REPO, blob.digest)).digest == blob.digest
