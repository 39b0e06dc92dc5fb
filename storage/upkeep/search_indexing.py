"""Keeps the search index up in the background, in one process at a time (`keep_indexed`).

The index follows the content in small transactions. The same function indexes a store that is older than the index.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from contextlib import aclosing
from typing import Final

from storage.blobs.blob_store import BlobStore, BytesMissing
from storage.content_search import (
    MAX_TEXT_CHARACTERS,
    MAX_VALUE_CHARACTERS,
    ManifestBatch,
    ManifestLabels,
    SearchIndex,
    UnindexedManifest,
)
from storage.errors import BlobUnknown, RegistryError
from storage.json_bounds import load_bounded
from storage.leases import Leases
from storage.metadata.catalog import BlobRow, Metadata
from storage.names import Digest, RepositoryName

SLOT: Final = "search index"
"""Name of the slot that the process holds which writes the index."""
CHECK_SECONDS: Final = 1.0
"""Seconds between two looks for content that is not in the index."""
PAUSE_SECONDS: Final = 0.005
"""Seconds between two batches, so that clients' changes need not wait for many of them."""
RETRY_SECONDS: Final = 30.0
"""Seconds until a process tries again after an error of the store."""
MAX_CONFIG_BYTES: Final = 256 * 1024
"""Labels of a larger image config are not in the index."""
log = logging.getLogger("storage.search")


class SearchIndexer:
    """Adds content to the index until all of it is there."""

    def __init__(self, index: SearchIndex, metadata: Metadata, blobs: BlobStore) -> None:
        """`metadata` and `blobs`: where the image configs are, which have the labels."""
        self._index = index
        self._metadata = metadata
        self._blobs = blobs
        self._labels_by_config: dict[Digest, Mapping[str, object]] = {}
        """The labels in the configs of the current batch. Many manifests can have the same config."""

    async def run(self) -> int:
        """Adds the content that is not in the index, in batches. Ends after one that is not full, so that what is
        pushed meanwhile waits for the next call: small batches cost more. Returns the number of batches. Raises
        StorageFull, StorageFailed. A cancellation leaves the index usable; a later call continues."""
        batches = 0
        while self._index.has_unindexed():
            are_many_left = await self._index.index_names()
            batch = await self._index.unindexed_manifests()
            if batch.reached != batch.seen:
                await self._add(batch)
            batches += 1
            if not (are_many_left or batch.is_full):
                break
            await asyncio.sleep(PAUSE_SECONDS)
        return batches

    async def _add(self, batch: ManifestBatch) -> None:
        self._labels_by_config.clear()
        await self._index.add_manifests(batch, [await self.labels_of(manifest) for manifest in batch.manifests])

    async def labels_of(self, manifest: UnindexedManifest) -> ManifestLabels:
        """Returns what the index gets to know of a manifest: its annotations, and the labels in its config if that is
        stored. Raises StorageFull, StorageFailed."""
        labels: Mapping[str, object] = {}
        missing = None
        if manifest.config is not None:
            try:
                labels = await self._config_labels(manifest.repository, manifest.config)
            except (BlobUnknown, BytesMissing):
                missing = manifest.config
        annotations = _parse((manifest.annotations or "").encode())
        return ManifestLabels(manifest, _index_text({**annotations, **labels}), missing)

    async def _config_labels(self, repo: RepositoryName, digest: Digest) -> Mapping[str, object]:
        """Returns the labels in a config of a repository; none if it is too large to be one. Raises BlobUnknown,
        BytesMissing."""
        row = await self._metadata.blob(repo, digest)
        if digest not in self._labels_by_config:
            config = _parse(await self._read(row)) if row.size <= MAX_CONFIG_BYTES else {}
            self._labels_by_config[digest] = _nested(config, "config", "Labels")
        return self._labels_by_config[digest]

    async def _read(self, row: BlobRow) -> bytes:
        """Returns the bytes of a blob. Raises BytesMissing."""
        async with aclosing(await self._blobs.open(row.digest, row.size, row.place, None)) as reader:
            if reader.data is not None:
                return reader.data
            return b"".join([part async for part in reader])


def _parse(document: bytes) -> Mapping[str, object]:
    """Returns a JSON object; an empty one if the document is not one."""
    if not document:
        return {}
    try:
        parsed = load_bounded(document)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _nested(document: Mapping[str, object], *names: str) -> Mapping[str, object]:
    """Returns an object inside of others; an empty one if there is none."""
    for name in names:
        inner = document.get(name)
        if not isinstance(inner, dict):
            return {}
        document = inner
    return document


def _index_text(labels: Mapping[str, object]) -> str:
    """Returns the labels that the index has, one a line."""
    return "\n".join(_lines(labels))


def _lines(labels: Mapping[str, object]) -> Iterator[str]:
    remaining = MAX_TEXT_CHARACTERS
    for name, value in sorted(labels.items()):
        if isinstance(value, str):
            # A value can have several lines; a lone surrogate cannot be stored.
            text = " ".join(f"{name[:MAX_VALUE_CHARACTERS]}={value[:MAX_VALUE_CHARACTERS]}".split())
            line = text.encode("utf-8", "replace").decode()
            remaining -= len(line) + 1
            if remaining < 0:
                return
            yield line


async def keep_indexed(indexer: SearchIndexer, leases: Leases) -> None:
    """Keeps the index up until the task is cancelled. Every server process runs this; the one with the slot does the
    work. Logs an error of the store, and tries again later."""
    while True:
        pause = CHECK_SECONDS
        try:
            async with leases.try_slot(SLOT, count=1) as has_slot:
                while has_slot:
                    await indexer.run()
                    await asyncio.sleep(CHECK_SECONDS)
        except RegistryError as error:
            log.warning("the search index cannot be written: %s; it is tried again later", error.message)
            pause = RETRY_SECONDS
        await asyncio.sleep(pause)
