"""Lists: tags, repositories, referrers (OCI distribution spec, "Content Discovery"), page by page with Link."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import closing

from registry.http import fields
from registry.http.asgi import Header
from registry.http.disconnect import DisconnectWatch
from registry.http.exchange import Exchange
from registry.http.headers import JSON, REVALIDATE, warning_headers
from storage.content import OCI_INDEX, Descriptor
from storage.names import Digest

_INDEX: Header = (b"content-type", OCI_INDEX.encode())
_INDEX_HEAD = f'{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","manifests":['.encode()
_INDEX_TAIL = b"]}"
_WRITTEN_ON_LOOP = 100
"""Referrers that are serialised on the event loop; longer lists in a thread."""


async def list_tags(exchange: Exchange) -> None:
    """Lists a repository's tags. With `n=0` the list is empty, as the spec says, but the repository has to exist."""
    asked, last = fields.read_count(exchange), exchange.query.one("last")
    limit = min(exchange.limits.tags_page if asked is None else asked, exchange.limits.tags_page)

    async def make() -> tuple[bytes, list[Header]]:
        page = await exchange.registry.tags(exchange.repo, last, max(limit, 1))
        tags = page.items[:limit]
        headers = [JSON, REVALIDATE, *warning_headers(exchange.notice)]
        if tags and page.more:
            headers.append(
                _next(exchange, f"/v2/{exchange.requested_name}/tags/list", page.next_after or tags[-1], asked)
            )
        return _compact_json({"name": exchange.requested_name, "tags": list(tags)}), headers

    await exchange.body_memory.send_answer(exchange, make)


async def list_repositories(exchange: Exchange) -> None:
    """Lists repositories. The cost of a page is bounded, so it may be shorter than requested, or empty, with a link to
    the next one. `last` in that link may be a sealed cursor."""
    asked, last = fields.read_count(exchange), exchange.query.one("last")
    limit = min(exchange.limits.catalog_page if asked is None else asked, exchange.limits.catalog_most)

    async def make() -> tuple[bytes, list[Header]]:
        # An account's lists run one at a time, so this may wait, but not for longer than its client does.
        with closing(DisconnectWatch(exchange.wait_disconnected)) as watch:
            page = await watch.cancel_on_disconnect(exchange.registry.repositories(last, max(limit, 1)))
        names = page.items[:limit]
        headers = [JSON, REVALIDATE]
        if limit and page.more:
            headers.append(_next(exchange, "/v2/_catalog", page.next_after or names[-1], asked))
        return _compact_json({"repositories": list(names)}), headers

    await exchange.body_memory.send_answer(exchange, make)


def _compact_json(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode("ascii")


def _next(exchange: Exchange, path: str, last: str, asked: int | None) -> Header:
    return exchange.link(path, {"last": last} if asked is None else {"n": str(asked), "last": last})


async def list_referrers(exchange: Exchange) -> None:
    """Lists the manifests that refer to a manifest, which need not exist, as an image index. A page ends at a count and
    at a size, since clients read it like a manifest."""
    subject = Digest(exchange.item)
    # No media type holds a space: it was a '+' that the client did not escape.
    wanted = (exchange.query.one("artifactType") or "").replace(" ", "+") or None
    last = exchange.query.one("last")

    async def make() -> tuple[bytes, list[Header]]:
        page = await exchange.registry.referrers(exchange.repo, subject, wanted, last, exchange.limits.referrers_page)
        if len(page.items) <= _WRITTEN_ON_LOOP:
            body, taken = _index(page.items, exchange.limits.referrers_bytes)
        else:
            body, taken = await asyncio.to_thread(_index, page.items, exchange.limits.referrers_bytes)
        headers = [_INDEX, REVALIDATE, *warning_headers(exchange.notice)]
        if wanted:
            headers.append((b"oci-filters-applied", b"artifactType"))
        if page.more or taken < len(page.items):
            parameters = {"artifactType": wanted} if wanted else {}
            whole = taken == len(page.items)
            parameters["last"] = page.next_after if whole and page.next_after else page.items[taken - 1].digest
            headers.append(exchange.link(f"/v2/{exchange.requested_name}/referrers/{subject}", parameters))
        return body, headers

    await exchange.body_memory.send_answer(exchange, make)


def _index(referrers: Sequence[Descriptor], most: int) -> tuple[bytes, int]:
    """Returns an image index of the referrers that fit into `most` bytes, at least one, and their number."""
    parts: list[bytes] = []
    size = len(_INDEX_HEAD) + len(_INDEX_TAIL)
    for referrer in referrers:
        part = referrer.as_json_text()
        size += len(part) + 1
        if parts and size > most:
            break
        parts.append(part)
    return _INDEX_HEAD + b",".join(parts) + _INDEX_TAIL, len(parts)
