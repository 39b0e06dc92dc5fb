"""The data directory of a CNCF Distribution registry, in the format in which that registry writes it (`OldDirectory`).

Some tests in tests/system/migration import a directory that Debian's real docker-registry has written. This module can
write directories with faults that the real registry does not make.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.fakes.upstream_content import ImageTree, UpstreamContent


class OldDirectory:
    """A directory at `path`, below which the old registry has its content."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = path / "docker" / "registry" / "v2"
        (self.root / "repositories").mkdir(parents=True)

    def push(self, repo: str, image: ImageTree, *tags: str) -> ImageTree:
        """Writes an image with everything below it, and returns it."""
        content = UpstreamContent()
        content.add(repo, image, *tags)
        held = content.repositories[repo]
        for digest, blob in held.blobs.items():
            self.write_data(digest, blob.read())
            self.write_link(self.layer(repo, digest), digest)
        for digest, (body, _) in held.manifests.items():
            self.write_data(digest, body)
            self.write_link(self.revision(repo, digest), digest)
        for tag, digest in held.tags.items():
            self.write_link(self.tag(repo, tag), digest)
        return image

    def data(self, digest: str) -> Path:
        algorithm, _, encoded = digest.partition(":")
        return self.root / "blobs" / algorithm / encoded[:2] / encoded / "data"

    def layer(self, repo: str, digest: str) -> Path:
        return self.root / "repositories" / repo / "_layers" / digest.replace(":", "/") / "link"

    def revision(self, repo: str, digest: str) -> Path:
        return self.root / "repositories" / repo / "_manifests" / "revisions" / digest.replace(":", "/") / "link"

    def tag(self, repo: str, tag: str) -> Path:
        return self.root / "repositories" / repo / "_manifests" / "tags" / tag / "current" / "link"

    def write_data(self, digest: str, body: bytes) -> None:
        path = self.data(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        path.chmod(0o644)

    def write_link(self, path: Path, digest: str, at: float | None = None) -> None:
        """Writes a link file. `at`: its time; None: now."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(digest)
        if at is not None:
            os.utime(path, (at, at))

    def snapshot(self) -> dict[str, bytes]:
        """Returns every file with its bytes."""
        return {str(path): path.read_bytes() for path in sorted(self.path.rglob("*")) if path.is_file()}
