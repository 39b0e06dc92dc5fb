"""Lists: tags, repositories, referrers (OCI distribution spec, "Content Discovery"), page by page with Link."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import closing

from registry.http import fields
from registry.http.disconnect import DisconnectWatch
from registry.http.exchange import Exchange, Header
from registry.http.responses import JSON, REVALIDATE, json_of, warning_headers
from storage.content import OCI_INDEX, Descriptor
from storage.names import Digest

_INDEX: Header = (b"content-type", OCI_INDEX.encode())
_INDEX_HEAD = f'{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","manifests":['.encode()
_INDEX_TAIL = b"]}"
_WRITTEN_ON_LOOP = 100
"""Referrers that are written on the event loop; more of them in a thread."""


async def list_tags(exchange: Exchange) -> None:
    """With `n=0` an empty list, as the spec has it: but still of a repository that exists."""
    asked, last = fields.read_count(exchange), exchange.query.one("last")
    limit = min(exchange.limits.tags_page if asked is None else asked, exchange.limits.tags_page)

    async def make() -> tuple[bytes, list[Header]]:
        page = await exchange.registry.tags(exchange.repo, last, max(limit, 1))
        tags = page.items[:limit]
        headers = [JSON, REVALIDATE, *warning_headers()]
        if tags and page.more:
            headers.append(_next(exchange, f"/v2/{exchange.asked}/tags/list", page.place or tags[-1], asked))
        return json_of({"name": exchange.asked, "tags": list(tags)}), headers

    await exchange.body_memory.answer(exchange, make)


async def list_repositories(exchange: Exchange) -> None:
    """A page may be shorter than asked for, or empty, with a link to go on, since what it costs is bounded. `last` in
    that link may be a place that only this registry can read."""
    asked, last = fields.read_count(exchange), exchange.query.one("last")
    limit = min(exchange.limits.catalog_page if asked is None else asked, exchange.limits.catalog_most)

    async def make() -> tuple[bytes, list[Header]]:
        # A request of an account waits for its others: for no longer than its client does.
        with closing(DisconnectWatch(exchange)) as leaving:
            page = await leaving.cancel_on_disconnect(exchange.registry.repositories(last, max(limit, 1)))
        names = page.items[:limit]
        headers = [JSON, REVALIDATE]
        if limit and page.more:
            headers.append(_next(exchange, "/v2/_catalog", page.place or names[-1], asked))
        return json_of({"repositories": list(names)}), headers

    await exchange.body_memory.answer(exchange, make)


def _next(exchange: Exchange, path: str, last: str, asked: int | None) -> Header:
    return exchange.link(path, {"last": last} if asked is None else {"n": str(asked), "last": last})


async def list_referrers(exchange: Exchange) -> None:
    """An index of what refers to a manifest, which need not exist. Pages end at a count and at a size, since clients
    read a page like a manifest."""
    subject = Digest(exchange.item)
    # No media type holds a space: it was a '+' that its sender did not escape.
    wanted = (exchange.query.one("artifactType") or "").replace(" ", "+") or None
    last = exchange.query.one("last")

    async def make() -> tuple[bytes, list[Header]]:
        page = await exchange.registry.referrers(exchange.repo, subject, wanted, last, exchange.limits.referrers_page)
        if len(page.items) <= _WRITTEN_ON_LOOP:
            body, taken = _index(page.items, exchange.limits.referrers_bytes)
        else:
            body, taken = await asyncio.to_thread(_index, page.items, exchange.limits.referrers_bytes)
        headers = [_INDEX, REVALIDATE, *warning_headers()]
        if wanted:
            headers.append((b"oci-filters-applied", b"artifactType"))
        if page.more or taken < len(page.items):
            parameters = {"artifactType": wanted} if wanted else {}
            whole = taken == len(page.items)
            parameters["last"] = page.place if whole and page.place else page.items[taken - 1].digest
            headers.append(exchange.link(f"/v2/{exchange.asked}/referrers/{subject}", parameters))
        return body, headers

    await exchange.body_memory.answer(exchange, make)


def _index(referrers: Sequence[Descriptor], most: int) -> tuple[bytes, int]:
    """An image index of as many referrers as fit into `most` bytes, at least one, and how many those are."""
    parts: list[bytes] = []
    size = len(_INDEX_HEAD) + len(_INDEX_TAIL)
    for referrer in referrers:
        part = referrer.json()
        size += len(part) + 1
        if parts and size > most:
            break
        parts.append(part)
    return _INDEX_HEAD + b",".join(parts) + _INDEX_TAIL, len(parts)
