"""What lists and details show of a manifest: its platforms with their sizes, when it was made, and what refers to it
(`OverviewReader`)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from registry.browse.artifact_types import marks
from registry.browse.content_reader import (
    UNREADABLE,
    ConfigSummary,
    ContentReader,
    IndexEntry,
    ManifestSummary,
)
from registry.browse.image_config import parse_time
from registry.browse.models import MarksView, PlatformView
from storage.names import Digest, RepositoryName
from storage.tag_listing import ManifestFacts, TagListing

_MAX_CHILDREN_READ: Final = 500
"""How many manifests below indexes are read for one page. The sizes of the others are not shown."""
_MAX_ATTESTATIONS_READ: Final = 2
"""How many of BuildKit's attestations of one index are read, to find out whether they contain an SBOM."""
_BATCH: Final = 10
"""After reading this many manifests, the event loop may run other requests."""


@dataclass(frozen=True, slots=True)
class Overview:
    """What is shown of one manifest. `children`: the summaries of the present manifests of an index, by digest."""

    summary: ManifestSummary
    platforms: Sequence[PlatformView]
    created: datetime | None
    marks: MarksView
    children: Mapping[Digest, ManifestSummary]


class OverviewReader:
    """Reads the overviews of a page together, so that the work for one page is bounded."""

    def __init__(self, reader: ContentReader, listing: TagListing) -> None:
        self._reader = reader
        self._listing = listing

    async def read(self, repo: RepositoryName, manifests: Iterable[ManifestFacts]) -> Mapping[Digest, Overview]:
        """Returns the overviews of manifests of a repository, by digest. The caller has checked the right to pull."""
        facts = {each.digest: each for each in manifests}
        summaries = await self._summaries(repo, {digest: each.size for digest, each in facts.items()})
        entries = [entry for summary in summaries.values() for entry in summary.entries]
        present = await self._present(repo, entries)
        wanted: dict[Digest, int | None] = {}
        for summary in summaries.values():
            attestations = 0
            for entry in summary.entries:
                attestations += entry.is_attestation
                if entry.digest in present and not (entry.is_attestation and attestations > _MAX_ATTESTATIONS_READ):
                    wanted.setdefault(entry.digest)
        children = await self._summaries(repo, dict(list(wanted.items())[:_MAX_CHILDREN_READ]))
        overviews = {}
        for number, (digest, each) in enumerate(facts.items()):
            if number % _BATCH == 0:
                await asyncio.sleep(0)
            overviews[digest] = await self._overview(repo, each, summaries[digest], children, present)
        return overviews

    async def _summaries(
        self, repo: RepositoryName, sizes: Mapping[Digest, int | None]
    ) -> dict[Digest, ManifestSummary]:
        found = {}
        for number, (digest, size) in enumerate(sizes.items()):
            if number % _BATCH == 0:
                await asyncio.sleep(0)
            found[digest] = await self._reader.summary(repo, digest, size)
        return found

    async def _present(self, repo: RepositoryName, entries: Sequence[IndexEntry]) -> Set[Digest]:
        digests = {entry.digest for entry in entries}
        return await self._listing.present(repo, digests) if digests else digests

    async def _overview(
        self,
        repo: RepositoryName,
        facts: ManifestFacts,
        summary: ManifestSummary,
        children: Mapping[Digest, ManifestSummary],
        present: Set[Digest],
    ) -> Overview:
        own = {entry.digest: children[entry.digest] for entry in summary.entries if entry.digest in children}
        platforms = [
            PlatformView(
                name=entry.platform,
                digest=entry.digest,
                media_type=entry.media_type,
                present=entry.digest in present,
                size=own.get(entry.digest, UNREADABLE).size,
            )
            for entry in summary.entries
            if not entry.is_attestation
        ]
        image = summary if summary.config else next((each for each in own.values() if each.config), None)
        config = ConfigSummary()
        if image is not None and image.config is not None:
            config = await self._reader.config_summary(repo, image.config)
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
        predicates = {*summary.predicates, *(each for child in own.values() for each in child.predicates)}
        is_attested = bool(predicates) or any(entry.is_attestation for entry in summary.entries)
        return Overview(
            summary=summary,
            platforms=platforms,
            created=parse_time(config.created) or parse_time(summary.created),
            marks=marks(facts.referrer_types, facts.referrer_tags, predicates, is_attested),
            children=own,
        )
