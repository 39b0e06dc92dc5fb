"""The content stores that the races are run over, and the steps at which each can be stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from storage.composition import OpenContent, layout_of, open_files
from storage.names import Digest
from storage.store.stored_registry import StoredRegistry
from tests.fakes.object_store.bucket import Bucket
from tests.fakes.object_store.multipart_blob_store import open_objects, place_of

PART_BYTES = 64 * 1024
Step = tuple[str, str]
"""A call's name, and a part of its path or key."""


class ContentKind(Protocol):
    """A content store. Its steps: `verify` comes before the content is durable, `publish` before it is in its place,
    `published` before that is durable or the session is gone, `remove` before it leaves its place, `write` in the
    middle of a write, `take_over` before a session has its new owner."""

    name: str
    steps: dict[str, Step]
    keeps_half_writes: bool
    """Whether some bytes of a write that is stopped in the middle are stored."""

    def opener(self, data: Path, before: Callable[[str, str], None]) -> OpenContent:
        """Returns the opener for `open_registry`. `before` is called before each step."""
        ...

    def leave_stray(self, data: Path, digest: Digest, body: bytes) -> None:
        """Puts something in the blob's place, as a crash would leave it."""
        ...


class Files:
    name = "files"
    keeps_half_writes = True
    steps = {  # noqa: RUF012
        "verify": ("sync", "/uploads/"),
        "publish": ("rename", "/blobs/"),
        "published": ("sync", "/blobs/"),
        "remove": ("rename", "/trash/"),
        "take_over": ("rename", "/uploads/"),
        "write": ("write", ""),
        "commit": ("commit", ""),
    }

    def opener(self, data: Path, before: Callable[[str, str], None]) -> OpenContent:
        return open_files  # `GatedSystem` stops at its steps

    def leave_stray(self, data: Path, digest: Digest, body: bytes) -> None:
        layout_of(data).blob(digest).write_bytes(b"left by a crash")


class Objects:
    name = "objects"
    keeps_half_writes = False
    steps = {  # noqa: RUF012
        "verify": ("put", "/claims/"),
        "publish": ("complete", "blobs/"),
        "published": ("delete", "uploads/"),
        "remove": ("delete", "blobs/"),
        "take_over": ("put", "/claims/"),
        "write": ("put", "/chunks/"),
        "commit": ("commit", ""),
    }

    def opener(self, data: Path, before: Callable[[str, str], None]) -> OpenContent:
        return open_objects(data / "bucket", PART_BYTES, before)

    def leave_stray(self, data: Path, digest: Digest, body: bytes) -> None:
        """Puts the whole object: an interrupted put leaves nothing."""
        Bucket(data / "bucket", PART_BYTES).put(place_of(digest), body)


KINDS: dict[str, ContentKind] = {"files": Files(), "objects": Objects()}


async def is_stored(registry: StoredRegistry, digest: Digest) -> bool:
    """Returns whether the store has the blob's bytes, whatever the metadata says."""
    blobs = registry.blobs
    return digest in {listed.digest for number in range(blobs.shard_count) for listed in await blobs.list_shard(number)}
