"""Lists of a far registry: tags, and referrers by the API or the fallback tag.

Registries order and page their lists in their own ways (some by collation, some not at all). Ours are in byte order
and lose nothing, so a list is read whole and cut here; a client that goes through its pages gets them from one reading.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from urllib.parse import quote

from registry.memory import MemoryBudget, holding
from registry.mirror.source import ManifestDoubtful, NameDoubtful
from registry.upstream.addresses import place
from registry.upstream.answers import Answer
from registry.upstream.asking import Asking
from registry.upstream.endpoints import Endpoint, Trial
from registry.upstream.exchange import MIB
from registry.upstream.holds import Kind
from registry.upstream.paging import PAGES, cut, next_page
from registry.upstream.parsing import Parser
from registry.upstream.readings import READ_SECONDS, Reading, Readings
from storage.content import OCI_INDEX, Descriptor, Page
from storage.errors import ManifestUnknown, NameUnknown, TagInvalid, UpstreamUnavailable
from storage.json_bounds import Bounds, OutOfBounds, load_bounded
from storage.names import Digest, RepositoryName, Tag

PAGE = 1000
"""Tags asked for at a time; CNCF Distribution refuses more."""
LIST_SIZE = 8 * MIB
"""Bytes of one page."""
LISTS_SIZE = 24 * MIB
"""Bytes of memory of a whole list."""
TAG_SIZE, DESCRIPTOR_SIZE = 128, 1024
"""Bytes of memory that one takes beside its text."""
SORTED_AT_ONCE = 10_000
"""Tags that are sorted in one call, which lets no other thread run."""
TAGS = Bounds(values=300_000, escapes=100_000)
"""Of a page of tags: some registries send all they have in one."""

_NO_REFERRERS = frozenset({400, 404, 405, 406, 501})
"""Answers of registries that have no referrers API."""


class Listing:
    """One upstream's lists."""

    def __init__(self, name: str, asking: Asking, parser: Parser, memory: MemoryBudget) -> None:
        self._asking = asking
        self._parser = parser
        self._memory = memory
        self._tags: Readings[Tag] = Readings(name)
        self._referrers: Readings[Descriptor] = Readings(name)

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        """As `Source.tags`."""

        async def read() -> Reading[Tag]:
            return await self._asking.first(
                lambda endpoint, trial: self._all_tags(endpoint, trial, repo), repo, Kind.LIST, seconds=READ_SECONDS
            )

        return cut(await self._tags.items(repo, read, first=after is None), str, after, limit)

    async def aclose(self) -> None:
        """Ends what is being read."""
        await self._tags.aclose()
        await self._referrers.aclose()

    async def _all_tags(self, endpoint: Endpoint, trial: Trial, repo: RepositoryName) -> Reading[Tag]:
        found: set[Tag] = set()
        path = f"tags/list?n={PAGE}"
        last: Answer | None = None
        with closing(_Room(self._memory)) as room:
            for page in range(PAGES):
                async with holding():
                    answer = await self._tags_page(endpoint, trial, repo, path, last)
                    tags = await self._parser.run(len(answer.body), partial(_parse, answer))
                    await room.take(answer, len(tags) * TAG_SIZE)
                found.update(tags)
                following = next_page(answer.headers, answer.url) if not answer.foreign else None
                if following is None:
                    return Reading(await self._sorted(found), page + 1, room.taken)
                path, last = following, replace(answer, body=b"")
        raise UpstreamUnavailable(f"the list of tags of {place(endpoint.url)} does not end")

    async def _tags_page(
        self, endpoint: Endpoint, trial: Trial, repo: RepositoryName, path: str, last: Answer | None
    ) -> Answer:
        answer = await self._asking.ask(
            *(endpoint, trial, repo, Kind.LIST, "GET", path, NameUnknown()),
            most=LIST_SIZE,
            accepted=(400,),
            after=last,
        )
        if answer.status != 400:
            return answer
        # It does not like our `n`.
        return await self._asking.ask(
            endpoint, trial, repo, Kind.LIST, "GET", "tags/list", NameUnknown(), most=LIST_SIZE
        )

    async def _sorted(self, found: set[Tag]) -> list[Tag]:
        if len(found) <= SORTED_AT_ONCE:
            return sorted(found)
        return await self._parser.run(TAG_SIZE * len(found), lambda: _sorted_in_parts(list(found)))

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        """As `Source.referrers`."""

        async def read() -> Reading[Descriptor]:
            return await self._asking.first(
                lambda endpoint, trial: self._all_referrers(endpoint, trial, repo, subject, artifact_type),
                repo,
                Kind.LIST,
                seconds=READ_SECONDS,
            )

        key = f"{repo} {subject} {artifact_type or ''}"
        try:
            found = await self._referrers.items(key, read, first=after is None)
        except (NameDoubtful, ManifestDoubtful):
            raise NameDoubtful from None  # what is here may be more
        except (NameUnknown, ManifestUnknown):
            return Page([])
        return cut(found, lambda each: each.digest, after, limit)

    async def _all_referrers(
        self, endpoint: Endpoint, trial: Trial, repo: RepositoryName, subject: Digest, artifact_type: str | None
    ) -> Reading[Descriptor]:
        query = f"?artifactType={quote(artifact_type, safe='')}" if artifact_type else ""
        path = f"referrers/{subject}{query}"
        found: dict[Digest, Descriptor] = {}
        last: Answer | None = None
        with closing(_Room(self._memory)) as room:
            for page in range(PAGES):
                async with holding():
                    answer = await self._referrers_page(endpoint, trial, repo, path, last)
                    if answer.status in _NO_REFERRERS:
                        held = _of_type(await self._by_tag(endpoint, trial, repo, subject), artifact_type)
                        return Reading(held, 1, DESCRIPTOR_SIZE * len(held))  # never more than one beside the first
                    listed = await self._parser.descriptors(answer)
                    await room.take(answer, len(listed) * DESCRIPTOR_SIZE)
                filtered = "artifacttype" in answer.headers.get("oci-filters-applied", "").lower()
                for each in _of_type(listed, None if filtered else artifact_type):
                    found.setdefault(each.digest, each)
                following = next_page(answer.headers, answer.url) if not answer.foreign else None
                if following is None:
                    ordered = sorted(found.values(), key=lambda each: each.digest)
                    return Reading(ordered, page + 1, room.taken)
                path, last = following, replace(answer, body=b"")
        raise UpstreamUnavailable(f"the list of referrers of {place(endpoint.url)} does not end")

    async def _referrers_page(
        self, endpoint: Endpoint, trial: Trial, repo: RepositoryName, path: str, last: Answer | None
    ) -> Answer:
        return await self._asking.ask(
            endpoint,
            trial,
            repo,
            Kind.LIST,
            "GET",
            path,
            NameUnknown(),
            headers={"Accept": OCI_INDEX},
            most=LIST_SIZE,
            accepted=_NO_REFERRERS if last is None else (),
            after=last,
        )

    async def _by_tag(
        self, endpoint: Endpoint, trial: Trial, repo: RepositoryName, subject: Digest
    ) -> Sequence[Descriptor]:
        """By the fallback tag (OCI distribution spec, "Referrers Tag Schema"): an index named after the digest."""
        tag = f"{subject.algorithm[:32]}-{subject.encoded[:64]}"
        answer = await self._asking.ask(
            endpoint,
            trial,
            repo,
            Kind.MANIFEST,
            "GET",
            f"manifests/{tag}",
            ManifestUnknown(),
            headers={"Accept": OCI_INDEX},
            most=LIST_SIZE,
        )
        unique = {each.digest: each for each in await self._parser.descriptors(answer)}
        return [unique[digest] for digest in sorted(unique)]


class _Room:
    """The memory of one list while it is read."""

    def __init__(self, memory: MemoryBudget) -> None:
        self._share = memory.share()

    @property
    def taken(self) -> int:
        return self._share.size

    async def take(self, answer: Answer, entries: int) -> None:
        """Counts a page: its text, and `entries` bytes for what stands in it. Raises UpstreamUnavailable,
        TooManyRequests."""
        size = len(answer.body) + entries
        if self._share.size + size > LISTS_SIZE:
            raise UpstreamUnavailable(f"{place(answer.url)} answers with a list of more than {LISTS_SIZE} bytes")
        await self._share.grow(size)

    def close(self) -> None:
        self._share.close()


def _sorted_in_parts(tags: list[Tag]) -> list[Tag]:
    """Sorted, without a call that takes long: other threads run between two of them."""
    parts = [sorted(tags[at : at + SORTED_AT_ONCE]) for at in range(0, len(tags), SORTED_AT_ONCE)]
    return list(heapq.merge(*parts))


def _of_type(found: Sequence[Descriptor], artifact_type: str | None) -> list[Descriptor]:
    return [each for each in found if artifact_type is None or each.artifact_type == artifact_type]


def _parse(answer: Answer) -> list[Tag]:
    try:
        document = load_bounded(answer.body, TAGS)
        texts = (document.get("tags") or []) if isinstance(document, dict) else None
        if not isinstance(texts, list):
            raise ValueError
    except OutOfBounds as error:
        raise UpstreamUnavailable(f"{place(answer.url)} answers with a list that is too large: {error}") from None
    except (ValueError, RecursionError):
        raise UpstreamUnavailable(f"{place(answer.url)} answers with something that is no list of tags") from None
    found = []
    for text in texts:
        try:
            found.append(Tag(text))
        except (TagInvalid, TypeError):
            continue  # nobody could ask for it by that name
    return found
