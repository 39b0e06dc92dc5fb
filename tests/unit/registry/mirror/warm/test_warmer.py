"""The `Warmer`, which fetches a list of images into the cache of the mirror."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import apsw
import pytest

from registry.mirror.warm.warmer import MAX_RUNNING_REFERENCES, Warmer, WarmResult
from registry.router import Destination
from storage.content import Descriptor
from storage.errors import ManifestUnknown
from storage.names import Digest, ImageReference, RepositoryName, Tag
from tests.unit.registry.mirror.conftest import MirrorSite, MirrorWorker


class NoObserver:
    """A `WarmObserver` that ignores all reports."""

    def on_blob_wanted(self, image: ImageReference, blob: Descriptor) -> None:
        return

    def on_bytes(self, blob: Digest, count: int) -> None:
        return

    def on_reference_done(self, image: ImageReference, result: WarmResult) -> None:
        return


@pytest.mark.slow
async def test_no_image_is_fetched_after_an_unexpected_error(site: MirrorSite, worker: MirrorWorker) -> None:
    """The database cannot be read once, while the first four images are fetched. `warm` raises the error. The images
    that still waited for their turn are not fetched, except perhaps the next one."""
    images = [ImageReference(RepositoryName(f"docker.io/library/{name}"), Tag("1")) for name in "abcdefgh"]
    for image in images:
        site.upstream.add_image(str(image.repository).removeprefix("docker.io/"), b"layer")
    look_ups = 0

    async def locate(repo: RepositoryName) -> Destination:
        return Destination(worker.mirror, repo, "docker.io")

    async def find_stored(digests: Sequence[Digest]) -> set[Digest]:
        nonlocal look_ups
        look_ups += 1
        if look_ups == 1:
            raise apsw.IOError("disk I/O error")
        return await worker.store.metadata.known_blobs(digests)

    with pytest.raises(apsw.IOError, match="disk I/O error"):
        await Warmer(locate, find_stored, None, NoObserver()).warm(images)
    for _ in range(200):  # iterations of the event loop in which the other images could be fetched
        await asyncio.sleep(0.001)
    for image in images[MAX_RUNNING_REFERENCES + 1 :]:
        with pytest.raises(ManifestUnknown):
            await worker.store.resolve_manifest(image.repository, Tag("1"))
