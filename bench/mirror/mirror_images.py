"""The images that the bench `mirror` pushes to the upstream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.loaders.http_client import HttpClient
from bench.random_content import MIB, BlobContent, blob_from_file, make_config, make_manifest, write_random

TAG = "latest"


@dataclass(frozen=True)
class ImageSpec:
    """A repository with one tag, and the sizes of the image's layers in bytes."""

    repo: str
    layers: Sequence[int]

    def shrunk(self, divisor: int) -> ImageSpec:
        """Returns the same image with layer sizes divided by `divisor`, but at least 4 KiB."""
        return ImageSpec(self.repo, [max(4096, size // divisor) for size in self.layers])


WARM_UP_IMAGE = ImageSpec("bench/prime", [64 << 10] * 3)
"""Pulled before each trial, so that no trial measures the first requests to a new server."""
SHARED_IMAGE = ImageSpec("bench/crowd", [256 * MIB, 4 * MIB, MIB, 64 << 10])
LINK_IMAGE = ImageSpec("bench/link", [10 * MIB, 160 * MIB, 10 * MIB, 10 * MIB, 10 * MIB])
FIRST_BYTE_IMAGES = [ImageSpec(f"bench/first{number}", [256 * MIB]) for number in range(3)]
LARGE_IMAGE = ImageSpec("bench/large", [1024 * MIB])
HUGE_IMAGE = ImageSpec("bench/huge", [2048 * MIB])
ROW_IMAGES = {
    "thundering": [SHARED_IMAGE],
    "first-byte": FIRST_BYTE_IMAGES,
    "fill": [LARGE_IMAGE],
    "hosted-beside-fill": [HUGE_IMAGE],
    "cached-beside-fill": [HUGE_IMAGE],
    "fill-memory": [HUGE_IMAGE],
}
"""The images that a row of the table needs, by the name of the row. All rows that are not listed need LINK_IMAGE."""


def images_of(rows: Sequence[str]) -> list[ImageSpec]:
    """Returns the images that the rows need, without repetitions, and WARM_UP_IMAGE."""
    found = {WARM_UP_IMAGE.repo: WARM_UP_IMAGE}
    found |= {image.repo: image for row in rows for image in ROW_IMAGES.get(row, [LINK_IMAGE])}
    return list(found.values())


@dataclass(frozen=True)
class PushedImage:
    """An image as the upstream holds it."""

    repo: str
    body: bytes
    """The manifest."""
    size: int
    """Bytes of manifest, config and layers."""
    largest: int
    """Bytes of the largest layer."""


def push_image(image: ImageSpec, port: int, folder: Path) -> PushedImage:
    """Pushes an image of random bytes. Each layer is removed from `folder` before the next one is written. Raises
    TrialFailed."""
    layers = list[BlobContent]()
    with HttpClient(port) as client:
        for size in image.layers:
            path = write_random(folder / "layer", size)
            layers.append(blob_from_file(path))
            client.push_blob(image.repo, layers[-1].digest, path)
            path.unlink()
        config = make_config(layers)
        client.push_blob(image.repo, config.digest, config.content)
        body = make_manifest(config, layers)
        client.put_manifest(image.repo, TAG, body)
    size = len(body) + config.size + sum(layer.size for layer in layers)
    return PushedImage(image.repo, body, size, max(layer.size for layer in layers))
