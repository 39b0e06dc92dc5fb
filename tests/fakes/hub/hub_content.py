"""The content of the fake Hub, read from the files that `UpstreamContent.save` has written. The bytes of a blob come
from a mapped file, or are generated noise."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.fakes.upstream_content import Noise, referrer_descriptor

PIECE = 1 << 20  # bytes


class ReadableBody(Protocol):
    """Bytes that can be read at any offset."""

    @property
    def size(self) -> int: ...

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]: ...


class MappedBody:
    """Bytes in memory, or a file that is mapped into memory."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self._view = memoryview(data)
        self.size = len(self._view)

    @classmethod
    def file(cls, path: Path) -> MappedBody:
        with path.open("rb") as file:
            # An empty file cannot be mapped.
            return cls(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b"")

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        for first in range(start, stop, PIECE):
            yield self._view[first : min(first + PIECE, stop)]


@dataclass(frozen=True)
class HubManifest:
    """A manifest or an index of an image."""

    digest: str
    media_type: str
    body: bytes = field(repr=False)


@dataclass
class HubRepository:
    """The content of one repository."""

    blobs: set[str] = field(default_factory=set)
    manifests: dict[str, HubManifest] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def manifest(self, reference: str) -> HubManifest | None:
        return self.manifests.get(self.tags.get(reference, reference))

    def referrers(self, subject: str, artifact_type: str) -> list[dict[str, Any]]:
        """Returns the descriptors of the manifests with this subject and artifact type, in the order of their digests.
        An empty `artifact_type` matches all."""
        found = []
        for manifest in sorted(self.manifests.values(), key=lambda each: each.digest):
            if json.loads(manifest.body).get("subject", {}).get("digest") == subject:
                found.append(referrer_descriptor(manifest.body, manifest.media_type))
        return [each for each in found if artifact_type in ("", each.get("artifactType"))]


class HubContent:
    """All repositories of the fake Hub, and the bytes of all blobs by digest."""

    def __init__(self) -> None:
        self.repositories: dict[str, HubRepository] = {}
        self.bodies: dict[str, ReadableBody] = {}

    def put(self, saved: dict[str, Any]) -> None:
        """Adds the content that `UpstreamContent.save` has written. Existing content stays."""
        folder = Path(saved["folder"])
        for digest, source in saved["blobs"].items():
            if digest not in self.bodies:
                plain = folder / digest.replace(":", "-")
                self.bodies[digest] = MappedBody.file(plain) if isinstance(source, str) else Noise(*source)
        for name, saved_repository in saved["repositories"].items():
            repository = self.repositories.setdefault(name, HubRepository())
            repository.blobs.update(saved_repository["blobs"])
            for digest, media_type in saved_repository["manifests"].items():
                body = (folder / digest.replace(":", "-")).read_bytes()
                repository.manifests[digest] = HubManifest(digest, media_type, body)
            repository.tags.update(saved_repository["tags"])
