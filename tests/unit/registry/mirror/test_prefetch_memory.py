"""The memory that a mirror uses to remember the images that clients are pulling."""

from __future__ import annotations

import pytest

from registry.mirror.fill.demand import ImagePull
from registry.mirror.fill.fill import Fill
from registry.mirror.prefetch import MAX_IMAGE_BLOBS, MAX_REMEMBERED_BLOBS, Prefetcher, PrefetchQueue
from storage.content import Descriptor, Manifest
from storage.names import Digest, RepositoryName
from tests.fakes.registry_content import image_of
from tests.unit.registry.mirror.conftest import MIRRORED_REPO

LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"


def image_number(number: int) -> Manifest:
    """Returns an image with as many layers as are prefetched at most. No other image has the same layers."""
    digests = [Digest(f"sha256:{number * MAX_IMAGE_BLOBS + index:064x}") for index in range(MAX_IMAGE_BLOBS)]
    return image_of(
        Descriptor("application/vnd.oci.image.config.v1+json", Digest(f"sha256:{'f' * 56}{number:08x}"), 100),
        [Descriptor(LAYER_TYPE, digest, 1000) for digest in digests],
    )


@pytest.mark.slow
async def test_memory_for_many_images_with_many_layers() -> None:
    """A client can pull the manifests of many images with many layers. Only the images that were pulled last are
    remembered, so the memory stays small."""

    async def should_prefetch(repo: RepositoryName, blob: Descriptor) -> bool:
        raise AssertionError("nothing is queued")

    async def wait_for_prefetch_slot() -> None:
        raise AssertionError("nothing is queued")

    def start_fill(repo: RepositoryName, blob: Descriptor, pull: ImagePull) -> Fill:
        raise AssertionError("nothing is queued")

    prefetcher = Prefetcher(
        "layers", PrefetchQueue(should_prefetch, wait_for_prefetch_slot, start_fill), lambda: False, lambda: 0.0
    )
    images = [image_number(number) for number in range(40)]
    for image in images:
        prefetcher.on_manifest(MIRRORED_REPO, image)
    remembered = [number for number, image in enumerate(images) if prefetcher.pulls_of(image.blobs[0].digest)]
    assert remembered == list(range(40 - MAX_REMEMBERED_BLOBS // MAX_IMAGE_BLOBS, 40))
