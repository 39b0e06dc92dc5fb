"""Keeps the search index up to date in the background, in one process at a time (`keep_indexed`).

The indexer adds new content to the index in small transactions. It also adds content that an earlier version of the
program stored without an index. If a manifest is damaged, or its config is missing or unreadable, the indexer reads the
manifest again later.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Final

from storage.blobs.blob_store import BlobStore, BytesMissing
from storage.content_search import (
    MAX_TEXT_CHARACTERS,
    MAX_VALUE_CHARACTERS,
    ManifestBatch,
    ManifestLabels,
    ManifestToIndex,
    SearchIndex,
)
from storage.errors import (
    BlobUnknown,
    NameUnknown,
    RegistryError,
    SearchIndexDamaged,
    StorageFailed,
    TooManyOpenFiles,
)
from storage.json_bounds import QUICK_PARSE_BYTES, load_bounded
from storage.leases import Leases
from storage.metadata.catalog import BlobRow, Metadata
from storage.names import Digest, RepositoryName

SLOT: Final = "search index"
"""Name of the slot (a permit that one process at a time can hold) for writing the index."""
CHECK_SECONDS: Final = 1.0
"""Seconds between two checks for content that is not in the index."""
CHECKS_BETWEEN_REREADS: Final = 300
"""Number of checks after which the process with the slot reads the incomplete manifests again. A manifest is
*incomplete* if its labels could not be read completely."""
CHECKS_BETWEEN_SLOT_ATTEMPTS: Final = 300
"""Number of checks after which a process without the slot tries to get the slot. It tries at once if a check finds
content that is not in the index."""
PAUSE_SECONDS: Final = 0.005
"""Seconds between two batches, so that a client's change does not wait for many batches."""
RETRY_SECONDS: Final = 30.0
"""Seconds until a process tries again after an error."""
MAX_INDEXED_CONFIG_BYTES: Final = 256 * 1024
"""Size of the largest image config whose labels are in the index."""
MAX_INLINE_BYTES: Final = QUICK_PARSE_BYTES
"""Size of the largest JSON document that is parsed on the event loop. Larger documents are parsed in a thread."""
MayRead = Callable[[RepositoryName, Digest], Awaitable[bool]]
"""A function that returns whether clients may read a stored blob of a repository. If the blob came from a private
upstream, they may read it only after the upstream has confirmed that the repository has the blob."""
log = logging.getLogger("storage.search")


async def may_read_all(repo: RepositoryName, digest: Digest) -> bool:
    """Returns True. A `MayRead` for stores without private upstreams."""
    return True


class SearchIndexer:
    """Adds content to the search index until all content is in it."""

    def __init__(
        self, index: SearchIndex, metadata: Metadata, blobs: BlobStore, may_read: MayRead = may_read_all
    ) -> None:
        """`metadata` and `blobs`: the stores with the image configs, which contain the labels. `may_read`: a config for
        which it returns False counts as missing."""
        self._index = index
        self._metadata = metadata
        self._blobs = blobs
        self._may_read = may_read
        self._lines_by_config: dict[Digest, Mapping[str, str]] = {}
        """A cache of the labels in the configs of the current batch, because many manifests can have the same config.
        The key is the digest of a config. The value maps the name of each label to its *line*, the text
        `name=value`."""

    def has_unindexed(self) -> bool:
        """Returns whether there is content that is not in the index. Takes microseconds. Raises StorageFull,
        StorageFailed."""
        return self._index.has_unindexed()

    async def run(self) -> int:
        """Adds the content that is not in the index, in batches. Ends after the first batch that is not full.
        Leaves newer content to the next call, because many small batches cost more than a few full batches. Returns the
        number of batches. Raises StorageFull, StorageFailed. A cancellation leaves the index usable; a later call
        continues."""
        batches = 0
        while self.has_unindexed():
            may_have_more_names = await self._index.index_names()  # the names of repositories and tags
            batch = await self._index.unindexed_manifests()
            if batch.end != batch.start:
                await self._add_batch(batch)
            batches += 1
            if not (may_have_more_names or batch.is_full):
                break
            await asyncio.sleep(PAUSE_SECONDS)
        return batches

    async def read_incomplete_again(self) -> None:
        """Reads the incomplete manifests again. Stores the labels of those that can be read completely now. Raises
        StorageFull, StorageFailed. A cancellation leaves the index usable."""
        last_read: tuple[str, int] | None = None
        while True:
            page = await self._index.incomplete_manifests(last_read)
            labels = await self._labels_of_all(page.manifests)
            complete = [manifest_labels for manifest_labels in labels if manifest_labels.missing_config is None]
            if complete:
                await self._index.replace_labels(complete)
            if page.end is None:
                return
            last_read = page.end
            await asyncio.sleep(PAUSE_SECONDS)

    async def rebuild(self) -> None:
        """Drops the index, even if it is damaged. `run` then builds it again. Raises StorageFull, StorageFailed."""
        await self._index.rebuild()

    async def _add_batch(self, batch: ManifestBatch) -> None:
        await self._index.add_manifests(batch, await self._labels_of_all(batch.manifests))

    async def _labels_of_all(self, manifests: Sequence[ManifestToIndex]) -> list[ManifestLabels]:
        self._lines_by_config.clear()
        labels = []
        for manifest in manifests:
            labels.append(await self.labels_of(manifest))
            await asyncio.sleep(0)  # lets other tasks run: `labels_of` may return without waiting
        return labels

    async def labels_of(self, manifest: ManifestToIndex) -> ManifestLabels:
        """Returns the labels that the index stores for a manifest: its annotations, and the labels in its config if the
        config can be read. If both have a label of the same name, returns the label of the config. Raises StorageFull,
        StorageFailed."""
        config_lines: Mapping[str, str] = {}
        missing_config = None
        if manifest.config is not None:
            try:
                config_lines = await self._config_lines(manifest.repository, manifest.config)
            except (NameUnknown, BlobUnknown, BytesMissing):
                missing_config = manifest.config
        lines = {**await _parse_labels(manifest.annotations or b""), **config_lines}
        return ManifestLabels(manifest, "\n".join(_first_lines(lines).values()), missing_config)

    async def _config_lines(self, repo: RepositoryName, digest: Digest) -> Mapping[str, str]:
        """Returns the lines of the labels in an image config, by the names of the labels; no lines if the config is
        larger than `MAX_INDEXED_CONFIG_BYTES`. Raises NameUnknown, BlobUnknown, BytesMissing."""
        row = await self._metadata.blob(repo, digest)
        if not await self._may_read(repo, digest):
            raise BlobUnknown
        if digest not in self._lines_by_config:
            config = await self._read_blob(row) if row.size <= MAX_INDEXED_CONFIG_BYTES else b""
            self._lines_by_config[digest] = await _parse_labels(config, "config", "Labels")
        return self._lines_by_config[digest]

    async def _read_blob(self, row: BlobRow) -> bytes:
        """Returns the bytes of a blob. Raises TooManyOpenFiles. Raises BytesMissing if the bytes are missing or cannot
        be read; the caller then goes on with other manifests."""
        try:
            async with aclosing(await self._blobs.open(row.digest, row.size, row.place, None)) as reader:
                if reader.data is not None:
                    return reader.data
                return b"".join([part async for part in reader])
        except TooManyOpenFiles:
            raise
        except StorageFailed as error:
            log.info("the image config %s is not in the search index: %s", row.digest, error.message)
            raise BytesMissing(row.place) from error


async def _parse_labels(document: bytes, *path: str) -> Mapping[str, str]:
    """Returns the lines of the labels in a JSON document, by the names of the labels. Leaves out lines that do not fit
    into the index. `path`: the keys that lead to the object with the labels, such as `config`, `Labels`."""
    if len(document) <= MAX_INLINE_BYTES:
        return _parse_labels_now(document, *path)
    return await asyncio.to_thread(_parse_labels_now, document, *path)


def _parse_labels_now(document: bytes, *path: str) -> Mapping[str, str]:
    """Does the work of `_parse_labels`, but blocks. Returns no lines if the document cannot be parsed."""
    try:
        value = load_bounded(document) if document else None
    except (ValueError, RecursionError):
        return {}
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, dict):
        return {}
    return _first_lines({name: _line(name, text) for name, text in value.items() if isinstance(text, str)})


def _line(name: str, value: str) -> str:
    """Returns a label as one line, even if the value has several lines. Replaces lone surrogates, which cannot be
    stored."""
    text = " ".join(f"{name[:MAX_VALUE_CHARACTERS]}={value[:MAX_VALUE_CHARACTERS]}".split())
    return text.encode("utf-8", "replace").decode()


def _first_lines(lines: Mapping[str, str]) -> Mapping[str, str]:
    """Sorts the lines by the names of their labels, and returns as many of the first lines as fit into
    `MAX_TEXT_CHARACTERS`."""
    fitting_lines: dict[str, str] = {}
    remaining = MAX_TEXT_CHARACTERS
    for name, line in sorted(lines.items()):
        remaining -= len(line) + 1
        if remaining < 0:
            break
        fitting_lines[name] = line
    return fitting_lines


async def keep_indexed(indexer: SearchIndexer, leases: Leases) -> None:
    """Keeps the index up to date until the task is cancelled. Every server process runs this function. The process that
    holds the slot does the work. The other processes try to get the slot (`CHECKS_BETWEEN_SLOT_ATTEMPTS`). After an
    error, logs it and tries again later.

    After SearchIndexDamaged, drops the index and builds a new one. If SearchIndexDamaged is raised again before the new
    index is complete, does not drop the new index. The damage may be in the tables from which the index is built, and
    another new index would not repair these tables."""
    may_rebuild = True
    checks_without_slot = 0
    while True:
        pause = RETRY_SECONDS
        try:
            if checks_without_slot % CHECKS_BETWEEN_SLOT_ATTEMPTS == 0 or _may_have_work(indexer):
                checks_without_slot = 0
                async with leases.try_slot(SLOT, count=1) as has_slot:
                    checks = 0
                    while has_slot:
                        await indexer.run()
                        if checks % CHECKS_BETWEEN_REREADS == 0:
                            await indexer.read_incomplete_again()
                            may_rebuild = True
                        checks += 1
                        await asyncio.sleep(CHECK_SECONDS)
            checks_without_slot += 1
            pause = CHECK_SECONDS
        except SearchIndexDamaged as error:
            log.error("the search index is damaged: %s", error.__cause__ or error)
            if may_rebuild:
                may_rebuild = False
                pause = await _rebuild(indexer)
        except RegistryError as error:
            log.warning("the search index cannot be updated: %s; trying again later", error.message)
        except Exception:
            log.exception("the search index cannot be updated; trying again later")
        await asyncio.sleep(pause)


def _may_have_work(indexer: SearchIndexer) -> bool:
    """Returns True if some content is not in the index, or if the index cannot be read. In the second case, the process
    that gets the slot finds the damage and builds a new index."""
    try:
        return indexer.has_unindexed()
    except RegistryError:
        return True


async def _rebuild(indexer: SearchIndexer) -> float:
    """Drops the damaged index. Returns the number of seconds to wait before the next attempt to update the index."""
    try:
        await indexer.rebuild()
    except Exception:
        log.exception("the damaged search index cannot be dropped")
        return RETRY_SECONDS
    log.warning("the search index is built again")
    return CHECK_SECONDS
