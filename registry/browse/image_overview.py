"""Reads overviews of manifests (`OverviewReader`), for the list of tags and for the page about one manifest.

An overview has the platforms of the image and their sizes, and the time when the image was created. It says whether the
manifest has signatures, SBOMs or attestations.
"""

from __future__ import annotations

import asyncio
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from registry.browse.artifact_types import marks_of
from registry.browse.content_reader import (
    MAX_ROW_BYTES,
    UNREADABLE,
    ConfigSummary,
    ContentReader,
    IndexEntry,
    ManifestSummary,
)
from registry.browse.models import MarksView, PlatformView
from storage.image_times import parse_time
from storage.names import Digest, RepositoryName
from storage.tag_listing import ManifestFacts, TagListing

MAX_PAGE_PLATFORMS: Final = 2_000
"""A page lists at most this many platforms. For further platforms, the page shows only their number."""
_MAX_CHILDREN_READ: Final = 500
"""At most this many children are read for one page. A *child* is a manifest that an index lists. The page does not show
the sizes of further children."""
_MAX_PAGE_BYTES: Final = 32 * 1024 * 1024
"""This limit applies twice to each page. At most this many bytes of the page's own manifests are read, and then at most
this many bytes of the children of the page's indexes."""
_MAX_ATTESTATIONS_READ: Final = 2
"""At most this many attestations by BuildKit are read for each index, to find out whether they contain an SBOM."""
_BATCH: Final = 10
"""After this many manifests, the reader lets other tasks of the event loop run."""


@dataclass(frozen=True, slots=True)
class Overview:
    """What is shown of one manifest.

    - `more_platforms`: number of entries of an index that are not shown.
    - `marks`: whether the manifest has a signature, an SBOM or an attestation.
    - `children`: for an index, the summaries of the children that were read, by digest."""

    summary: ManifestSummary
    platforms: Sequence[PlatformView]
    more_platforms: int
    created: datetime | None
    marks: MarksView
    children: Mapping[Digest, ManifestSummary]


class OverviewReader:
    """Reads all overviews of a page together, to limit the work for the page."""

    def __init__(self, reader: ContentReader, listing: TagListing) -> None:
        self._reader = reader
        self._listing = listing

    async def read(
        self,
        repo: RepositoryName,
        manifests: Iterable[ManifestFacts],
        known_summaries: Mapping[Digest, ManifestSummary] | None = None,
    ) -> Mapping[Digest, Overview]:
        """Returns the overviews of manifests of a repository, by digest. The caller must have checked the right to
        pull. `known_summaries`: summaries that the caller has already read. This method reads the other summaries. The
        summary of a manifest that is too large to read is `UNREADABLE`."""
        facts_by_digest = {facts.digest: facts for facts in manifests}
        summaries = dict(known_summaries or {})
        sizes = {digest: facts.size for digest, facts in facts_by_digest.items() if digest not in summaries}
        summaries.update(await self._read_summaries(repo, sizes))
        entries_by_index = _shown_entries(summaries)
        all_entries = [entry for shown_entries in entries_by_index.values() for entry in shown_entries]
        present_sizes = await self._present_sizes(repo, all_entries)
        child_sizes: dict[Digest, int] = {}
        # Selects the children that the repository has, with at most `_MAX_ATTESTATIONS_READ` attestations per index.
        for shown_entries in entries_by_index.values():
            attestation_count = 0
            for entry in shown_entries:
                attestation_count += entry.is_attestation
                is_excess = entry.is_attestation and attestation_count > _MAX_ATTESTATIONS_READ
                if entry.digest in present_sizes and not is_excess:
                    child_sizes.setdefault(entry.digest, present_sizes[entry.digest])
        children = await self._read_summaries(repo, dict(list(child_sizes.items())[:_MAX_CHILDREN_READ]))
        overviews = {}
        for number, (digest, facts) in enumerate(facts_by_digest.items()):
            if number % _BATCH == 0:
                await asyncio.sleep(0)
            summary, shown_entries = summaries[digest], entries_by_index[digest]
            overviews[digest] = await self._overview(repo, facts, summary, shown_entries, children, present_sizes)
        return overviews

    async def _read_summaries(self, repo: RepositoryName, sizes: Mapping[Digest, int]) -> dict[Digest, ManifestSummary]:
        """Returns the summaries of manifests, by digest. `sizes`: the sizes of the manifests in bytes, by digest. When
        `_MAX_PAGE_BYTES` is used up, the remaining manifests get the summary `UNREADABLE`."""
        summaries, remaining = {}, _MAX_PAGE_BYTES
        for number, (digest, size) in enumerate(sizes.items()):
            if number % _BATCH == 0:
                await asyncio.sleep(0)
            remaining -= size if size <= MAX_ROW_BYTES else 0  # larger manifests are not read
            summaries[digest] = UNREADABLE if remaining < 0 else await self._reader.read_summary(repo, digest, size)
        return summaries

    async def _present_sizes(self, repo: RepositoryName, entries: Sequence[IndexEntry]) -> Mapping[Digest, int]:
        """Returns the sizes of the manifests in `entries` that the repository has, in bytes, by digest."""
        digests = {entry.digest for entry in entries}
        return await self._listing.stored_sizes(repo, digests) if digests else {}

    async def _overview(
        self,
        repo: RepositoryName,
        facts: ManifestFacts,
        summary: ManifestSummary,
        entries: Sequence[IndexEntry],
        children: Mapping[Digest, ManifestSummary],
        present: Container[Digest],
    ) -> Overview:
        """Returns the overview of one manifest. `entries`: for an index, the entries that the page shows. `children`:
        the summaries of the children of all indexes on the page, by digest. `present`: the digests of the children that
        the repository has."""
        own_children = {entry.digest: children[entry.digest] for entry in entries if entry.digest in children}
        platforms = [
            PlatformView(
                name=entry.platform,
                digest=entry.digest,
                media_type=entry.media_type,
                present=entry.digest in present,
                size=own_children.get(entry.digest, UNREADABLE).size,
            )
            for entry in entries
            if not entry.is_attestation
        ]
        # An index has no config. The overview of an index uses the config of the first child that has a config.
        image = summary if summary.config else next((child for child in own_children.values() if child.config), None)
        config = ConfigSummary()
        if image is not None and image.config is not None:
            config = await self._reader.read_config_summary(repo, image.config)
        if summary.kind == "image":
            platforms = [
                PlatformView(
                    name=config.platform,
                    digest=facts.digest,
                    media_type=facts.media_type,
                    present=True,
                    size=summary.size,
                )
            ]
        child_predicates = (name for child in own_children.values() for name in child.predicates)
        predicates = {*summary.predicates, *child_predicates}
        lists_attestations = bool(predicates) or any(entry.is_attestation for entry in entries)
        return Overview(
            summary=summary,
            platforms=platforms,
            more_platforms=summary.more_entries + len(summary.entries) - len(entries),
            created=parse_time(config.created) or parse_time(summary.created),
            marks=marks_of(facts, predicates, lists_attestations),
            children=own_children,
        )


def _shown_entries(summaries: Mapping[Digest, ManifestSummary]) -> dict[Digest, Sequence[IndexEntry]]:
    """Returns the index entries that a page shows, by the digest of the index. A page shows at most
    `MAX_PAGE_PLATFORMS` entries in total. A manifest that is not an index has no entries."""
    shown_entries: dict[Digest, Sequence[IndexEntry]] = {}
    remaining = MAX_PAGE_PLATFORMS
    for digest, summary in summaries.items():
        shown_entries[digest] = summary.entries[:remaining]
        remaining -= len(shown_entries[digest])
    return shown_entries
