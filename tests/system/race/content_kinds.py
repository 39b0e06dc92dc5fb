"""The content stores (`ContentKind`) with which the race tests run: files and an object store. Each lists the steps at
which a test can stop it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from storage.composition import OpenContent, layout_of, open_file_stores
from storage.names import Digest
from storage.store.stored_registry import StoredRegistry
from tests.fakes.object_store.bucket import Bucket
from tests.fakes.object_store.multipart_blob_store import open_objects, place_of

PART_BYTES = 64 * 1024
Step = tuple[str, str]
"""The name of a call to the store, and a part of the call's path or key."""


class ContentKind(Protocol):
    """A kind of content store. `steps` names the points at which a test can stop it:

    - `write`: in the middle of a write
    - `verify`: before the uploaded content is durable; in an object store, where it is durable at once, before the
      commit ends the upload session
    - `before_move`: before the content is moved to its final place
    - `after_move`: before this move is durable, or before the upload session is deleted
    - `commit`: before a commit of the metadata
    - `remove`: before the garbage collector removes the content from its place
    - `take_over`: before an upload session gets a new owner
    """

    name: str
    steps: dict[str, Step]
    keeps_half_writes: bool
    """Whether the store keeps the first bytes of a write that is stopped in the middle."""

    def opener(self, data: Path, before: Callable[[str, str], None]) -> OpenContent:
        """Returns the opener for `open_registry`. `before` is called before each step."""
        ...

    def leave_stray(self, data: Path, digest: Digest, body: bytes) -> None:
        """Leaves a file or object in the blob's place without a row in the metadata, as a crash can do."""
        ...


class Files:
    name = "files"
    keeps_half_writes = True
    steps = {  # noqa: RUF012
        "verify": ("sync", "/uploads/"),
        "before_move": ("rename", "/blobs/"),
        "after_move": ("sync", "/blobs/"),
        "remove": ("rename", "/trash/"),
        "take_over": ("rename", "/uploads/"),
        "write": ("write", ""),
        "commit": ("commit", ""),
    }

    def opener(self, data: Path, before: Callable[[str, str], None]) -> OpenContent:
        return open_file_stores  # `GatedSystem` intercepts the steps of this store, so `before` is not needed

    def leave_stray(self, data: Path, digest: Digest, body: bytes) -> None:
        layout_of(data).blob(digest).write_bytes(b"left by a crash")


class Objects:
    """Objects in a bucket. A *claim* is an object that says who owns an upload session, or that the session has ended.
    So `verify` and `take_over` name the same call: a commit puts a claim that ends the session, and a takeover puts the
    claim of the new owner."""

    name = "objects"
    keeps_half_writes = False
    steps = {  # noqa: RUF012
        "verify": ("put", "/claims/"),
        "before_move": ("complete", "blobs/"),
        "after_move": ("delete", "uploads/"),
        "remove": ("delete", "blobs/"),
        "take_over": ("put", "/claims/"),
        "write": ("put", "/chunks/"),
        "commit": ("commit", ""),
    }

    def opener(self, data: Path, before: Callable[[str, str], None]) -> OpenContent:
        return open_objects(data / "bucket", PART_BYTES, before)

    def leave_stray(self, data: Path, digest: Digest, body: bytes) -> None:
        """Puts the whole object, because an object store keeps nothing of an interrupted put."""
        Bucket(data / "bucket", PART_BYTES).put(place_of(digest), body)


KINDS: dict[str, ContentKind] = {"files": Files(), "objects": Objects()}


async def is_stored(registry: StoredRegistry, digest: Digest) -> bool:
    """Returns whether the store has the blob's bytes, whatever the metadata says."""
    blobs = registry.blobs
    return digest in {listed.digest for number in range(blobs.shard_count) for listed in await blobs.list_shard(number)}
