"""Lists of a far registry: tags, and referrers by the API or the fallback tag.

Registries order and page their lists in their own ways (some by collation, some not at all). Ours are in byte order
and lose nothing, so a list is read whole and cut here; a client that goes through its pages gets them from one reading.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from urllib.parse import quote

from registry.mirror.source import NameDoubtful
from registry.upstream.addresses import place
from registry.upstream.answers import Answer
from registry.upstream.asking import Asking
from registry.upstream.endpoints import Endpoint, Trial
from registry.upstream.exchange import MIB
from registry.upstream.holds import Kind
from registry.upstream.paging import PAGES, cut, next_page
from registry.upstream.parsing import PARSED_HERE, descriptors
from registry.upstream.readings import READ_SECONDS, Reading, Readings
from storage.content import OCI_INDEX, Descriptor, Page
from storage.errors import ManifestUnknown, NameUnknown, TagInvalid, UpstreamUnavailable
from storage.names import Digest, RepositoryName, Tag

PAGE = 1000
"""Tags asked for at a time; CNCF Distribution refuses more."""
LIST_SIZE = 8 * MIB
"""Bytes of one page."""
LISTS_SIZE = 32 * MIB
"""Bytes of all pages of a list."""
TAG_SIZE, DESCRIPTOR_SIZE = 64, 1024
"""Bytes of memory that one takes beside its text."""
SORTED_HERE = 10_000
"""Tags up to which the event loop sorts them."""

_NO_REFERRERS = frozenset({400, 404, 405, 406, 501})
"""Answers of registries that have no referrers API."""


class Listing:
    """One upstream's lists."""

    def __init__(self, name: str, asking: Asking) -> None:
        self._asking = asking
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
        room, last = LISTS_SIZE, None
        for page in range(PAGES):
            answer = await self._asking.ask(
                endpoint,
                trial,
                repo,
                Kind.LIST,
                "GET",
                path,
                NameUnknown(),
                most=LIST_SIZE,
                accepted=(400,),
                after=last,
            )
            if answer.status == 400:  # it does not like our `n`
                answer = await self._asking.ask(
                    endpoint, trial, repo, Kind.LIST, "GET", "tags/list", NameUnknown(), most=LIST_SIZE
                )
            room = _room_after(answer, room)
            found.update(await _tags(answer))
            following = next_page(answer.headers, answer.url) if not answer.foreign else None
            if following is None:
                ordered = sorted(found) if len(found) <= SORTED_HERE else await asyncio.to_thread(sorted, found)
                return Reading(ordered, page + 1, LISTS_SIZE - room + TAG_SIZE * len(found))
            path, last = following, answer
        raise UpstreamUnavailable(f"the list of tags of {place(endpoint.url)} does not end")

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
        except NameDoubtful:
            raise  # what is here may be more
        except (NameUnknown, ManifestUnknown):
            return Page([])
        return cut(found, lambda each: each.digest, after, limit)

    async def _all_referrers(
        self, endpoint: Endpoint, trial: Trial, repo: RepositoryName, subject: Digest, artifact_type: str | None
    ) -> Reading[Descriptor]:
        query = f"?artifactType={quote(artifact_type, safe='')}" if artifact_type else ""
        path = f"referrers/{subject}{query}"
        found: dict[Digest, Descriptor] = {}
        room, last = LISTS_SIZE, None
        for page in range(PAGES):
            answer = await self._asking.ask(
                endpoint,
                trial,
                repo,
                Kind.LIST,
                "GET",
                path,
                NameUnknown(),
                headers={"Accept": OCI_INDEX},
                most=LIST_SIZE,
                accepted=_NO_REFERRERS if page == 0 else (),
                after=last,
            )
            if answer.status in _NO_REFERRERS:
                held = _of_type(await self._by_tag(endpoint, trial, repo, subject), artifact_type)
                return Reading(held, 1, DESCRIPTOR_SIZE * len(held))  # never more than one beside the first
            room = _room_after(answer, room)
            filtered = "artifacttype" in answer.headers.get("oci-filters-applied", "").lower()
            for each in _of_type(await descriptors(answer), None if filtered else artifact_type):
                found.setdefault(each.digest, each)
            following = next_page(answer.headers, answer.url) if not answer.foreign else None
            if following is None:
                ordered = sorted(found.values(), key=lambda each: each.digest)
                return Reading(ordered, page + 1, LISTS_SIZE - room + DESCRIPTOR_SIZE * len(found))
            path, last = following, answer
        raise UpstreamUnavailable(f"the list of referrers of {place(endpoint.url)} does not end")

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
        unique = {each.digest: each for each in await descriptors(answer)}
        return [unique[digest] for digest in sorted(unique)]


def _room_after(answer: Answer, room: int) -> int:
    """Bytes that a list's further pages may have. Raises UpstreamUnavailable."""
    if len(answer.body) > room:
        raise UpstreamUnavailable(f"{place(answer.url)} answers with a list of more than {LISTS_SIZE} bytes")
    return room - len(answer.body)


def _of_type(found: Sequence[Descriptor], artifact_type: str | None) -> list[Descriptor]:
    return [each for each in found if artifact_type is None or each.artifact_type == artifact_type]


async def _tags(answer: Answer) -> list[Tag]:
    if len(answer.body) <= PARSED_HERE:
        return _parse(answer)
    return await asyncio.to_thread(_parse, answer)


def _parse(answer: Answer) -> list[Tag]:
    try:
        texts = json.loads(answer.body).get("tags") or []
        if not isinstance(texts, list):
            raise ValueError
    except (ValueError, AttributeError, RecursionError):
        raise UpstreamUnavailable(f"{place(answer.url)} answers with something that is no list of tags") from None
    found = []
    for text in texts:
        try:
            found.append(Tag(text))
        except (TagInvalid, TypeError):
            continue  # nobody could ask for it by that name
    return found
