"""The images the upstream holds."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.loaders.http_client import HttpClient
from bench.random_content import CONFIG_TYPE, MIB, BlobContent, blob_from_file, make_blob, make_manifest, write_random

TAG = "latest"
CONFIG_SIZE = 4096


@dataclass(frozen=True)
class ImageSpec:
    """A repository with one tag, and what is in it."""

    repo: str
    layers: Sequence[int]
    """Bytes of each."""

    def shrunk(self, by: int) -> ImageSpec:
        """The same with layers that much smaller."""
        return ImageSpec(self.repo, [max(4096, size // by) for size in self.layers])


WARM_UP_IMAGE = ImageSpec("bench/prime", [64 << 10] * 3)
"""Pulled before each trial, so that none measures the first request of a program's life."""
SHARED_IMAGE = ImageSpec("bench/crowd", [256 * MIB, 4 * MIB, MIB, 64 << 10])
LINK_IMAGE = ImageSpec("bench/link", [10 * MIB, 160 * MIB, 10 * MIB, 10 * MIB, 10 * MIB])
FIRST_BYTE_IMAGES = [ImageSpec(f"bench/first{number}", [256 * MIB]) for number in range(3)]
LARGE_IMAGE = ImageSpec("bench/large", [1024 * MIB])
HUGE_IMAGE = ImageSpec("bench/huge", [2048 * MIB])


@dataclass(frozen=True)
class PushedImage:
    """An image as the upstream holds it."""

    repo: str
    body: bytes
    """Its manifest."""
    size: int
    """Bytes of manifest, config and layers."""
    largest: int
    """Bytes of the largest layer."""


def push_image(image: ImageSpec, port: int, folder: Path) -> PushedImage:
    """Makes an image of random bytes and pushes it. Raises TrialFailed."""
    note = {"architecture": "amd64", "os": "linux", "author": os.urandom(CONFIG_SIZE // 2).hex()}
    config, layers = make_blob(json.dumps(note).encode(), CONFIG_TYPE), list[BlobContent]()
    with HttpClient(port) as client:
        client.push_blob(image.repo, config.digest, config.content)
        for size in image.layers:
            path = write_random(folder / "layer", size)
            layers.append(blob_from_file(path))
            client.push_blob(image.repo, layers[-1].digest, path)
            path.unlink()
        body = make_manifest(config, layers)
        client.put_manifest(image.repo, TAG, body)
    size = len(body) + config.size + sum(layer.size for layer in layers)
    return PushedImage(image.repo, body, size, max(layer.size for layer in layers))
