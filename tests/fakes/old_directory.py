"""Writes data directories in the format of a CNCF Distribution registry (`OldDirectory`), from which tests import.

Some tests in tests/system/migration import a directory that Debian's real docker-registry has written. This module can
also write directories with faults, which the real registry would not write.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.fakes.upstream_content import ImageTree, UpstreamContent


class OldDirectory:
    """A data directory of the old registry at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = path / "docker" / "registry" / "v2"
        (self.root / "repositories").mkdir(parents=True)

    def push(self, repo: str, image: ImageTree, *tags: str) -> ImageTree:
        """Writes an image with all manifests and blobs to which it refers, and returns the image."""
        content = UpstreamContent()
        content.add(repo, image, *tags)
        repository = content.repositories[repo]
        for digest, blob in repository.blobs.items():
            self.write_data(digest, blob.read())
            self.write_link(self.layer(repo, digest), digest)
        for digest, (body, _) in repository.manifests.items():
            self.write_data(digest, body)
            self.write_link(self.revision(repo, digest), digest)
        for tag, digest in repository.tags.items():
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
        """Writes a link file, whose content is a digest. `at`: the file's modification time; None: now."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(digest)
        if at is not None:
            os.utime(path, (at, at))

    def snapshot(self) -> dict[str, bytes]:
        """Returns the bytes of all files by path."""
        return {str(path): path.read_bytes() for path in sorted(self.path.rglob("*")) if path.is_file()}
