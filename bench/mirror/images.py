"""The images the upstream holds."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.content import CONFIG_TYPE, MIB, Blob, blob, file_blob, manifest, write_noise
from bench.wire import Client

TAG = "latest"
CONFIG_SIZE = 4096


@dataclass(frozen=True)
class Image:
    """A repository with one tag, and what is in it."""

    repo: str
    layers: Sequence[int]
    """Bytes of each."""

    def shrunk(self, by: int) -> Image:
        """The same with layers that much smaller."""
        return Image(self.repo, [max(4096, size // by) for size in self.layers])


PRIME = Image("bench/prime", [64 << 10] * 3)
"""Pulled before each trial, so that none measures the first request of a program's life."""
CROWD = Image("bench/crowd", [256 * MIB, 4 * MIB, MIB, 64 << 10])
LINK = Image("bench/link", [10 * MIB, 160 * MIB, 10 * MIB, 10 * MIB, 10 * MIB])
FIRSTS = [Image(f"bench/first{number}", [256 * MIB]) for number in range(3)]
LARGE = Image("bench/large", [1024 * MIB])
HUGE = Image("bench/huge", [2048 * MIB])


@dataclass(frozen=True)
class Held:
    """An image as the upstream holds it."""

    repo: str
    body: bytes
    """Its manifest."""
    size: int
    """Bytes of manifest, config and layers."""
    largest: int
    """Bytes of the largest layer."""


def push(image: Image, port: int, folder: Path) -> Held:
    """Makes an image of random bytes and pushes it. Raises TrialFailed."""
    note = {"architecture": "amd64", "os": "linux", "author": os.urandom(CONFIG_SIZE // 2).hex()}
    config, layers = blob(json.dumps(note).encode(), CONFIG_TYPE), list[Blob]()
    with Client(port) as client:
        client.push_blob(image.repo, config.digest, config.content)
        for size in image.layers:
            path = write_noise(folder / "layer", size)
            layers.append(file_blob(path))
            client.push_blob(image.repo, layers[-1].digest, path)
            path.unlink()
        body = manifest(config, layers)
        client.put_manifest(image.repo, TAG, body)
    size = len(body) + config.size + sum(layer.size for layer in layers)
    return Held(image.repo, body, size, max(layer.size for layer in layers))
